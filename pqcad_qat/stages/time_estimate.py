"""Estimates of the wall time that each stage of a run takes, from a few calls of its model that are timed beforehand.

Almost all of a run's time goes into calls of the denoiser, in full precision or with simulated quantizers, and into
training steps. So a stage's estimate is the number of its calls times the time of one on this machine, or the time that
the policy gives its training. What libraries do beside that is estimated by a few constants.

Not here: the disk space of stages (disk_use.py), and what they cost when they are done (timing/stage_costs.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from time import monotonic

import torch
from torch import nn

from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.models.denoiser import DenoiserInput, predict
from pqcad_qat.models.untrained import noise_inputs
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import (
    FIXED_BIT,
    FLOAT_STEPS,
    OPENVINO,
    PQ,
    PTQ,
    REFERENCE,
    STEP_COSTS,
    STUDENTS,
    TRAINED,
    VARIANTS,
    stages_of,
)
from pqcad_qat.quantization.conversion import frozen_weights, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import set_input_range
from pqcad_qat.quantization.learned_rounding import BATCH
from pqcad_qat.quantization.quantizable_layers import parameter_count
from pqcad_qat.report.run_preview import StageSeconds
from pqcad_qat.stages import held_out_images
from pqcad_qat.stages.float_steps import measured, students_sampled
from pqcad_qat.stages.fresh_images import IMAGES
from pqcad_qat.stages.int8_sampler import in_int8
from pqcad_qat.stages.prepared import RANGE_INPUTS, Prepared, calibration_recipe
from pqcad_qat.stages.stage_dependencies import BASELINE_INPUTS, control_is_pq, most_steps, sampling, training_steps
from pqcad_qat.stages.step_costs import POINTS
from pqcad_qat.stages.train import whole_batch
from pqcad_qat.timing.baseline_trials import NNCF_SETTINGS
from pqcad_qat.training.callback import Batch, with_condition
from pqcad_qat.training.quantization_aware import FullPrecisionMatching
from pqcad_qat.training.rate_search import FIRST, RATES
from pqcad_qat.training.short_training import step_seconds

SECONDS = 0.5
"""Time for which calls are timed: as many states in one call as it allows."""

TRIALS = 4
"""Number of float steps that are usually tried, none among them, in each sampler's steps."""

CANDIDATES = 4
"""Number of sets of weights of which a training stage samples images at its end."""

LEARNING, WATCHED = 6, 3
"""Where rounding is learned: calls that a step of one state takes as long as, and calls for each state that blocks
learn from (finished_blocks.py).
"""

FOUND: Mapping[str, int] = {PQ: 600, FIXED_BIT: 600, **dict.fromkeys(STUDENTS, 250)}
"""Numbers of training steps, trials of the learning rate among them, after which stages that find them by themselves
have ended as a rule (NOTES.md).
"""

COLUMN, COLUMN_OF_OUTPUT = 5e-4, 2e-6
"""Seconds for which GPTQ works on one column of a weight: in any case, and for each output."""

FOLDER, BASELINES, TIMING = 10.0, 20.0, 8.0
"""Seconds of libraries' work on a small model: to export and prove a folder, to make the baselines, to time them."""

OF_PARAMETER = 1.5e-6
"""Seconds that each of these takes more for each parameter."""


@dataclass(frozen=True)
class Pace:
    """Times on this machine, in seconds.

    Attributes:
        full: of one state in a call of the full-precision denoiser.
        quantized: the same with simulated quantizers and frozen weights.
        step: of one training step at the target widths; None where nothing is trained.
    """

    full: float
    quantized: float
    step: float | None


def measured_pace(policy: Policy, prepared: Prepared, to_do: Collection[str]) -> Pace:
    """Time the calls that the stages to do are made of, on noise."""
    model, most = _simulated(prepared), policy.calibration.batch_size
    full = _call_seconds(prepared, prepared.model.denoiser, most)
    with frozen_weights(model):
        quantized = _call_seconds(prepared, model, most)
    trains = not set(TRAINED).isdisjoint(to_do)
    return Pace(full, quantized, _step_seconds(policy, prepared, model) if trains else None)


def estimated_seconds(
    policy: Policy, prepared: Prepared, to_do: Collection[str], pace: Pace
) -> dict[str, StageSeconds]:
    """The wall time of each of the stages to do."""
    estimate = _Estimate(policy, prepared, pace)
    seconds = {stage: estimate.of(stage) for stage in to_do}
    # what layers read is watched once, by the first stage that quantizes the model
    first = next((stage for stage in seconds if stage in (STEP_COSTS, PTQ) or estimate.tries_float_steps(stage)), None)
    if first is not None:
        seconds[first] += 2 * RANGE_INPUTS * pace.full
    more = {stage: estimate.more_training(stage) for stage in seconds}
    return {stage: StageSeconds(expected, expected + more[stage]) for stage, expected in seconds.items()}


class _Estimate:
    """Estimates of one run's stages."""

    def __init__(self, policy: Policy, prepared: Prepared, pace: Pace) -> None:
        self.policy, self.prepared, self.pace = policy, prepared, pace
        self.steps, self.student_steps = policy.sampler.steps, policy.distillation.student_steps
        self.calls = 1 if policy.sampler.guidance_scale == 1.0 else 2  # of a sampling step
        self.images = min(IMAGES, policy.calibration.trajectories)
        self.parameters = parameter_count(prepared.model.denoiser)

    def tries_float_steps(self, stage: str) -> bool:
        return stage == FLOAT_STEPS and measured(self.policy, self.prepared.schedule)

    def of(self, stage: str) -> float:
        """Seconds of a stage."""
        if stage in TRAINED:
            return self.training(stage)
        if stage.startswith("export-"):
            return self.folder()
        if stage.startswith(sampling("")):
            return self.sampling(stage.removeprefix(sampling("")))
        known: Mapping[str, Callable[[], float]] = {
            "calibration": self.calibration,
            FLOAT_STEPS: self.float_steps,
            STEP_COSTS: self.step_costs,
            PTQ: self.post_training,
            "teacher": self.teacher,
            "baselines": self.baselines,
            "benchmark": self.benchmark,
        }
        return known[stage]() if stage in known else 0.0

    def calibration(self) -> float:
        recipe = calibration_recipe(self.policy, self.prepared)
        schedule = self.prepared.schedule
        fine = schedule.finer(schedule.passing(recipe.steps, recipe.also), recipe.refinement)
        return recipe.trajectories * sum(map(len, fine)) * self.calls * self.pace.full

    def float_steps(self) -> float:
        if not self.tries_float_steps(FLOAT_STEPS):
            return 0.0
        steps = self.steps + (self.student_steps if students_sampled(self.policy) else 0)
        return self.images * steps * self.calls * (TRIALS * self.pace.quantized + 2 * self.pace.full)

    def step_costs(self) -> float:
        """Each of the points follows the rest of the steps, which are half of them on average."""
        points = min(POINTS, self.steps)
        return (
            self.images * self.calls * (points * self.pace.quantized + (points + 2) * self.steps / 2 * self.pace.full)
        )

    def post_training(self) -> float:
        section = self.policy.post_training
        if section.rounding == "nearest":
            return 0.0
        if section.rounding == "learned":
            calls = section.steps * BATCH * LEARNING + section.states * WATCHED
            return calls * self.pace.quantized + section.states * self.pace.full
        shapes = [self.prepared.split.get_parameter(f"{layer.name}.weight").shape for layer in self.prepared.plan]
        columns = sum(shape[1:].numel() * (COLUMN + COLUMN_OF_OUTPUT * shape[0]) for shape in shapes)
        # a pass ends at its last layer, so on average it is half a call
        return columns + section.states * (section.passes + 1) / 2 * self.pace.quantized

    def training(self, stage: str) -> float:
        """Its training steps, and the images of the sets of weights that it may keep."""
        if stage == FIXED_BIT and control_is_pq(self.policy, self.prepared):
            return 0.0
        images = min(held_out_images.IMAGES, max(1, self.policy.calibration.trajectories // 8))
        own = self.policy.sampling_steps(stage) * CANDIDATES * self.pace.quantized
        return self.seconds_of_steps(stage, FOUND) + images * self.calls * (own + self.steps * self.pace.full)

    def seconds_of_steps(self, stage: str, found: Mapping[str, int]) -> float:
        """Seconds of a stage's training steps, which are `found` where it finds their number by itself."""
        policy, most, step = self.policy, most_steps(self.policy, stage), self.pace.step or 0.0
        if training_steps(policy, stage) is not None:
            return most * step
        seconds = min(most, found.get(stage, most)) * step
        if policy.training.minutes is None:
            return seconds
        stages = [name for name in TRAINED if name in stages_of(policy.variants)]
        automatic = [name for name in stages if training_steps(policy, name) is None]
        return min(seconds, 60 * policy.training.minutes / len(automatic))

    def more_training(self, stage: str) -> float:
        """Seconds that a stage takes beyond what is expected, if its training does not end by itself."""
        if stage not in TRAINED or not self.training(stage):
            return 0.0
        return self.seconds_of_steps(stage, {}) - self.seconds_of_steps(stage, FOUND)

    def teacher(self) -> float:
        targets = self.policy.calibration.trajectories * self.steps * self.calls * self.pace.quantized
        return targets + self.step_costs() * self.student_steps / self.steps

    def baselines(self) -> float:
        return BASELINES + 3 * OF_PARAMETER * self.parameters + len(NNCF_SETTINGS) * BASELINE_INPUTS * self.pace.full

    def benchmark(self) -> float:
        timed = [name for name in self.policy.variants if VARIANTS[name].runtime == OPENVINO or name == REFERENCE]
        return TIMING + len(timed) * self.policy.export.latency_runs * self.pace.full

    def sampling(self, variant: str) -> float:
        """Images of a variant; OpenVINO takes about a third of PyTorch's time."""
        spec, own_graph = VARIANTS[variant], in_int8(self.policy, self.prepared, variant)
        of_call = self.pace.quantized if spec.quantized else self.pace.full
        if spec.runtime == OPENVINO or own_graph:
            of_call = self.pace.full / 3
        calls = self.policy.evaluation.images * self.policy.sampling_steps(variant) * self.calls
        return calls * of_call + (self.folder() if own_graph else 0.0)

    def folder(self) -> float:
        """Writing and proving of a folder."""
        return FOLDER + OF_PARAMETER * self.parameters


def _simulated(prepared: Prepared) -> nn.Module:
    """A quantized copy whose ranges are none in particular: they do not change the time of a call."""
    plan = [
        replace(layer, ladder=(layer.weights.bits,), weights=replace(layer.weights, range="min_max"))
        for layer in prepared.plan
    ]
    model = quantize_model(copy.deepcopy(prepared.split), plan)
    for layer in quantized_layers(model).values():
        if layer.plan.input_group == layer.plan.name:
            set_input_range(layer, -4.0, 4.0)
    return model.eval()


def _inputs(prepared: Prepared, count: int) -> DenoiserInput:
    x_t, t, _ = noise_inputs(prepared.model, count)
    return x_t, t, prepared.conditions.drawn(0, 0, count)


@torch.no_grad()
def _call_seconds(prepared: Prepared, denoiser: nn.Module, most: int) -> float:
    """Seconds of one state, in calls of at most so many."""

    x_t, t, condition = _inputs(prepared, most)

    def seconds(count: int) -> float:
        begun = monotonic()
        # the result is on the CPU, so the call is over
        predict(denoiser.eval(), x_t[:count], t[:count], {name: value[:count] for name, value in condition.items()})
        return monotonic() - begun

    with on_accelerator(denoiser):
        seconds(1)  # which may compile kernels
        count = max(1, min(most, int(SECONDS / max(seconds(1), 1e-6))))
        if count > 1:
            seconds(count)
        return min(seconds(count), seconds(count)) / count


def _step_seconds(policy: Policy, prepared: Prepared, model: nn.Module) -> float | None:
    """Seconds of one training step of the whole batch."""
    count = whole_batch(policy.training)
    x_t, t, condition = _inputs(prepared, count)
    states: Batch = {"x_t": x_t, "t": t, "target": torch.zeros_like(x_t), "weight": torch.ones(count)}
    batch, losses = with_condition(states, condition), [FullPrecisionMatching()]
    with torch.random.fork_rng():
        return step_seconds(model, losses, lambda _: batch, RATES[FIRST], training=policy.training)
