"""How sensitive each layer is, and a policy of mixed widths within a size or a time: the command `sensitivity`.

Not here: the measurement and the choice (quantization/), the times of layers (timing/layer_times.py), the page
(sensitivity_page.py).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from torch import nn

from pqcad_qat.commands.step_times import Trial
from pqcad_qat.data.calibration import CalibrationSet, calibration_set
from pqcad_qat.errors import PlanError
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.models.denoiser import PredictArguments
from pqcad_qat.policy.loading import dump_policy
from pqcad_qat.policy.schema import LayerRule, Policy
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_sensitivity import LayerSensitivity, layer_sensitivities, output_error
from pqcad_qat.quantization.mixed_precision import Costs, Option, choose_bits, mixed_rules, with_bits
from pqcad_qat.quantization.plan import FLOAT, LayerPlan, expected_bytes, plan_layers
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.quantization.quantized_layer import set_weight_bits
from pqcad_qat.report.sensitivity_page import Assignment, SensitivityReport
from pqcad_qat.stages.prepared import RANGE_INPUTS, SHARED, Prepared, calibration_recipe, prepare

OWN, FLOATING, CHOSEN = "the policy's own widths", "all in floating point", "chosen"
"""The assignments of a report."""

UNITS: Mapping[str, float] = {"MB": 1e6, "ms": 1e6}
"""Bytes, and nanoseconds."""


@dataclass(frozen=True)
class Limit:
    """What weights or a step may cost: a multiple of float32's bytes or of the step in INT8, megabytes (10^6 bytes), or
    milliseconds.
    """

    number: float
    unit: Literal["x", "MB", "ms"]

    def of(self, whole: int) -> int:
        """In bytes or nanoseconds, of a model that takes `whole`."""
        return int(self.number * (whole if self.unit == "x" else UNITS[self.unit]))


def measure_sensitivity(
    policy: Policy,
    widths: Sequence[int],
    states: int,
    size: Limit | None,
    step: Limit | None,
    cache: Path,
    command: str,
    console: Console,
) -> tuple[SensitivityReport, str | None]:
    """Measure every planned layer at every width on the calibration set; with a limit, also choose widths within it.

    Args:
        widths: that a layer may get; the policy's own are measured too.
        states: of the calibration set, which lies in `cache` or is recorded there.
        size: that the packed weights may have; each layer gets one of the widths.
        step: that a step may take, instead; each layer gets its own width in INT8, or stays in floating point.

    Returns:
        The report, and the text of a policy with the chosen widths, None without a limit.

    Raises:
        PqcadError: as `stages.prepared.prepare`.
        PlanError: the cheapest widths cost more; or the step leaves time for all layers in floating point.
    """
    prepared = prepare(policy, cache.parent / SHARED)
    own = {layer.name: layer.weights.bits for layer in prepared.plan}
    measured = sorted({*widths, *own.values()})
    sizes = packed_sizes(prepared, measured)
    if size is not None:
        _refuse_too_small(sizes.at(widths), size, widths)
    calibration = _calibration(policy, prepared, cache, console)
    model = _calibrated(policy, prepared, prepared.plan, calibration, console)
    batches = tuple(calibration.inputs(states, policy.training.batch_size))
    with tempfile.TemporaryDirectory() as temporary:
        trial = Trial(policy, prepared, calibration.timesteps, Path(temporary))
        times = None if step is None else _times(trial, model, step, console)
        found = _layers(model, measured, batches, console)
        assigned, errors, clock = {OWN: own}, {OWN: output_error(model, own, batches)}, dict[str, float]()
        if size is not None:
            assigned[CHOSEN] = _choose(found, sizes.at(widths), size)
            errors[CHOSEN] = output_error(model, assigned[CHOSEN], batches)
        if step is not None and times is not None:
            assigned |= {FLOATING: dict.fromkeys(own, FLOAT), CHOSEN: _choose(found, times, step)}
            _refuse_all_floating(assigned[CHOSEN], times, step)
            chosen = _calibrated(
                policy, prepared, mixed_plan(policy, prepared, assigned[CHOSEN])[1], calibration, console
            )
            errors |= {FLOATING: 0.0, CHOSEN: output_error(chosen, assigned[CHOSEN], batches)}
            with console.status("sensitivity: timing what was chosen"):
                trial.deploy(CHOSEN, integer_layers(chosen))
                clock = trial.clock(assigned)
    report = SensitivityReport(
        policy=policy.name,
        model=prepared.model.source,
        states=sum(len(batch[0]) for batch in batches),
        layers=found,
        parameters={layer.name: layer.parameters for layer in prepared.plan},
        full_bytes=sizes.whole,
        budget_bytes=None if size is None else size.of(sizes.whole),
        assignments={
            name: Assignment(
                bits=bits,
                bytes=sizes.of(bits),
                predicted=sum(layer.error(bits[layer.name]) for layer in found),
                error=errors[name],
                predicted_ms=None if times is None else times.of(bits) / 1e6,
                measured_ms=clock.get(name),
            )
            for name, bits in assigned.items()
        },
        command=command,
        budget_ms=None if step is None or times is None else step.of(times.whole) / 1e6,
        milliseconds=None
        if times is None
        else {name: {bits: ns / 1e6 for bits, ns in at.items()} for name, at in times.layers.items()},
    )
    return report, mixed_policy(policy, prepared, report) if CHOSEN in assigned else None


def packed_sizes(prepared: Prepared, widths: Collection[int]) -> Costs:
    """Bytes of the packed weights (`export.weights: packed`), scales included; a share is of all parameters in
    float32.
    """
    full = expected_bytes(prepared.split, (), packed=False)
    weights = {layer.name: 4 * prepared.split.get_parameter(f"{layer.name}.weight").numel() for layer in prepared.plan}
    layers: dict[str, dict[int, int]] = {}
    for layer in prepared.plan:
        at = {
            bits: expected_bytes(prepared.split, with_bits([layer], {layer.name: bits}), packed=True) for bits in widths
        }
        layers[layer.name] = {bits: size - full + weights[layer.name] for bits, size in at.items()} | {
            FLOAT: weights[layer.name]
        }
    return Costs(full, full - sum(weights.values()), layers)


def _times(trial: Trial, model: nn.Module, step: Limit, console: Console) -> Costs:
    """Nanoseconds of a step, by what each layer runs in: measured on this machine."""
    with console.status("sensitivity: milliseconds of every layer, in INT8 and in floating point"):
        trial.deploy(OWN, integer_layers(model))
        trial.deploy(FLOATING, {})
        times = trial.costs(OWN, FLOATING)
    if step.of(times.whole) < times.least:
        raise PlanError(
            f"--max-ms: got {_step(step.of(times.whole), times)}; allowed at least {_step(times.least, times)}, "
            "which a step takes on this machine with each layer in what is faster"
        )
    return times


def _refuse_all_floating(bits: Mapping[str, int], times: Costs, step: Limit) -> None:
    if set(bits.values()) == {FLOAT}:
        raise PlanError(
            f"--max-ms: got {_step(step.of(times.whole), times)}; allowed less than {_step(times.of(bits), times)}, "
            "which a step takes on this machine with all layers in floating point: within it nothing "
            "needs to be quantized"
        )


def _step(nanoseconds: int, times: Costs) -> str:
    return f"{nanoseconds / 1e6:.3f} ms ({nanoseconds / times.whole:.3f}x the step of all planned layers in INT8)"


def _refuse_too_small(sizes: Costs, size: Limit, widths: Sequence[int]) -> None:
    got, least = size.of(sizes.whole), sizes.least
    if got < least:
        raise PlanError(
            f"--max-size: got {got / sizes.whole:.3f}x ({got:,} bytes of weights); allowed at least "
            f"{least / sizes.whole:.3f}x "
            f"({least:,} bytes), which all layers take at the smallest of the widths {', '.join(map(str, widths))}"
        )


def _calibration(policy: Policy, prepared: Prepared, cache: Path, console: Console) -> CalibrationSet:
    recipe = calibration_recipe(policy, prepared)
    with progress_bar(console) as bar:
        task = bar.add_task("calibration", total=recipe.trajectories * recipe.steps * recipe.refinement, note="")
        batch = policy.calibration.batch_size
        advance = partial(bar.advance, task)
        found, _ = calibration_set(prepared.model, recipe, batch, cache, advance, prepared.conditions)
    return found


def _calibrated(
    policy: Policy, prepared: Prepared, plan: Sequence[LayerPlan], calibration: CalibrationSet, console: Console
) -> nn.Module:
    """The model with these layers quantized, weights at their own widths, not trained."""
    model = quantize_model(copy.deepcopy(prepared.split), plan)
    with console.status("sensitivity: ranges"):
        calibrate_ranges(model, calibration.inputs(RANGE_INPUTS, policy.training.batch_size))
    for layer in quantized_layers(model).values():
        set_weight_bits(layer, layer.plan.weights.bits)
    return model


def _layers(
    model: nn.Module, widths: Sequence[int], batches: Sequence[PredictArguments], console: Console
) -> tuple[LayerSensitivity, ...]:
    layers = quantized_layers(model).values()
    with progress_bar(console) as bar:
        total = len(layers) * len(widths) + len({layer.plan.input_group for layer in layers})
        task = bar.add_task("sensitivity", total=total, note="")
        return layer_sensitivities(model, widths, batches, lambda: bar.update(task, advance=1))


def _choose(layers: Sequence[LayerSensitivity], costs: Costs, limit: Limit) -> dict[str, int]:
    """Layer -> width: the sum of the layers' errors as small as the limit allows; that errors and costs add up is
    assumed.
    """
    options = {
        layer.name: [Option(bits, cost, layer.error(bits)) for bits, cost in costs.layers[layer.name].items()]
        for layer in layers
    }
    return choose_bits(options, limit.of(costs.whole) - costs.fixed)


def mixed_plan(
    policy: Policy, prepared: Prepared, bits: Mapping[str, int]
) -> tuple[tuple[LayerRule, ...], tuple[LayerPlan, ...]]:
    """The policy's rules with the chosen widths, and what they plan, which is what was chosen."""
    rules = mixed_rules(policy.quantization.layers, prepared.plan, list(quantizable_layers(prepared.split)), bits)
    planned = plan_layers(prepared.split, rules, policy.progressive.ladder, prepared.model.example)
    integers = {name: width for name, width in bits.items() if width != FLOAT}
    assert {layer.name: layer.weights.bits for layer in planned} == integers, "the rules do not say what was chosen"
    return rules, planned


def mixed_policy(policy: Policy, prepared: Prepared, report: SensitivityReport) -> str:
    """The policy with the chosen widths as rules, and what they come to; within a size its weights are packed."""
    chosen, own = report.assignments[CHOSEN], report.assignments[OWN]
    rules, _ = mixed_plan(policy, prepared, chosen.bits)
    weights = "packed" if report.budget_bytes is not None else policy.export.weights
    made = policy.model_copy(
        update={
            "name": f"{policy.name}-mixed",
            "quantization": policy.quantization.model_copy(update={"layers": rules}),
            "export": policy.export.model_copy(update={"weights": weights}),
        }
    )
    came_to = (
        f"Widths chosen layer by layer: {chosen.bytes / report.full_bytes:.3f}x the size of float32, weights packed."
    )
    if chosen.measured_ms is not None and own.measured_ms is not None:
        came_to = (
            f"Layers kept in floating point within a time: {chosen.measured_ms / own.measured_ms:.3f}x the "
            "step of all in INT8."
        )
    head = [
        f"# {came_to}",
        "#",
        f"#     {report.command}",
        "#",
        f"# Error of the output on {report.states} states of the calibration set, before any training: "
        f"{chosen.error:.2e} of its square.",
    ]
    return "\n".join(head) + "\n\n" + dump_policy(Policy.model_validate(made.model_dump()), whole=False)
