"""Runs in one table: means and spreads, what is refused, and what the table says on the terminal, as Markdown and as a
page.

Not here: runs themselves (test_sweep.py).
"""

from __future__ import annotations

import io
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_fixture import fixture_report, fixture_samples, minimal_report
from rich.console import Console

from pqcad_qat.errors import StudyError, UsageError
from pqcad_qat.policy.variants import FIXED_BIT, FP32, FP32_HALF, NNCF_INT8, OV_BF16, OV_FP32, PQ, PQCAD
from pqcad_qat.report.comparison import Comparison, Row, Spread, compare_runs, named_runs
from pqcad_qat.report.comparison_page import (
    cells,
    comparison_tables,
    figure_chart,
    headings,
    markdown,
    render,
    spread_text,
    with_section,
    write_comparison,
)
from pqcad_qat.report.record import UNSTEADY_NOTE, Curves, Report, Timing
from pqcad_qat.report.report_files import write_report

DISTANCES = (8.0, 8.5, 9.5)


def report(
    name: str = "w4a8", seed: int = 0, pqcad: float = 8.0, model: str = "embedded:invented", **policy: Any
) -> Report:
    """The fixture with a seed and a distance of its own."""
    found = fixture_report()
    rows = tuple(replace(row, fid_real=pqcad) if row.name == PQCAD else row for row in found.variants)
    return replace(
        found,
        policy={"name": name, "model": {"source": model}, "training": {"seed": seed}, **policy},
        seed=seed,
        variants=rows,
    )


def compare(reports: dict[str, Report]) -> Comparison:
    return compare_runs("three", named_runs(reports), "python -m pqcad_qat compare")


@pytest.fixture
def seeds() -> Comparison:
    return compare({f"runs/{seed}": report(seed=seed, pqcad=distance) for seed, distance in enumerate(DISTANCES)})


@pytest.fixture
def two() -> Comparison:
    return compare({"runs/a": report(), "runs/b": report("w2a8", progressive={"steps": 4})})


def row(comparison: Comparison, variant: str, label: str | None = None) -> Row:
    [found] = [row for row in comparison.rows if row.variant == variant and label in (None, *row.labels.values())]
    return found


def test_runs_that_differ_in_their_seed_alone_are_mean_and_standard_deviation(seeds: Comparison) -> None:
    found = row(seeds, PQCAD)
    assert (found.seeds, found.labels, found.steps, found.weight_bits) == ((0, 1, 2), {"run": "w4a8"}, 10, 4.18)
    assert found.figures["fid_real"] == Spread(
        statistics.mean(DISTANCES), pytest.approx(statistics.stdev(DISTANCES)), 3
    )
    assert spread_text(found.figures["fid_real"]) == "8.67 ± 0.76"


def test_what_training_does_not_touch_has_no_spread_over_its_seeds(seeds: Comparison) -> None:
    assert row(seeds, NNCF_INT8).figures["fid_real"] == Spread(9.88, None, 1)


def test_figures_that_differ_in_their_last_digits_alone_are_one() -> None:
    """As a distance of 0 does, which rounding may leave at 1e-11."""
    first, second = (
        replace(
            found,
            variants=tuple(replace(row, fid_fp=distance) if row.name == FP32 else row for row in found.variants),
        )
        for found, distance in ((report(), 0.0), (report("w2a8"), 1.3e-11))
    )
    found = row(compare({"a": first, "b": second}), FP32)
    assert (found.labels, found.figures["fid_fp"].mean) == ({"run": "all"}, 0.0)


def test_a_spread_is_told_as_its_mean_is() -> None:
    assert spread_text(Spread(2.684e-4, 3.2e-6, 3)) == "2.68e-04 ± 3.2e-06"
    assert spread_text(Spread(2.684, 0.126, 3)) == "2.68 ± 0.13"


def test_times_that_spread_too_widely_are_marked_beside_the_figure_and_explained() -> None:
    wide = replace(report(), latency={FP32: Timing(435, 300, 306, 1228, 60)})
    comparison = compare({"runs/a": wide, "runs/b": report("w2a8", progressive={"steps": 4})})
    found = [dict(zip(headings(comparison), cells(comparison, row), strict=True)) for row in comparison.rows]
    assert [texts["variant"] for texts in found if texts["ms an image"].endswith(" unsteady")] == [FP32, FP32_HALF]
    for told in (render(comparison), markdown(comparison), *list(comparison_tables(comparison))[1:]):
        assert UNSTEADY_NOTE in str(told)
    assert UNSTEADY_NOTE not in render(compare({"runs/a": report()}))


def test_sizes_are_told_in_megabytes(seeds: Comparison) -> None:
    texts = dict(zip(headings(seeds), cells(seeds, row(seeds, OV_FP32)), strict=True))
    assert float(texts["MB"].split()[0]) == pytest.approx(
        row(seeds, OV_FP32).figures["size_bytes"].mean / 1e6, rel=0.01
    )


def test_what_was_not_measured_is_absent(seeds: Comparison) -> None:
    assert set(row(seeds, OV_FP32).figures) == {"latency_ms_per_image", "size_bytes"}
    assert set(row(seeds, PQ).figures) == {"fid_real", "fid_fp", "psnr_fp"}


def test_what_is_the_same_in_all_runs_is_one_row(two: Comparison) -> None:
    assert row(two, FP32).labels == {"run": "all"}
    assert row(two, PQCAD, "w4a8").seeds == row(two, PQCAD, "w2a8").seeds == (0,)
    assert [row.variant for row in two.rows][:5] == [FP32, FP32_HALF, OV_FP32, OV_BF16, NNCF_INT8]


def test_runs_of_other_policies_with_one_name_are_called_by_their_paths() -> None:
    found = compare({"runs/a": report(), "runs/b": report(progressive={"steps": 4}), "runs/c": report("other")})
    assert {label for row in found.rows for label in row.labels.values()} == {"all", "runs/a", "runs/b", "other"}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("images", 500, "images: 2000 and 500"),
        ("features_sha256", "cd", f"features_sha256: {'ab' * 32} and cd"),
        ("reference", None, r"reference: 60,000 training images \(invented\) and None"),
        ("sampler", "euler", "sampler: ddim and euler"),
        ("seed", 7, "seed: 0 and 7"),
    ],
)
def test_distances_of_different_protocols_are_refused_with_both_runs_and_what_differs(
    key: str, value: Any, told: str
) -> None:
    other = report("w2a8")
    assert other.fid_protocol is not None
    changed = replace(other, fid_protocol=replace(other.fid_protocol, **{key: value}))
    with pytest.raises(
        StudyError, match=rf"^runs/a and runs/b: got distances of different protocols \({told}\); allowed one protocol$"
    ):
        compare({"runs/a": report(), "runs/b": changed})


def test_runs_of_different_models_are_tables_of_their_own_each_with_its_protocol() -> None:
    other = report("w4a8-other", model="embedded:other")
    assert other.fid_protocol is not None
    other = replace(other, fid_protocol=replace(other.fid_protocol, images=10_000, features="other-network"))
    found = compare({"runs/a": report(seed=0), "runs/b": other, "runs/c": report(seed=1, pqcad=9.0)})
    assert [(part.model, part.protocol and part.protocol.images) for part in found.parts] == [
        ("embedded:invented", 2000),
        ("embedded:other", 10_000),
    ]
    assert [{row.labels["run"] for row in part.rows} for part in found.parts] == [{"w4a8"}, {"w4a8-other"}]
    written, page = markdown(found), render(found)
    first, second = written.split("through the feature network invented-classifier")
    assert "| w4a8 | pqcad" in first
    assert "| w4a8-other | pqcad" not in first
    assert "| w4a8-other | pqcad" in second
    assert page.count('<table class="sortable">') == page.count('<h2 id="h-picture') == 2
    assert "three: embedded:other" in [table.title for table in comparison_tables(found) if not isinstance(table, str)]


def test_sampling_steps_may_differ() -> None:
    other = report("w2a8")
    assert other.fid_protocol is not None
    compare({"runs/a": report(), "runs/b": replace(other, fid_protocol=replace(other.fid_protocol, steps=50))})


def test_one_seed_of_one_policy_twice_is_refused() -> None:
    with pytest.raises(
        StudyError, match=f"runs/a and runs/b: got {FIXED_BIT} of one policy and seed 0 twice; allowed once"
    ):
        compare({"runs/a": report(), "runs/b": report()})


def test_runs_of_one_policy_that_made_other_variants_are_one_run() -> None:
    whole = report(evaluation={"variants": [PQ]})
    pq, rest = (
        replace(whole, variants=tuple(row for row in whole.variants if (row.name == PQ) == wanted))
        for wanted in (True, False)
    )
    found = compare(
        {"runs/a": pq, "runs/b": replace(rest, policy={**rest.policy, "evaluation": {"variants": [PQCAD]}})}
    )
    assert {label for row in found.rows for label in row.labels.values()} == {"w4a8"}
    assert [row.variant for row in found.rows] == [row.name for row in whole.variants]


def test_the_terminal_markdown_and_page_say_the_same(two: Comparison) -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(*comparison_tables(two), sep="\n")
    shown, written, page = console.export_text(), markdown(two), render(two)
    assert written.count("\n| ") == 2 + len(two.rows)
    for text in (*headings(two), "w2a8", "8.00", "28.9"):
        assert text in shown
        assert text in written
        assert text in page


def test_the_protocol_is_told_in_words_with_the_mark_of_few_images(two: Comparison) -> None:
    for text in (markdown(two), render(two)):
        assert (
            "Frechet distance of 2,000 images (noise seed 0, sampler ddim) to 60,000 training images (invented)" in text
        )
        assert f"invented-classifier (sha256 {'ab' * 8})" in text
        assert "Fewer than the customary 10,000 images" in text
    [part] = two.parts
    assert part.protocol is not None
    many = replace(two, parts=(replace(part, protocol=replace(part.protocol, images=10_000)),))
    assert "Fewer" not in markdown(many)
    assert "fewer than" not in render(many)


def test_the_page_needs_no_other_file_and_draws_every_row(seeds: Comparison) -> None:
    page = render(seeds)
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", page) == []
    assert "w4a8, pqcad: FD to real 8.67 ± 0.76, n = 3" in page
    assert "var(--accent)" in page


def test_files_are_one_page_with_json_and_markdown_beside_it(seeds: Comparison, tmp_path: Path) -> None:
    write_comparison(seeds, tmp_path / "deep" / "study.html")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["study.html", "study.json", "study.md"]
    document = json.loads((tmp_path / "deep" / "study.json").read_text())
    assert document["schema_version"] == 2
    [found] = [row for row in document["parts"][0]["rows"] if row["variant"] == PQCAD]
    assert found["figures"]["fid_real"]["count"] == 3
    assert document["parts"][0]["protocol"]["features_sha256"] == "ab" * 32


def test_runs_without_figures_draw_nothing_and_say_so() -> None:
    found = compare({"runs/a": minimal_report()})
    assert figure_chart(found.parts[0]) is None
    assert "No Frechet distance was measured" in render(found)


def test_a_studys_section_of_a_page_is_replaced_and_all_else_stays(seeds: Comparison) -> None:
    page = "# Studies\n\n<!-- bits -->\nold\n<!-- end of bits -->\n\nMeaning.\n"
    written = with_section(page, "bits", markdown(seeds))
    assert written == page.replace("old\n", markdown(seeds))
    assert with_section(written, "bits", "old\n") == page


def test_a_page_without_the_studys_section_gets_it_at_its_end() -> None:
    assert with_section("", "bits", "table\n") == "## bits\n\n<!-- bits -->\ntable\n<!-- end of bits -->\n"
    page = with_section("# Studies\n", "bits", "table\n")
    assert page.startswith("# Studies\n\n## bits\n")
    assert with_section(page, "bits", "table\n") == page


@pytest.mark.parametrize("page", ["<!-- bits -->\n", "<!-- end of bits -->\n<!-- bits -->\n"])
def test_a_page_whose_markers_do_not_match_is_refused(page: str) -> None:
    with pytest.raises(UsageError, match="both once, or none"):
        with_section(page, "bits", "")


def test_the_page_shows_the_pictures_that_the_runs_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose folders have none show none; on the page the figures come before widths and steps."""
    reports = {str(tmp_path / name): report(name) for name in ("w4a8", "w8a8")}
    write_report(tmp_path / "w4a8", reports[str(tmp_path / "w4a8")], Curves(), fixture_samples(2))
    write_comparison(compare(reports), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img class="sheet" src="data:image/png;base64,') == 1
    monkeypatch.setattr("pqcad_qat.report.comparison_page.LARGEST_PICTURES", 1)
    write_comparison(compare(reports), tmp_path / "large.html")
    assert '<img class="sheet" src="w4a8/samples.png"' in (tmp_path / "large.html").read_text()
    assert f"<summary>{tmp_path / 'w4a8'}</summary>" in page
    shown = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', page)
    assert sorted(shown) == sorted(headings(compare(reports)))
    assert shown[-3:] == ["bits W/A", "steps", "seeds"]
