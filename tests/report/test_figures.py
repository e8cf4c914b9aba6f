"""The charts: what they say to a reader and to a screen reader, and that they follow the page's theme.

Not here: their looks, which want eyes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from report_fixture import fixture_curves, fixture_report, minimal_report

from pqcad_qat.policy.variants import FIXED_BIT, FP32, FP32_HALF, NNCF_INT8, OV_FP32, PQ, PQCAD_OPENVINO
from pqcad_qat.report import figures
from pqcad_qat.report.record import Curves, ProfileRow, Series


@pytest.fixture(scope="module")
def charts() -> dict[str, str]:
    report, curves = fixture_report(), fixture_curves()
    drawn = {
        "quality": figures.quality_latency(report),
        "timeline": figures.bit_timeline(report, curves),
        "distance": figures.weight_distance(curves),
        "losses": figures.loss_curves(curves),
        "time": figures.time_profile(report.profiles),
        "storage": figures.storage_chart(report.storage),
    }
    return {name: svg or "" for name, svg in drawn.items()}


def texts(svg: str) -> list[str]:
    return [re.sub(r"<[^>]+>", "", found).strip() for found in re.findall(r"<text.*?</text>", svg, re.DOTALL)]


def titles(svg: str) -> list[str]:
    return re.findall(r"<title>(.*?)</title>", svg)


def test_every_chart_is_one_well_formed_labelled_image(charts: dict[str, str]) -> None:
    for svg in charts.values():
        root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
        assert root.tag == "svg"
        assert root.attrib["role"] == "img"
        assert len(root.attrib["aria-label"]) > 20


def test_colours_are_the_themes_and_nothing_is_loaded(charts: dict[str, str]) -> None:
    for name, svg in charts.items():
        assert not re.findall(r"#[0-9a-f]{6}", svg), name
        assert "http" not in svg
        assert "var(--ink)" in svg


def test_ids_of_charts_do_not_collide(charts: dict[str, str]) -> None:
    ids = [found for svg in charts.values() for found in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))


def test_references_point_into_their_own_chart(charts: dict[str, str]) -> None:
    for svg in charts.values():
        ids = set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) <= ids


def test_a_chart_is_the_same_each_time(charts: dict[str, str]) -> None:
    assert figures.bit_timeline(fixture_report(), fixture_curves()) == charts["timeline"]


def test_timeline_tells_each_transition_with_its_cause_and_perturbation(charts: dict[str, str]) -> None:
    told = titles(charts["timeline"])
    for move in fixture_report().bit_schedule:
        start = (
            f"step {move.step}: {move.layer} from {move.from_bits} to {move.to_bits} bits, begun at step {move.began}"
        )
        assert sum(tip.startswith(f"{start}, time set by {move.cause}; perturbation 0.") for tip in told) == 1
    assert "110 transitions, 5 by deadline, 105 by momentum" in charts["timeline"]


def test_timeline_ends_at_the_mean_of_the_target_widths(charts: dict[str, str]) -> None:
    assert "4.00" in texts(charts["timeline"])


def test_timeline_stands_without_plan_and_without_curves() -> None:
    report = replace(fixture_report(), layers=())
    assert "time set by deadline" in (figures.bit_timeline(report, Curves()) or "")


def test_timeline_marks_what_a_fixed_schedule_moved() -> None:
    report = fixture_report()
    moves = tuple(replace(move, cause="fixed") for move in report.bit_schedule[:3])
    assert "time set by fixed" in texts(figures.bit_timeline(replace(report, bit_schedule=moves), Curves()) or "")


def test_quality_shows_the_variants_with_both_numbers(charts: dict[str, str]) -> None:
    shown = texts(charts["quality"])
    assert {FP32, FP32_HALF, NNCF_INT8, PQCAD_OPENVINO} <= set(shown)
    assert not {OV_FP32, PQ} & set(shown)


def test_profile_gathers_small_kinds_and_keeps_the_total() -> None:
    rows = tuple(ProfileRow(f"Kind{index}", "bf16", 1.0 / (1 + index), 1) for index in range(14))
    svg = figures.time_profile({PQCAD_OPENVINO: rows}) or ""
    assert "other" in texts(svg)
    assert f"{PQCAD_OPENVINO}: {sum(row.milliseconds for row in rows):.2f} ms" in texts(svg)
    assert sum(title.startswith("Kind") for title in titles(svg)) == 14


def test_losses_draw_over_values_that_a_logarithm_or_json_cannot_hold() -> None:
    series = Series(PQ, "loss", (0, 1, 2, 3), (0.1, None, 0.0, 0.01))
    assert PQ in texts(figures.loss_curves(Curves(losses=(series,))) or "")


def test_names_from_a_model_cannot_break_out_of_a_chart() -> None:
    report = fixture_report()
    move = replace(report.bit_schedule[0], layer='a"<script>&')
    svg = figures.bit_timeline(replace(report, layers=(), bit_schedule=(move,)), Curves()) or ""
    assert "<script" not in svg
    ElementTree.fromstring(svg.replace("xlink:href", "href"))


def test_nothing_to_draw_draws_nothing() -> None:
    report = minimal_report()
    assert figures.quality_latency(report) is None
    assert figures.bit_timeline(report, Curves()) is None
    assert figures.loss_curves(Curves()) is None
    assert figures.weight_distance(Curves()) is None
    assert figures.time_profile({}) is None
    assert figures.storage_chart(()) is None


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("down_blocks.0.resnets.1.conv1", "down_blocks.0"),
        ("conv_in", "conv_in"),
        ("mid_block.resnets.0.conv1", "mid_block"),
    ],
)
def test_layer_group_is_the_block(name: str, group: str) -> None:
    assert figures.layer_group(name) == group


def test_the_distance_of_weights_has_a_line_a_stage_and_says_where_it_ends(charts: dict[str, str]) -> None:
    assert {PQ, FIXED_BIT} <= set(texts(charts["distance"]))
    assert f"pq ends at 0.199, {FIXED_BIT} ends at 0.298" in charts["distance"]
