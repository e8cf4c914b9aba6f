"""The command `profile`: the cost of a policy's training steps, against training its model in floating point.

Not here: how a step is timed (training/step_profile.py).
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.errors import UsageError
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.models.denoiser import recomputed_activations
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FIXED_BIT, PQ
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import set_weight_bits
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.trained_part import TrainedPart
from pqcad_qat.report.tables import PROFILED
from pqcad_qat.stages.prepared import prepare, prepare_untrained, with_own_model
from pqcad_qat.stages.train import bit_schedule
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.callback import Callback
from pqcad_qat.training.quantization_aware import FullPrecisionMatching, calibration_batches
from pqcad_qat.training.step_profile import WARM_UP, StepProfile, profile_steps
from pqcad_qat.training.trainer import new_accelerator
from pqcad_qat.training.weight_distance import WeightDistance

STILL = 1e-9
"""Bound on the change of weights by a step during timing, so small that the blend does not advance while steps are
profiled.
"""


def profile(
    policy: Policy, runs: int, console: Console, own: OwnModel | None = None, *, only: str = "*"
) -> dict[str, StepProfile]:
    """Time training steps of the policy's model, quantized and not, on noise; the values do not affect the cost of a
    step.

    The model may be an architecture alone, which then gets random weights, or a module of the user's own. `only` is a
    glob on the names of the candidates, all of which are in memory at once.

    Raises:
        PqcadError: as for `stages.prepared.prepare`, or the machine does not support the precision.
    """
    if not (chosen := fnmatch.filter(PROFILED, only)):
        raise UsageError(f"--only: got {only!r}, which matches no candidate; allowed a glob on {', '.join(PROFILED)}")
    device = new_accelerator(policy.training.precision).device
    policy = with_own_model(policy, own)
    prepared = (None if own else prepare_untrained(policy)) or prepare(policy, own=own)
    noise = torch.Generator().manual_seed(0)
    states = torch.randn((8, 4, *prepared.model.sample_shape), generator=noise)
    data = CalibrationSet(states, states[:, 1:], (900, 600, 300), prepared.conditions.drawn(0, 0, len(states)))
    training, part = policy.training, TrainedPart.asked(policy.training)
    x, t, condition = next(data.inputs(1, 1))
    seen = x.to(device), t, {name: value.to(device) for name, value in condition.items()}

    def quantized() -> nn.Module:
        model = quantize_model(copy.deepcopy(prepared.split).to(device), prepared.plan)
        calibrate_ranges(model, [seen])
        return model

    def in_float() -> tuple[nn.Module, list[Callback]]:
        return copy.deepcopy(prepared.model.denoiser).to(device), [FullPrecisionMatching()]

    def settled() -> tuple[nn.Module, list[Callback]]:
        model = quantized()
        _settle(model)
        return model, [FullPrecisionMatching(), WeightDistance(quantized_layers(model), part.freezes_weights)]

    def moving() -> tuple[nn.Module, list[Callback]]:
        schedule = _blend_halfway(policy, prepared.plan, model := quantized())
        return model, [schedule, FullPrecisionMatching(), WeightDistance(schedule.layers, part.freezes_weights)]

    made = {"float": in_float, FIXED_BIT: settled, PQ: moving}
    candidates = {name: made[name]() for name in chosen}
    batches = calibration_batches(data, training.batch_size, training.seed)
    with progress_bar(console) as bar, ExitStack() as stack:
        for model, _ in candidates.values():
            stack.enter_context(recomputed_activations(model, training.activation_checkpointing))
        task = bar.add_task("profile", total=(runs + WARM_UP) * len(candidates), note="")
        return profile_steps(
            candidates,
            batches,
            training.precision,
            training.ema,
            trained=part,
            runs=runs,
            advance=lambda done: bar.update(task, advance=done),
        )


def _settle(model: nn.Module) -> None:
    """Set every layer to its target width, at which fixed-bit training computes."""
    for layer in quantized_layers(model).values():
        set_weight_bits(layer, layer.plan.weights.bits)


def _blend_halfway(policy: Policy, plan: Sequence[LayerPlan], model: nn.Module) -> MomentumBitSchedule:
    """Put every layer halfway between two widths, as progressive quantization does; the schedule leaves it there."""
    schedule = bit_schedule(policy, plan, model)
    schedule.settings = replace(schedule.settings, perturbation=STILL, deadline=10**9)
    for name, layer in quantized_layers(model).items():
        if len(layer.plan.ladder) > 1:
            schedule.begin(name, step=0, share=0.5)
    return schedule
