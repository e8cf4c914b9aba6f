"""Estimates of a run's time: numbers of calls times what was timed, within what the policy gives to training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import POLICIES, FinishedRun, tiny_overrides

from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FIXED_BIT, FP32, FP32_HALF, PQ, PQCAD, PTQ, STEP_COSTS
from pqcad_qat.quantization.learned_rounding import BATCH
from pqcad_qat.report.run_preview import StageSeconds, about, time_ahead
from pqcad_qat.stages.prepared import RANGE_INPUTS, Prepared, prepare
from pqcad_qat.stages.stage_dependencies import recipes, sampling
from pqcad_qat.stages.time_estimate import (
    FOLDER,
    FOUND,
    LEARNING,
    OF_PARAMETER,
    WATCHED,
    Pace,
    estimated_seconds,
    measured_pace,
)

PACE = Pace(full=1.0, quantized=10.0, step=100.0)


@pytest.fixture(scope="module")
def prepared(tiny_policy: Policy) -> Prepared:
    return prepare(tiny_policy)


def estimate(folder: Path, prepared: Prepared, *overrides: str, of: str) -> float:
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(folder, *overrides))
    return estimated_seconds(policy, prepared, list(recipes(policy, prepared)), PACE)[of].most


def test_trajectories_and_images_take_a_call_for_each_of_their_steps(tiny_folder: Path, prepared: Prepared) -> None:
    assert estimate(tiny_folder, prepared, of="calibration") == 4 * 4 * 2  # trajectories, steps, refinement
    assert estimate(tiny_folder, prepared, of=sampling(FP32)) == 8 * 4
    assert estimate(tiny_folder, prepared, of=sampling(FP32_HALF)) == 8 * 2
    assert estimate(tiny_folder, prepared, of=sampling(PQ)) == 8 * 4 * PACE.quantized
    assert estimate(tiny_folder, prepared, of=sampling(PQCAD)) == 8 * 2 * PACE.quantized
    assert estimate(tiny_folder, prepared, "sampler.guidance_scale=2", of=sampling(PQ)) == 2 * 8 * 4 * PACE.quantized


def test_a_variant_that_samples_from_a_graph_of_its_own_takes_its_making_and_openvinos_calls(
    tiny_folder: Path, prepared: Prepared
) -> None:
    images = 1_000_000
    parameters = sum(parameter.numel() for parameter in prepared.model.denoiser.parameters())
    expected = images * 2 * PACE.full / 3 + FOLDER + OF_PARAMETER * parameters
    found = estimate(tiny_folder, prepared, f"evaluation.images={images}", of=sampling(PQCAD))
    assert found == pytest.approx(expected)


def test_training_takes_its_steps_or_its_share_of_the_minutes(tiny_folder: Path, prepared: Prepared) -> None:
    images = 1 * (4 * 4 * PACE.quantized + 4 * PACE.full)  # of four sets of weights, and full precision's own
    assert estimate(tiny_folder, prepared, of=FIXED_BIT) == 9 * 100 + images
    found = ("progressive.steps=auto", "training.max_steps=50")
    # two stages have explicit numbers of steps, so two share the minutes
    assert estimate(tiny_folder, prepared, *found, "training.minutes=10", of=PQ) == 60 * 10 / 2 + images
    assert estimate(tiny_folder, prepared, *found, "training.minutes=1000", of=PQ) == 50 * 100 + images
    assert estimate(tiny_folder, prepared, *found, "training.minutes=null", of=PQ) == 50 * 100 + images


def test_a_stage_that_ends_by_itself_is_expected_to_take_what_others_took(
    tiny_folder: Path, prepared: Prepared
) -> None:
    def found(*overrides: str) -> StageSeconds:
        settings = ("progressive.steps=auto", "training.minutes=null", *overrides)
        policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, *settings))
        return estimated_seconds(policy, prepared, list(recipes(policy, prepared)), PACE)[PQ]

    many, few = found("training.max_steps=2000"), found("training.max_steps=50")
    assert many.most - many.expected == (2000 - FOUND[PQ]) * 100
    assert few.most == few.expected < many.expected
    given = estimated_seconds(load_policy(POLICIES / "smoke.yaml"), prepared, [PQ], PACE)[PQ]
    assert given.most == given.expected


def test_a_control_that_is_pq_itself_takes_no_time(tiny_folder: Path, prepared: Prepared) -> None:
    alike = replace(prepared, plan=tuple(replace(layer, ladder=(layer.weights.bits,)) for layer in prepared.plan))
    assert estimate(tiny_folder, alike, of=FIXED_BIT) == 0
    assert estimate(tiny_folder, alike, of=PQ) == estimate(tiny_folder, prepared, of=PQ) > 0


def test_what_layers_read_is_watched_once_by_the_first_stage_that_is_to_do(
    tiny_policy: Policy, prepared: Prepared
) -> None:
    ranges = 2 * RANGE_INPUTS * PACE.full
    both = estimated_seconds(tiny_policy, prepared, [STEP_COSTS, PTQ], PACE)
    assert both[PTQ].expected == 0  # rounded each by itself
    assert both[STEP_COSTS].expected > ranges
    assert estimated_seconds(tiny_policy, prepared, [PTQ], PACE)[PTQ].expected == ranges
    assert estimated_seconds(tiny_policy, prepared, ["evaluation"], PACE)["evaluation"].most == 0


def test_gptq_takes_half_a_call_for_each_pass(tiny_folder: Path, prepared: Prepared) -> None:
    few, many = (
        estimate(tiny_folder, prepared, "post_training.rounding=gptq", "post_training.states=10", more, of=PTQ)
        for more in ("post_training.passes=2", "post_training.passes=12")
    )
    assert many - few == pytest.approx(10 / 2 * 10 * PACE.quantized)


def test_learned_rounding_takes_its_steps_and_watches_each_block(tiny_folder: Path, prepared: Prepared) -> None:
    few, many, of_more_states = (
        estimate(tiny_folder, prepared, "post_training.rounding=learned", *more, of=PTQ)
        for more in (
            ("post_training.steps=10",),
            ("post_training.steps=12",),
            ("post_training.steps=10", "post_training.states=34"),
        )
    )
    assert many - few == pytest.approx(2 * BATCH * LEARNING * PACE.quantized)
    # in place of smoke's 32 states
    assert of_more_states - few == pytest.approx(2 * (WATCHED * PACE.quantized + PACE.full))


def test_a_training_step_is_timed_only_where_something_trains(tiny_policy: Policy, prepared: Prepared) -> None:
    pace = measured_pace(tiny_policy, prepared, [PQ])
    assert min(pace.full, pace.quantized, pace.step or 0) > 0
    assert measured_pace(tiny_policy, prepared, ["calibration", PTQ]).step is None


def test_a_run_tells_its_time_before_its_first_stage(tiny_run: FinishedRun) -> None:
    told = tiny_run.output.index("the stages to do take about")
    assert told < tiny_run.output.index("calibration:") < tiny_run.output.index("had been expected")


def test_times_are_told_in_minutes_and_hours() -> None:
    assert [about(seconds) for seconds in (1, 89, 3600, 7200)] == ["a minute", "1 min", "60 min", "2.0 h"]
    assert time_ahead([StageSeconds(60, 60), StageSeconds(180, 1800)]) == (
        "the stages to do take about 4 min on this machine, and 31 min at most: training ends by itself"
    )
    assert "at most" not in time_ahead([StageSeconds(60, 60)])
