"""A benchmark in words, numbers and pictures: the tables, the JSON and the page of an invented record.

Not here: any measurement (test_benchmark_command.py).
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmark_fixture import FULL, LOADED, OURS, record
from report_fixture import fixture_report
from rich.console import Console

from pqcad_qat.policy.variants import NNCF_INT8, OV_BF16, PQCAD_OPENVINO, spec_of
from pqcad_qat.report.benchmark_cells import (
    HEADINGS,
    cells,
    cold_cells,
    cold_headings,
    image_cells,
    image_headings,
    loading_cells,
    precisions_text,
)
from pqcad_qat.report.benchmark_page import (
    kind_milliseconds,
    remarks,
    render,
    speed_chart,
    speed_tables,
    write_speed,
)
from pqcad_qat.report.benchmark_record import SpeedReport, SpeedRow
from pqcad_qat.report.page import UNKNOWN
from pqcad_qat.report.record import UNSTEADY_NOTE, ProfileRow, Throughput, Timing


def row_of(report: SpeedReport, row: SpeedRow) -> dict[str, str]:
    return dict(zip(HEADINGS, cells(report.measurements[0], row), strict=True))


def image_of(report: SpeedReport, row: SpeedRow) -> dict[str, str]:
    return dict(zip(image_headings(report), image_cells(report, report.measurements[0], row), strict=True))


def printed(report: SpeedReport) -> str:
    console = Console(file=io.StringIO(), width=160)
    for table in speed_tables(report):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_image_takes_its_steps_and_shares_them_with_its_batch() -> None:
    full, ours = image_of(record(10), FULL), image_of(record(10), OURS)
    assert full["ms an image, 10 steps each"] == "100"  # 20 ms x 10 steps / batch of 2
    assert (full["own steps"], full["ms an image, own steps"]) == ("20", "200")
    assert full["images/s, own steps"] == "3.00"  # 60 image steps / 20
    assert (ours["own steps"], ours["ms an image, 10 steps each"], ours["ms an image, own steps"]) == (
        "10",
        "25.0",
        "25.0",
    )


def test_a_row_of_nncf_in_another_setting_is_a_baseline_with_nncfs_words() -> None:
    hybrid = replace(FULL, name=f"{NNCF_INT8} hybrid")
    page = render(record(10, FULL, hybrid, OURS))
    assert page.count(hybrid.name) > 2
    assert spec_of(hybrid.name).summary in page


def test_halved_steps_show_in_the_ratio_of_an_image() -> None:
    assert row_of(record(10), FULL)["ours / this, ×"] == "0.250"  # noqa: RUF001
    assert image_of(record(10), FULL)["ours / this, ×"] == "0.125"  # noqa: RUF001


def test_steps_in_full_precision_cost_what_their_own_graph_costs() -> None:
    """Two calls of 20 ms for the first of ten steps, then nine calls of 5 ms; under load two at 60 a second and nine
    at 300.
    """
    ours = replace(
        OURS, float_latency=Timing(20, 19, 19.5, 21, 9), float_throughput=Throughput(60, 62, 59, 61, 5, 8, 1)
    )
    report = replace(record(10, FULL, ours), float_steps=1, float_calls=2)
    image = image_of(report, ours)
    assert (image["own steps"], image["ms an image, own steps"]) == ("10 (1 float, 2 calls)", "42.5")
    assert image["ms an image, 10 steps each"] == "42.5"
    assert image["images/s, own steps"] == "15.8"
    assert image_of(report, FULL)["ours / this, ×"] == "0.212"  # noqa: RUF001
    assert image_of(report, FULL)["ms an image, own steps"] == "200"
    assert "2 calls" in printed(report)
    assert "1 of them in full precision (2 calls)" in render(report)
    unsteady = replace(ours, float_latency=Timing(20, 9, 9.5, 51, 9))
    assert unsteady.float_latency is not None
    assert unsteady.float_latency.unsteady
    image = image_of(replace(report, measurements=(replace(report.measurements[0], rows=(FULL, unsteady)),)), unsteady)
    assert image["ms an image, own steps"] == "42.5 unsteady"
    assert image["ours / this, ×"] == "–"  # noqa: RUF001


def test_own_steps_that_a_folder_does_not_say_are_unknown() -> None:
    found = image_of(replace(record(10), full_precision_steps=None), FULL)
    assert found["ms an image, 10 steps each"] == "100"
    assert set(list(found.values())[2:]) == {"–"}  # noqa: RUF001


def test_times_that_spread_too_widely_are_marked_beside_the_figure_and_give_no_ratio() -> None:
    wide = replace(FULL, latency=Timing(435, 300, 306, 1228, 9), throughput=Throughput(60, 62, 40, 61, 5, 8, 1))
    report = record(10, wide, OURS)
    step, image = row_of(report, wide), image_of(report, wide)
    assert (step["ms a step"], step["quartiles"], step["image steps/s"]) == (
        "435 unsteady",
        "306 - 1,228",
        "60.0 unsteady",
    )
    assert (image["ms an image, 10 steps each"], image["ms an image, own steps"]) == (
        "2,175 unsteady",
        "4,350 unsteady",
    )
    assert image["images/s, own steps"] == "3.00 unsteady"
    assert {step["ours / this, ×"], image["ours / this, ×"]} == {"–"}  # noqa: RUF001
    assert row_of(report, OURS)["ms a step"] == "5.00"
    assert remarks(report.measurements[0])[-1] == UNSTEADY_NOTE
    assert UNSTEADY_NOTE in render(report)
    assert UNSTEADY_NOTE not in render(record())


def test_loading_is_shown_by_format_with_its_parts() -> None:
    assert loading_cells(LOADED) == ["packed", "0.60", "1.00", "20.0", "300", "321"]
    assert re.search(r"packed +0\.60 +1\.00 +20\.0 +300 +321", printed(record()))
    assert f"Load time of {PQCAD_OPENVINO}" in render(record())


def test_cold_starts_compare_time_and_memory_with_ours() -> None:
    report = record()
    assert report.cold is not None
    float32, ours = report.cold.rows
    assert cold_headings(report)[1] == "ms to the first image"
    assert cold_headings(record(None))[1] == "ms to the first call"
    assert cold_cells(report, float32)[1:] == ["2,000", "1,950 - 2,100", "0.500", "400", "0.250"]
    assert cold_cells(report, ours)[-3:] == ["1.00", "100", "1.00"]
    unsteady = replace(float32, image=Timing(2000, 1000, 1500, 2500, 5))
    assert cold_cells(report, unsteady)[3] == UNKNOWN


def test_where_no_steps_are_known_only_steps_are_counted() -> None:
    assert row_of(record(None), FULL)["image steps/s"] == "60.0"
    assert image_headings(record(None)) == []
    assert "an image" not in printed(record(None))


def test_the_ratio_is_ours_over_each_and_unknown_without_ours() -> None:
    assert row_of(record(), FULL)["ours / this, ×"] == "0.250"  # noqa: RUF001
    assert row_of(record(), OURS)["ours / this, ×"] == "1.00"  # noqa: RUF001
    assert row_of(record(10, FULL), FULL)["ours / this, ×"] == "–"  # noqa: RUF001


def test_precisions_are_counted() -> None:
    assert precisions_text(OURS) == "2 u8, 1 i8, 1 bf16"
    assert precisions_text(FULL) == "f32"


def test_planned_layers_that_left_int8_are_named_with_what_they_ran_in() -> None:
    assert (
        remarks(record().measurements[0])[0]
        == f"{PQCAD_OPENVINO}: 3 of 3 planned layers and attentions executed in INT8"
    )
    left = record(10, FULL, replace(OURS, planned=4, planned_float=("d",)))
    assert (
        remarks(left.measurements[0])[0]
        == f"{PQCAD_OPENVINO}: 3 of 4 planned layers and attentions executed in INT8; not: d (bf16)"
    )


def test_kinds_of_node_beyond_the_largest_are_summed() -> None:
    many = [ProfileRow(f"Kind{index}", "f32", float(20 - index), 1) for index in range(12)]
    found = kind_milliseconds({"a": many, "b": many[:1]})
    assert next(iter(found)) == "Kind0"
    assert found["Kind0"] == [20.0, 20.0]
    assert found["other"] == [sum(row.milliseconds for row in many[8:]), 0.0]


def test_the_terminal_shows_timings_precisions_what_was_left_out_and_the_profile() -> None:
    output = printed(record())
    assert re.search(
        r"runs/mine: batch 2, native: one denoising step; an image takes ours 10, full precision 20", output
    )
    assert re.search(rf"{PQCAD_OPENVINO} +5\.00 +4\.00 +4\.60 - 5\.50 +300 +1\.00 +1\.05 +2 u8, 1 i8, 1 bf16", output)
    assert re.search(rf"{PQCAD_OPENVINO} +25\.0 +10 +25\.0 +30\.0 +1\.00", output)
    assert f"{OV_BF16}: not timed: bfloat16 is emulated <here>" in output
    assert re.search(r"Convolution +3\.50", output)


def test_json_holds_the_whole_record(tmp_path: Path) -> None:
    page = write_speed(record(), tmp_path / "deep" / "out")
    document = json.loads((page.parent / "benchmark.json").read_text(encoding="utf-8"))
    assert document["schema_version"] == 1
    measurement = document["measurements"][0]
    assert (measurement["isa"], measurement["batch"], measurement["hardware"]["cpu"]) == (
        "native",
        2,
        fixture_report().hardware.cpu,
    )
    assert measurement["rows"][1]["latency"] == {
        "median_ms": 5,
        "minimum_ms": 4,
        "lower_quartile_ms": 4.6,
        "upper_quartile_ms": 5.5,
        "runs": 9,
    }
    assert measurement["rows"][1]["layers"] == OURS.layers
    assert document["left_out"] == {"avx2_vnni": "this CPU has no avx_vnni"}


def test_the_page_stands_alone_says_it_all_and_escapes_what_it_is_given() -> None:
    report = record()
    page = render(replace(report, source="runs/<mine>"))
    assert not re.search(r"(src|href)=\"http|<script|<mine>|<here>", page)
    for text in (
        "runs/&lt;mine&gt;",
        "1,000,000 parameters",
        "avx2_vnni",
        "brgconv_avx512_I8",
        "ms an image",
        "2 u8, 1 i8, 1 bf16",
    ):
        assert text in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_two_measurements_have_pictures_of_their_own() -> None:
    report = record()
    twice = replace(report, measurements=(report.measurements[0], replace(report.measurements[0], batch=8)))
    page = render(twice)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert page.count('<svg class="chart"') == 4


@pytest.mark.parametrize(("row", "panels"), [(OURS, 2), (replace(OURS, throughput=None), 1)])
def test_the_picture_has_a_panel_for_what_was_measured_and_an_alternative_text(row: SpeedRow, panels: int) -> None:
    report = record(10, row)
    svg = speed_chart(report, report.measurements[0], "chart")
    ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert f"{PQCAD_OPENVINO} 5.00 ms" in svg
    assert svg.count("lower is better") + svg.count("higher is better") == panels
