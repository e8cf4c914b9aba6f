"""From a run's facts to its report: the arithmetic of rows, targets and storage, on facts that were changed by hand.

Not here: how the facts were measured (test_run.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import POLICIES, FinishedRun

from pqcad_qat.commands.run import prepare
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import (
    FIXED_BIT,
    FP32,
    FP32_HALF,
    IN_INT8,
    NNCF_INT8,
    OPENVINO,
    OV_BF16,
    OV_FP32,
    PQ,
    PQ_DISTILLED,
    PQ_HALF,
    PQCAD,
    PQCAD_OPENVINO,
    PTQ_OPENVINO,
    PYTORCH,
    SIMULATED,
    TRAINED,
    exporting,
)
from pqcad_qat.quantization.plan_facts import float_layers
from pqcad_qat.report.page import headlines, render_page
from pqcad_qat.report.record import Curves, Report, Target, Throughput, Timing
from pqcad_qat.report.report_files import from_json, to_json
from pqcad_qat.stages.report_rows import RunFacts, curves_of, report_of
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_records import (
    BaselinesRecord,
    BenchmarkRecord,
    EvaluationRecord,
    ExportRecord,
    FloatStepsRecord,
    SamplesRecord,
    TrainingRecord,
)
from pqcad_qat.training.stage_end import StageEnd

MEDIANS = {
    FP32: 40.0,
    OV_FP32: 20.0,
    OV_BF16: 10.0,
    NNCF_INT8: 8.0,
    PQCAD_OPENVINO: 5.0,
}  # milliseconds a step
DISTANCES = {FP32: 10.0, FP32_HALF: 14.0, FIXED_BIT: 11.0, PQ: 11.1, PQ_DISTILLED: 13.0, PQCAD: 10.5}
DECIBELS = {FP32_HALF: 20.0, FIXED_BIT: 30.0, PQ: 31.0, PQ_HALF: 23.0, PQ_DISTILLED: 26.0, PQCAD: 25.0}


@pytest.fixture(scope="module")
def facts(tiny_run: FinishedRun) -> RunFacts:
    """The tiny run's facts with timings and distances of a whole number or two."""
    folder = RunFolder(tiny_run.path)
    prepared = prepare(tiny_run.policy)
    evaluation, benchmark = folder.read("evaluation", EvaluationRecord), folder.read("benchmark", BenchmarkRecord)
    assert evaluation is not None
    assert benchmark is not None
    figures = {
        name: replace(found, fid_real=DISTANCES.get(name, found.fid_real), psnr_fp=DECIBELS.get(name, found.psnr_fp))
        for name, found in evaluation.figures.items()
    }
    return RunFacts(
        policy=tiny_run.policy,
        plan=prepared.plan,
        model=prepared.split,
        walks=(prepared.schedule.walk(4), prepared.student_schedule(tiny_run.policy).walk(2)),
        float_steps=FloatStepsRecord(),
        evaluation=replace(evaluation, figures=figures),
        widths=None,
        progressive=folder.read(PQ, TrainingRecord),
        exports={PQCAD: read_export(folder)},
        baselines=folder.read("baselines", BaselinesRecord),
        benchmark=replace(benchmark, timings={name: steady(median) for name, median in MEDIANS.items()}),
        samples={FIXED_BIT: SamplesRecord(4, IN_INT8)},
        ends=ends_of(folder),
        seconds=folder.seconds(),
        warnings=("a warning",),
        command="command",
    )


def read_export(folder: RunFolder) -> ExportRecord:
    record = folder.read(exporting(PQCAD), ExportRecord)
    assert record is not None
    return record


def ends_of(folder: RunFolder) -> dict[str, StageEnd]:
    records = {stage: folder.read(stage, TrainingRecord) for stage in TRAINED}
    return {stage: record.end for stage, record in records.items() if record is not None and record.end is not None}


def steady(median: float) -> Timing:
    """A timing whose quartiles lie a tenth apart."""
    return Timing(median, 1.0, 0.95 * median, 1.05 * median, runs=5)


def changed(facts: RunFacts, stage: str, **facts_of_stage: Any) -> RunFacts:
    return replace(facts, **{stage: replace(getattr(facts, stage), **facts_of_stage)})


def targets(report: Report) -> Mapping[str, Target]:
    return {goal.name: goal for goal in report.targets}


def test_rows_hold_milliseconds_a_step_times_steps(facts: RunFacts) -> None:
    rows = {row.name: row for row in report_of(facts).variants}
    assert (rows[FP32].latency_ms_per_step, rows[FP32].latency_ms_per_image) == (40.0, 160.0)
    assert (rows[FP32_HALF].latency_ms_per_step, rows[FP32_HALF].latency_ms_per_image) == (40.0, 80.0)
    assert (rows[PQCAD_OPENVINO].latency_ms_per_step, rows[PQCAD_OPENVINO].latency_ms_per_image) == (5.0, 10.0)
    assert rows[PQ].latency_ms_per_step is None


def test_a_row_names_what_computed_its_images(facts: RunFacts) -> None:
    rows = {row.name: row.runtime for row in report_of(facts).variants}
    assert (rows[FP32], rows[FIXED_BIT], rows[PQ], rows[PQCAD_OPENVINO]) == (PYTORCH, IN_INT8, SIMULATED, OPENVINO)


def test_a_step_of_a_batch_is_shared_by_its_images(facts: RunFacts) -> None:
    export = facts.policy.export.model_copy(update={"batch_size": 4})
    batched = replace(facts, policy=facts.policy.model_copy(update={"export": export}))
    rows = {row.name: row for row in report_of(batched).variants}
    assert (rows[FP32].latency_ms_per_step, rows[FP32].latency_ms_per_image) == (10.0, 40.0)


def test_mean_bits_are_weighted_by_parameters(facts: RunFacts) -> None:
    pq = next(row for row in report_of(facts).variants if row.name == PQ)
    total = sum(layer.parameters for layer in facts.plan)
    assert pq.weight_bits == round(sum(layer.weights.bits * layer.parameters for layer in facts.plan) / total, 2)
    assert pq.activation_bits == 8


def test_targets_compare_what_the_project_promised(facts: RunFacts) -> None:
    goals = targets(report_of(facts))
    measured = {name: (goal.measured, goal.comparison, goal.bound, goal.holds) for name, goal in goals.items()}
    layers = len(facts.plan)
    assert measured["planned layers that executed in INT8"] == (layers, "==", layers, True)
    assert measured["layers whose integers equal PyTorch's"] == (layers, "==", layers, True)
    assert measured[f"milliseconds an image: {PQCAD_OPENVINO} / {OV_BF16}"] == (10 / 40, "<=", 0.45, True)
    assert measured[f"milliseconds an image: {PQCAD_OPENVINO} / {OV_FP32}"] == (10 / 80, "<=", 0.20, True)
    assert measured[f"milliseconds an image: {PQCAD_OPENVINO} / fp32"] == (10 / 160, "<=", 0.10, True)
    assert measured["Frechet distance to real: pqcad / fp32"] == (10.5 / 10, "<=", 1.10, True)
    assert measured[f"Frechet distance to real: pqcad / {FP32_HALF}"] == (10.5 / 14, "<=", 0.95, True)
    assert measured[f"Frechet distance to real: pqcad / {PQ_DISTILLED}"] == (10.5 / 13, "<=", 0.95, True)
    assert measured[f"Frechet distance to real: pq / {FIXED_BIT}"] == (11.1 / 11, "<=", 1.02, True)
    assert measured[f"bytes packed: {PQCAD_OPENVINO} / fp32"][1:3] == ("<=", 0.16)
    for others, decibels, holds in ((FP32_HALF, 5, True), (PQ_HALF, 2, True), (PQ_DISTILLED, -1, False)):
        name = f"PSNR to full precision: pqcad - {others}"
        assert measured[name] == (decibels, ">=", -0.1, holds)
    assert measured[f"PSNR to full precision: pq - {FIXED_BIT}"] == (1, ">=", -0.1, True)
    assert len(goals) == 14


def test_a_target_that_is_missed_says_so_as_it_is(facts: RunFacts) -> None:
    found = facts.evaluation.figures
    figures = {**found, PQCAD: replace(found[PQCAD], fid_real=20.0)}
    goal = targets(report_of(changed(facts, "evaluation", figures=figures)))["Frechet distance to real: pqcad / fp32"]
    assert (goal.measured, goal.holds) == (2.0, False)


def test_a_layer_that_left_int8_lowers_the_count_and_is_named(facts: RunFacts) -> None:
    found = facts.exports[PQCAD]
    export = replace(found, precisions={**found.precisions, "conv_out": "bf16"})
    report = report_of(replace(facts, exports={PQCAD: export}))
    assert report.execution is not None
    assert report.execution.planned - report.execution.executed_int8 == 1
    assert report.execution.float_layers == ("conv_out", *float_layers(facts.model, facts.plan))
    assert targets(report)["planned layers that executed in INT8"].holds is False
    assert next(row for row in report.layers if row.layer == "conv_out").executed == "bf16"


def test_at_two_bits_progressive_quantization_has_to_be_clearly_better(facts: RunFacts) -> None:
    policy = facts.policy.model_copy(update={"targets": load_policy(POLICIES / "w2a8.yaml").targets})
    goal = targets(report_of(replace(facts, policy=policy)))[f"Frechet distance to real: pq / {FIXED_BIT}"]
    assert (goal.bound, goal.holds) == (0.95, False)


def test_a_policys_own_targets_are_of_a_figure_or_of_two(facts: RunFacts) -> None:
    wanted = (
        f"targets.sharp={{metric: psnr, variant: {PQ}, at_least: 31.5}}",
        f"targets.small={{metric: bytes, variant: {PQCAD_OPENVINO}, against: fp32, at_most: 2}}",
        f"targets.absent={{metric: psnr, variant: {PTQ_OPENVINO}, at_least: 1}}",
        "targets.student=null",
    )
    policy = load_policy(POLICIES / "smoke.yaml", wanted)
    goals = targets(report_of(replace(facts, policy=facts.policy.model_copy(update={"targets": policy.targets}))))
    assert (goals["PSNR to full precision: pq"].measured, goals["PSNR to full precision: pq"].holds) == (31, False)
    assert goals["PSNR to full precision: pq"].unit == "dB"
    assert goals[f"bytes: {PQCAD_OPENVINO} / fp32"].holds
    assert not any(PTQ_OPENVINO in name.split() for name in goals)
    assert "Frechet distance to real: pqcad / fp32" not in goals


def test_without_native_bfloat16_there_is_no_row_and_a_target_that_was_not_measured(facts: RunFacts) -> None:
    timings = {name: value for name, value in facts.benchmark.timings.items() if name != OV_BF16}
    report = report_of(changed(facts, "benchmark", timings=timings))
    assert OV_BF16 not in [row.name for row in report.variants]
    goal = targets(report)[f"milliseconds an image: {PQCAD_OPENVINO} / {OV_BF16}"]
    assert (goal.measured, goal.holds) == (None, None)
    assert goal.note == f"the arithmetic of {OV_BF16} is not native on this CPU"


def test_a_target_that_rests_on_unsteady_times_is_not_measured_and_its_headline_is_left_out(facts: RunFacts) -> None:
    wide = replace(steady(435.0), lower_quartile_ms=306.0, upper_quartile_ms=1228.0)
    report = report_of(changed(facts, "benchmark", timings={**facts.benchmark.timings, OV_FP32: wide}))
    assert report.unsteady == {OV_FP32}
    goal = targets(report)[f"milliseconds an image: {PQCAD_OPENVINO} / {OV_FP32}"]
    assert (goal.measured, goal.holds, goal.note) == (
        None,
        None,
        f"the times of {OV_FP32} are unsteady: their quartiles lie too far apart",
    )
    assert targets(report)[f"milliseconds an image: {PQCAD_OPENVINO} / fp32"].holds
    told = {tile.meaning for tile in headlines(report)}
    assert "faster than OpenVINO FP32" not in told
    assert {"faster than PyTorch FP32", "faster than OpenVINO BF16"} <= told
    half = report_of(changed(facts, "benchmark", timings={**facts.benchmark.timings, FP32: wide}))
    assert half.unsteady == {FP32, FP32_HALF}


def test_how_wide_is_too_wide() -> None:
    assert not Timing(100.0, 80.0, 90.0, 110.0, 50).unsteady
    assert Timing(100.0, 80.0, 89.9, 110.0, 50).unsteady
    assert Throughput(100.0, 120.0, 80.0, 120.0, 5, 8, 1).unsteady


def test_a_baseline_that_died_is_a_row_without_figures_that_says_why(facts: RunFacts) -> None:
    died = {NNCF_INT8: "its process died of SIGSEGV", OV_FP32: "no"}
    report = report_of(changed(facts, "baselines", died=died))
    row = next(row for row in report.variants if row.name == NNCF_INT8)
    assert (row.did_not_run, row.steps, row.weight_bits) == ("its process died of SIGSEGV", 4, 8)
    assert {row.size_bytes, row.latency_ms_per_step, row.latency_ms_per_image, row.fid_fp, row.psnr_fp} == {None}
    goal = targets(report)[f"milliseconds an image: {PQCAD_OPENVINO} / {OV_FP32}"]
    assert (goal.measured, goal.holds, goal.note) == (None, None, f"{OV_FP32} did not run")
    page = render_page(report, Curves(), {})
    assert "did not run: its process died of SIGSEGV" in page
    assert from_json(to_json(report))[0] == report


def test_storage_counts_every_parameter_once(facts: RunFacts) -> None:
    report = report_of(facts)
    weights = sum(facts.model.get_parameter(f"{layer.name}.weight").numel() for layer in facts.plan)
    parameters = sum(parameter.numel() for parameter in facts.model.parameters())
    assert sum(row.weights_bytes for row in report.storage) == weights
    assert sum(row.float_bytes for row in report.storage) == 4 * (parameters - weights)


def test_packed_storage_halves_the_layers_of_four_bits(facts: RunFacts) -> None:
    export = facts.policy.export.model_copy(update={"weights": "packed"})
    packed = report_of(replace(facts, policy=facts.policy.model_copy(update={"export": export})))
    sizes = [(facts.model.get_parameter(f"{layer.name}.weight").numel(), layer.weights.bits) for layer in facts.plan]
    assert sum(row.weights_bytes for row in packed.storage) == sum(
        -(-count // 2) if bits <= 4 else count for count, bits in sizes
    )


def test_every_layer_is_listed_with_what_became_of_it(facts: RunFacts) -> None:
    rows = report_of(facts).layers
    kept = float_layers(facts.model, facts.plan)
    assert [row.layer for row in rows] == [*(layer.name for layer in facts.plan), *kept]
    assert all(row.executed in ("i8", "u8") and row.exact for row in rows if row.layer not in kept)
    assert all(
        (row.weight_bits, row.planned_execution, row.exact) == (None, "float", None)
        for row in rows
        if row.layer in kept
    )


def test_a_log_without_rows_has_curves_without_points(tiny_run: FinishedRun, tmp_path: Path) -> None:
    """That of a stage whose process was killed after its last step, before its weights were chosen."""
    for stage in TRAINED:
        (tmp_path / f"{stage}.jsonl").write_text("")
    curves = curves_of(tiny_run.policy, tmp_path)
    assert {series.values for series in (*curves.losses, *curves.paces, *curves.distances)} <= {()}


def test_curves_are_what_training_logged(tiny_run: FinishedRun) -> None:
    ends = ends_of(RunFolder(tiny_run.path))
    curves = curves_of(tiny_run.policy, tiny_run.path / "logs", ends)
    assert {(series.stage, series.name) for series in curves.losses} == {
        *((stage, "held_out") for stage in TRAINED),
        (PQ, "full_precision"),
        (FIXED_BIT, "full_precision"),
        (PQ_DISTILLED, "teacher"),
        (PQCAD, "teacher"),
        (PQCAD, "calibration"),
    }
    assert [series.name for series in curves.paces] == ["pace", "weight_change", "mean_bits", "blend_lambda"]
    logged = [json.loads(line) for line in (tiny_run.path / "logs" / "pqcad.jsonl").read_text().splitlines()]
    series = next(series for series in curves.losses if (series.stage, series.name) == (PQCAD, "calibration"))
    assert series.steps == tuple(row["step"] for row in logged)
    assert series.values == tuple(row["loss/calibration"] for row in logged)
    held_out = next(series for series in curves.losses if (series.stage, series.name) == (PQCAD, "held_out"))
    assert held_out.steps == (0, len(logged))  # fewer than ten training steps: the start and the end
    assert held_out.values == (ends[PQCAD].held_out["start"], logged[-1]["held_out"])


def test_the_report_says_how_every_training_stage_ended(facts: RunFacts) -> None:
    assert report_of(facts).training == facts.ends
    assert list(facts.ends) == list(TRAINED)
    for end in facts.ends.values():
        assert end.cause == "steps"
        assert end.images[end.kept] == max(found for found in end.images.values() if found is not None)
