"""report.json as an interface, the page's honesty and self-containment, and damaged reports.

Not here: charts (test_figures.py) and sample sheets (test_sample_sheets.py).
"""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_fixture import fixture_curves, fixture_report, fixture_samples, fixture_variants, minimal_report
from rich.console import Console

from pqcad_qat import console
from pqcad_qat.errors import ModelError
from pqcad_qat.policy.variants import FIXED_BIT, FP32, NNCF_INT8, OV_BF16, PQ, PQCAD_OPENVINO
from pqcad_qat.report.page import (
    bits,
    duration,
    headlines,
    number_text,
    render_page,
    size,
    summary,
    target_text,
    verdict,
)
from pqcad_qat.report.record import (
    SCHEMA_VERSION,
    UNSTEADY_NOTE,
    Curves,
    Report,
    Series,
    Target,
    Timing,
    VariantRow,
    target,
)
from pqcad_qat.report.report_files import read_record, read_report, save_record, to_json, write_report

INTERFACE = [
    "policy",
    "seed",
    "hardware",
    "variants",
    "fid_protocol",
    "bit_schedule",
    "parity",
    "execution",
    "timings_s",
]
TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("run")
    write_report(written, fixture_report(), fixture_curves(), fixture_samples())
    return written


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_table_has_the_figures_of_report_json_and_nothing_for_what_is_not_known(folder: Path) -> None:
    with (folder / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = json.loads((folder / "report.json").read_text(encoding="utf-8"))["variants"]
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in wanted] == rows
    assert "" in {row["fid_real"] for row in rows}


def strict(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    loaded: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return loaded


# ---- report.json


def test_json_has_the_keys_that_other_programs_read(folder: Path) -> None:
    document = strict((folder / "report.json").read_text(encoding="utf-8"))
    assert list(document)[:10] == ["schema_version", *INTERFACE]
    assert set(document["hardware"]) >= {"cpu", "isa", "cores", "versions"}
    assert list(document["variants"][0]) == [
        *("name", "runtime", "weight_bits", "activation_bits", "steps", "size_bytes"),
        *(
            "latency_ms_per_step",
            "latency_ms_per_image",
            "fid_real",
            "fid_fp",
            "psnr_fp",
            "ssim_fp",
            "float_steps",
            "float_calls",
            "passes",
            "did_not_run",
            "kid_real",
            "kid_real_error",
            "precision",
            "recall",
            "clip_score",
            "clip_score_error",
        ),
    ]
    assert list(document["fid_protocol"]) == [
        "images",
        "features",
        "features_sha256",
        "reference",
        "sampler",
        "steps",
        "seed",
        "reference_kind",
        "floor",
    ]
    assert list(document["bit_schedule"][0]) == [
        "step",
        "layer",
        "from",
        "to",
        "perturbation",
        "cause",
        "began",
    ]
    assert list(document["parity"]) == [
        "layers_checked",
        "layers_exact",
        "worst_layer",
        "worst_error",
        "end_to_end_psnr",
    ]
    told = ["planned", "executed_int8", "float_layers", "needs_vnni", "attention", "any_size_int8"]
    assert list(document["execution"]) == told
    assert document["timings_s"][PQ] == 212.0


def test_unknown_numbers_are_null(folder: Path) -> None:
    document = strict((folder / "report.json").read_text(encoding="utf-8"))
    row = next(row for row in document["variants"] if row["name"] == FIXED_BIT)
    assert row["size_bytes"] is None
    assert row["latency_ms_per_step"] is None
    assert strict(json.dumps(to_json(minimal_report())))["parity"] is None


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    assert read_report(folder) == fixture_report()
    assert read_record(folder) == (fixture_report(), fixture_curves())


def test_numbers_that_are_not_finite_become_null_and_a_warning_names_them() -> None:
    report = replace(fixture_report(), variants=(replace(fixture_variants()[0], fid_real=math.nan, psnr_fp=math.inf),))
    curves = Curves(losses=(Series(PQ, "loss", (0, 1), (0.1, math.nan)),))
    document = strict(json.dumps(to_json(report, curves), allow_nan=False))
    assert document["variants"][0]["fid_real"] is None
    assert document["curves"]["losses"][0]["values"] == [0.1, None]
    warning = document["warnings"][-1]
    assert "variants.0.fid_real (nan), variants.0.psnr_fp (inf), curves.losses.0.values.1 (nan)" in warning


def test_a_number_that_must_be_known_may_not_be_nan(tmp_path: Path) -> None:
    report = replace(minimal_report(), latency={FP32: Timing(math.nan, 1.0, 1.0, 1.0, 3)})
    with pytest.raises(ModelError, match=r"latency\.fp32\.median_ms: got None"):
        write_report(tmp_path, report, Curves(), {})
    assert list(tmp_path.iterdir()) == []


def test_writing_leaves_its_files_and_nothing_beside(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["report.csv", "report.html", "report.json", "samples.png"]


def test_writing_again_replaces(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_report(tmp_path, replace(minimal_report(), seed=seed), Curves(), {})
    assert read_report(tmp_path).seed == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 2, "pol', "cannot be read as JSON"),
        ("[]", "got a JSON list; allowed an object"),
        ("{}", rf"schema_version: got None; allowed {SCHEMA_VERSION}, which this version"),
        ('{"schema_version": 99}', "schema_version: got 99"),
        ('{"schema_version": 2, "seed": NaN}', "NaN is not JSON"),
        (
            '{"schema_version": 2, "seed": "x", "policy": {}, "hardware": {}}',
            r"seed: got 'x'; allowed a value that fits: Input should be a valid integer",
        ),
        (
            '{"schema_version": 2, "seed": "x", "policy": {}, "hardware": {}}',
            r"hardware\.cpu: got \{\}; allowed a value that fits: Field required",
        ),
    ],
)
def test_damaged_reports_are_refused_with_key_and_rule(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        read_report(tmp_path)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"report\.json: got no such file; allowed the folder of a finished run"):
        read_report(tmp_path)


# ---- report.html


class Page(HTMLParser):
    """Collects what a page loads, its ids, images and unbalanced tags."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.alts: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [found for key, found in attrs if key == "id" and found]
        self.loads += [
            value or "" for key, value in attrs if key in ("src", "srcset", "data", "xlink:href", "href") and tag != "a"
        ]
        self.links += [values.get("href") or ""] if tag == "a" else []
        if tag == "img":
            self.alts.append(values.get("alt"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained(page: str) -> None:
    parsed = Page(page)
    assert all(load.startswith(("data:", "#")) for load in parsed.loads)
    assert "http" not in page
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_page_is_balanced_and_its_links_lead_somewhere(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)


def test_every_image_has_an_alternative_text(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.alts) == len(fixture_samples())
    assert all(alt and "from the same seeds" in alt for alt in parsed.alts)


def test_page_shows_every_variant_target_and_layer(page: str) -> None:
    report = fixture_report()
    for words in (
        *(v.name for v in report.variants),
        *(t.name for t in report.targets),
        *(row.layer for row in report.layers),
    ):
        assert words in page


def test_page_says_which_targets_hold_and_which_do_not(page: str) -> None:
    assert page.count("✓ holds") == 4
    assert page.count("✗ missed") == 1
    assert page.count("○ not measured") == 1
    assert verdict(fixture_report().targets) == "4 of 6 targets hold, 1 missed, 1 not measured here"


@pytest.mark.parametrize(("images", "marked"), [(9_999, True), (10_000, False)])
def test_fid_of_few_images_is_marked(images: int, marked: bool) -> None:
    report = fixture_report()
    assert report.fid_protocol is not None
    report = replace(
        minimal_report(), variants=report.variants, fid_protocol=replace(report.fid_protocol, images=images)
    )
    shown = render_page(report, Curves(), {})
    assert ("fewer than 10,000 images" in shown) == marked


def test_page_of_the_least_a_report_can_hold() -> None:
    shown = render_page(minimal_report(), Curves(), {})
    assert Page(shown).open == []
    assert "No quantized model is part of this report" in shown
    assert "<svg" not in shown


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        *((name, ()) for name in ("variants", "bit_schedule", "targets", "warnings", "layers", "storage")),
        *((name, None) for name in ("fid_protocol", "parity", "execution", "reproduction")),
        *((name, {}) for name in ("policy", "timings_s", "latency", "profiles")),
    ],
)
def test_page_without_one_part(part: str, missing: object) -> None:
    full = fixture_report()
    small = replace(full, bit_schedule=full.bit_schedule[:2], layers=full.layers[:3])
    changes: dict[str, Any] = {part: missing}
    assert Page(render_page(replace(small, **changes), Curves(), fixture_samples(1))).open == []


def test_page_says_which_setting_of_nncf_its_row_has() -> None:
    errors = {"defaults": 0.02, "preset MIXED": 0.01, "model_type TRANSFORMER": None}
    page = render_page(replace(fixture_report(), nncf=errors), fixture_curves(), fixture_samples())
    assert "held-out states: preset MIXED. Mean squared errors" in page
    assert f"defaults 0.020, preset MIXED 0.010, model_type TRANSFORMER {DASH}." in page


def test_page_escapes_what_users_wrote() -> None:
    report = replace(minimal_report(), policy={"name": "<script>alert(1)</script>"}, warnings=("a < b & c",))
    shown = render_page(report, Curves(), {})
    assert "<script>" not in shown
    assert "a &lt; b &amp; c" in shown


# ---- what the page says


def test_headlines_are_ratios_of_the_rows() -> None:
    found = {tile.meaning: (tile.value, tile.good) for tile in headlines(fixture_report())}
    assert found == {
        "faster than OpenVINO BF16": (f"2.3{TIMES}", True),
        "faster than OpenVINO FP32": (f"4.1{TIMES}", True),
        "faster than PyTorch FP32": (f"14.4{TIMES}", True),
        "the size of full precision": (f"0.26{TIMES}", True),
        "FD, worse than full precision": ("+6.0 %", False),
        "planned layers executed in INT8": ("55/55", True),
    }


def test_headline_splits_a_speed_up_into_steps_and_step_cost() -> None:
    (tile, *_) = headlines(fixture_report())
    assert (
        tile.basis == f"70.0 to 30.2 ms an image: 2{TIMES} from the number of steps, 1.16{TIMES} from the time of each"
    )


def rows_of(*variants: VariantRow) -> Report:
    return replace(minimal_report(), variants=variants)


def test_headlines_say_slower_where_it_is_slower() -> None:
    base = VariantRow(OV_BF16, "OpenVINO", 16, 16, 20, latency_ms_per_image=10.0)
    ours = VariantRow(PQCAD_OPENVINO, "OpenVINO", 4, 8, 10, latency_ms_per_image=15.0)
    (tile,) = headlines(rows_of(base, ours))
    assert (tile.value, tile.meaning, tile.good) == (f"1.5{TIMES}", "slower than OpenVINO BF16", False)


def test_no_headline_without_both_numbers() -> None:
    without = [row for row in fixture_variants() if row.name != OV_BF16]
    assert "faster than OpenVINO BF16" not in [tile.meaning for tile in headlines(rows_of(*without))]
    assert (
        headlines(
            rows_of(*(replace(row, latency_ms_per_image=None, size_bytes=None, fid_real=None) for row in without))
        )
        == []
    )


def test_summary_falls_back_to_what_there_is() -> None:
    rows = fixture_variants()
    assert (
        summary(rows_of(*rows))
        == "Weights of 4.18 and activations of 8 bits, 10 sampling steps in place of 20, executed by OpenVINO."
    )
    assert summary(rows_of(*rows[:-1])).endswith("simulated in PyTorch.")


@pytest.mark.parametrize(
    ("measured", "comparison", "holds"),
    [(1.0, "<=", True), (1.1, "<=", False), (1.0, ">=", True), (0.9, ">=", False), (1.0, "==", True)],
)
def test_target_holds_by_its_numbers(measured: float, comparison: Any, holds: bool) -> None:
    assert target("t", measured, comparison, 1.0).holds is holds


@pytest.mark.parametrize("measured", [None, math.nan, math.inf])
def test_target_without_a_measurement_neither_holds_nor_fails(measured: float | None) -> None:
    assert target("t", measured, "<=", 1.0).holds is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, DASH),
        (0.0, "0.000"),
        (0.4213, "0.421"),
        (12.345, "12.3"),
        (434.0, "434"),
        (54321.0, "54,321"),
        (1.5e-5, "1.50e-05"),
    ],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert number_text(value) == text


def test_units_are_said_as_a_person_would() -> None:
    assert [size(None), size(999), size(1_690_000)] == [DASH, "1.0 kB", "1.69 MB"]
    assert [duration(9.94), duration(75), duration(7260)] == ["9.9 s", "1 min 15 s", "2 h 01 min"]
    assert [bits(None), bits(4.0), bits(4.18)] == ["floating point", "4", "4.18"]
    assert [target_text(None, "x"), target_text(0.2, "x"), target_text(55, "layers")] == [
        DASH,
        f"0.2{TIMES}",
        "55 layers",
    ]


def test_the_terminal_says_what_did_not_run_and_which_times_mean_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "CONSOLE", Console(width=200))
    report = fixture_report()
    rows = tuple(
        replace(row, did_not_run="its process died", size_bytes=None) if row.name == NNCF_INT8 else row
        for row in report.variants
    )
    goal = Target(
        f"milliseconds an image: {PQCAD_OPENVINO} / fp32", None, "<=", 0.1, None, "x", "the times of fp32 are unsteady"
    )
    wide = {FP32: Timing(435, 300, 306, 1228, 60)}
    save_record(tmp_path, replace(report, variants=rows, latency=wide, targets=(goal,)))
    console.show_result(tmp_path, tmp_path / "report.html")
    told = " ".join(capsys.readouterr().out.split())
    assert f"{NNCF_INT8} did not run: its process died" in told
    assert "434.00 unsteady" in told
    assert UNSTEADY_NOTE in told
    assert (
        f"not measured: milliseconds an image: {PQCAD_OPENVINO} / fp32: - <= 0.1 (the times of fp32 are unsteady)"
        in told
    )
