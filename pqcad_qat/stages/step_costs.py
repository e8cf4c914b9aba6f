"""The stage `step-costs`: what an error of the prediction at each sampling step costs in the image.

An error at one step moves the next state, and all later steps carry it on. How much of it is left in the image differs
between steps by factors of ten to several hundred, and not as the signal-to-noise ratio does. So it is measured: full
precision samples, one of its predictions is moved a little in the direction of a quantized model's error there, and
full precision goes on from there. The cost is the squared change of the image divided by the squared change of the
prediction. Training weighs its states by the root of it, halfway between what counts and what keeps gradients steady.

Not here: how training uses the weights (training/quantization_aware.py, training/distillation.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import PQ, STEP_COSTS, stages_of
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.quantization.plan import evaluating
from pqcad_qat.sampling.ddpm_schedule import Walk
from pqcad_qat.sampling.trajectory import NoiseSchedule, along, landing
from pqcad_qat.stages.fresh_images import Follow, fresh_follow, fresh_noise
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_records import StepCostsRecord

POINTS = 10
"""Largest number of sampling steps of one sampler at which they are measured; those between are interpolated."""

SMALL = 0.1
"""Largest size of a change, relative to the prediction: larger ones would leave the range in which costs add up."""

POWER = 0.5
"""Power of the cost by which training weighs a state. By the cost itself a few states of a batch decide its gradient,
and as many training steps bring less (NOTES.md).
"""

Costs = tuple[tuple[float, float], ...]
"""Pairs of a time and the cost of an error there."""


def measure_step_costs(
    policy: Policy, prepared: Prepared, run: RunFolder, console: Console, *, untrained: QuantizedModels
) -> StepCostsRecord:
    """Stage `step-costs`: measure the costs in the steps of the sampler, before anything is trained."""
    if STEP_COSTS not in stages_of(policy.variants):
        return StepCostsRecord()
    with run.stage(STEP_COSTS) as stage:
        if stage.new:
            with working(console, "step-costs: what an error at each sampling step costs"):
                costs = step_costs(policy, prepared, untrained.at_targets(), variant=PQ)
            stage.done(StepCostsRecord(costs))
    return run.read_always(STEP_COSTS, StepCostsRecord)


@torch.no_grad()
def step_costs(policy: Policy, prepared: Prepared, model: nn.Module, *, variant: str) -> Costs:
    """(t, cost) at up to POINTS of the sampling steps of a variant, in the directions of this quantized model's errors.

    The noise is such as no trajectory of the calibration set begins with.
    """
    schedule = prepared.sampled_by(policy, variant)
    walk, noise = schedule.walk(policy.sampling_steps(variant)), fresh_noise(policy, prepared)
    denoisers = prepared.model.denoiser, model
    full, quantized = (fresh_follow(policy, prepared, denoiser) for denoiser in denoisers)
    with evaluating(denoisers[0]), evaluating(model), on_accelerator(*denoisers), frozen_weights(model):
        states = [noise, *(step.x_s for step in along(walk, full, noise, schedule))]
        places = sorted({round(place) for place in np.linspace(0, len(walk) - 1, min(POINTS, len(walk)))})
        sampler = schedule, walk
        measured = [(walk[place][0], _cost(states, place, full, quantized, sampler=sampler)) for place in places]
    # a step without any effect on the image costs as little as the cheapest that has one
    least = min((cost for _, cost in measured if cost > 0), default=1.0)
    return tuple((t, max(cost, least)) for t, cost in measured)


def _cost(
    states: Sequence[Tensor], place: int, full: Follow, quantized: Follow, *, sampler: tuple[NoiseSchedule, Walk]
) -> float:
    """Squared change of the images, relative to the squared change of the prediction at one step."""
    schedule, walk = sampler
    t, s = walk[place]
    prediction = full(states[place], t)
    change = quantized(states[place], t) - prediction
    size = float(change.square().mean().sqrt())
    if not size or not math.isfinite(size):
        return 0.0
    change = change * min(1.0, SMALL * float(prediction.square().mean().sqrt()) / size)
    x = landing(walk[place + 1 :], full, schedule.step(prediction + change, states[place], t, s), schedule)
    cost = float((x - states[-1]).square().mean() / change.square().mean())
    return cost if math.isfinite(cost) else 0.0


def weights_by_time(costs: Sequence[tuple[float, float]], times: Sequence[float]) -> dict[float, float]:
    """Weights of a training loss at these times, with a mean of 1; costs between measured times are interpolated.

    Without costs all weights are 1.
    """
    if not costs or not times:
        return dict.fromkeys(times, 1.0)
    known = sorted(costs)
    logs = np.interp(times, [t for t, _ in known], [POWER * math.log(cost) for _, cost in known])
    weights = np.exp(logs - logs.max())
    return {t: float(weight) for t, weight in zip(times, weights / weights.mean(), strict=True)}
