"""How distances are named and what is shown of them, on the page, on a terminal and in comparisons.

Not here: what they are (tests/quality/).
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_fixture import fixture_report
from rich.console import Console

from pqcad_qat.errors import StudyError
from pqcad_qat.policy.variants import FP32, PQCAD
from pqcad_qat.quality.fid_protocol import INCEPTION_SHA256, Floor
from pqcad_qat.report.comparison import Run, compare_runs
from pqcad_qat.report.comparison_page import render
from pqcad_qat.report.page import render_page
from pqcad_qat.report.record import Curves, Report
from pqcad_qat.report.tables import result_remarks, result_table

FLOOR = (
    "Floor: 1,000 images of one half of the reference are at FD-EffNetLite0 3.21 and a KID of 0.4±0.3 from 5,000 of "
    "its other half. Smaller differences mean nothing."
)


def measured_by_others() -> Report:
    """A report whose images were compared through EfficientNet-Lite0, with all that can be measured."""
    report = fixture_report()
    assert report.fid_protocol is not None
    protocol = replace(report.fid_protocol, features="efficientnet-lite0", floor=Floor((1000, 5000), 3.21, 0.4, 0.3))
    rows = (replace(row, kid_real=95.24, kid_real_error=3.06, precision=0.714, recall=0.5) for row in report.variants)
    return replace(report, variants=tuple(rows), fid_protocol=protocol)


def shown(report: Report) -> list[str]:
    """A report as its page, on a terminal, and in a comparison."""
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    console.print(result_table(report, Path("runs/one")), *result_remarks(report))
    return [
        render_page(report, Curves(), {name: np.zeros((2, 1, 8, 8), np.float32) for name in (FP32, PQCAD)}),
        printed.getvalue(),
        render(compare_runs("table", [Run("one", {"run": "one"}, report)], "compare")),
    ]


def test_a_distance_through_a_network_of_others_is_nowhere_called_fid() -> None:
    for text in shown(measured_by_others()):
        assert "FD-EffNetLite0" in text
        assert re.search("FIDs?[^_a-z]", text) is None
        assert FLOOR in " ".join(text.split())


def test_only_a_distance_through_the_standard_inception_weights_is_called_fid() -> None:
    own = fixture_report()
    assert own.fid_protocol is not None
    standard = replace(own, fid_protocol=replace(own.fid_protocol, features_sha256=INCEPTION_SHA256))
    for one, other in zip(shown(own), shown(standard), strict=True):
        assert re.search(r"\bFDs?\b", one)
        assert re.search(r"\bFIDs?\b", one) is None
        assert re.search(r"\bFID\b", other)
        assert re.search(r"\bFDs?\b", other) is None


def scored(model: str) -> Report:
    """A report with CLIP scores by a model of this name."""
    report = fixture_report()
    rows = (replace(row, clip_score=26.314, clip_score_error=0.407) for row in report.variants)
    return replace(report, variants=tuple(rows), clip=f"{model}, sha256 {'cd' * 32}")


def test_clip_scores_are_shown_with_their_error_where_there_are_any() -> None:
    page, terminal, table = shown(scored("vit"))
    assert "26.31±0.41" in page
    assert f"<dd>vit, sha256 {'cd' * 32}</dd>" in page
    assert "26.31±0.41" in terminal
    assert "CLIP score" in table
    assert all("CLIP" not in text for text in shown(fixture_report()))


def test_clip_scores_by_different_models_are_not_compared() -> None:
    runs = [Run(name, {"run": name}, scored(name)) for name in ("one", "two")]
    with pytest.raises(StudyError, match=r"one and two: got CLIP scores by one, .* and two, .*; allowed one"):
        compare_runs("table", runs, "compare")


def test_the_page_has_columns_of_what_was_measured_and_no_others() -> None:
    page, without = (render_page(report, Curves(), {}) for report in (measured_by_others(), fixture_report()))
    assert "95.2±3.1" in page
    assert "0.71 / 0.50" in page
    assert all(word not in without for word in ("KID", "Precision", "Floor"))


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_result_on_a_terminal_cuts_nothing_at_any_width(width: int) -> None:
    for report in (measured_by_others(), fixture_report()):
        printed = io.StringIO()
        Console(file=printed, width=width).print(result_table(report, Path("runs/one")))
        text = printed.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert ("95.2±3.1" in text) == ("0.71/0.50" in text) == ("KID" in text) == (report == measured_by_others())
