"""How sensitive each layer is, and a policy of mixed widths within a size: the command `sensitivity`.

Not here: the measurement and the choice (quantization/), the page (evaluation/sensitivity_page.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from pqcad_qat.diffusion.calibration import CalibrationSet, calibration_set
from pqcad_qat.errors import PlanError
from pqcad_qat.evaluation.sensitivity_page import Assignment, SensitivityReport
from pqcad_qat.policy.loading import dump_policy
from pqcad_qat.policy.schema import LayerRule, Policy
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model
from pqcad_qat.quantization.mixed_precision import Option, choose_bits, patterns, with_bits
from pqcad_qat.quantization.plan import expected_bytes, plan_layers, quantizable_layers
from pqcad_qat.quantization.sensitivity import LayerSensitivity, layer_sensitivities, output_error
from pqcad_qat.stages.prepared import RANGE_INPUTS, SHARED, Prepared, calibration_recipe, prepare
from pqcad_qat.training.metrics_log import progress_bar

OWN, CHOSEN = "the policy's own widths", "chosen"
"""The assignments of a report."""


@dataclass(frozen=True)
class MaxSize:
    """A size that the weights may have: times float32's, or in megabytes (a million bytes)."""

    number: float
    unit: Literal["x", "MB"]

    def bytes_of(self, full: int) -> int:
        """In bytes, of a model that takes `full` in float32."""
        return int(self.number * (full if self.unit == "x" else 1e6))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's packed weights (`export.weights: packed`).

    Attributes:
        full: of all parameters in float32.
        fixed: of what is not planned, in float32.
        layers: planned layer -> width -> bytes, scales included.
    """

    full: int
    fixed: int
    layers: Mapping[str, Mapping[int, int]]

    def of(self, bits: Mapping[str, int]) -> int:
        """Of the whole model with these widths."""
        return self.fixed + sum(self.layers[name][width] for name, width in bits.items())


def measure_sensitivity(
    policy: Policy, widths: Sequence[int], states: int, most: MaxSize | None, cache: Path, command: str, console: Console
) -> tuple[SensitivityReport, str | None]:
    """Measure every planned layer at every width on the calibration set; with a size, also choose widths within it.

    Args:
        widths: that a layer may get; the policy's own are measured too.
        states: of the calibration set, which lies in `cache` or is recorded there.
        most: size that the packed weights may have.

    Returns:
        The report, and the text of a policy with the chosen widths, None without a size.

    Raises:
        PqcadError: as `stages.prepared.prepare`.
        PlanError: the smallest widths take more.
    """
    prepared = prepare(policy, cache.parent / SHARED)
    own = {layer.name: layer.weights.bits for layer in prepared.plan}
    sizes = packed_sizes(prepared, {*widths, *own.values()})
    budget = None if most is None else most.bytes_of(sizes.full)
    if budget is not None:
        _refuse_too_little(sizes, widths, budget)
    calibration = _calibration(policy, prepared, cache, console)
    model = quantize_model(copy.deepcopy(prepared.split), prepared.plan)
    with console.status("sensitivity: ranges"):
        calibrate_ranges(model, calibration.inputs(RANGE_INPUTS, policy.training.batch_size))
    batches = tuple(calibration.inputs(states, policy.training.batch_size))
    measured = sorted({*widths, *own.values()})
    groups = {layer.input_group for layer in prepared.plan}
    with progress_bar(console) as bar:
        task = bar.add_task("sensitivity", total=len(prepared.plan) * len(measured) + len(groups), note="")
        found = layer_sensitivities(model, measured, batches, lambda: bar.update(task, advance=1))
    assigned = {OWN: own}
    if budget is not None:
        options = {layer.name: [Option(bits, sizes.layers[layer.name][bits], layer.weights[bits]) for bits in widths] for layer in found}
        assigned[CHOSEN] = choose_bits(options, budget - sizes.fixed)
    report = SensitivityReport(
        policy=policy.name,
        model=prepared.model.source,
        states=sum(len(batch[0]) for batch in batches),
        layers=found,
        parameters={layer.name: layer.parameters for layer in prepared.plan},
        full_bytes=sizes.full,
        budget_bytes=budget,
        assignments={
            name: Assignment(bits, sizes.of(bits), _predicted(found, bits), output_error(model, bits, batches))
            for name, bits in assigned.items()
        },
        command=command,
    )
    return report, mixed_policy(policy, prepared, report) if CHOSEN in assigned else None


def packed_sizes(prepared: Prepared, widths: set[int]) -> Sizes:
    """What each planned layer takes at each of the widths."""
    full = expected_bytes(prepared.split, (), packed=False)
    weights = {layer.name: 4 * prepared.split.get_parameter(f"{layer.name}.weight").numel() for layer in prepared.plan}
    layers: dict[str, dict[int, int]] = {}
    for layer in prepared.plan:
        at = {bits: expected_bytes(prepared.split, with_bits([layer], {layer.name: bits}), packed=True) for bits in widths}
        layers[layer.name] = {bits: size - full + weights[layer.name] for bits, size in at.items()}
    return Sizes(full, full - sum(weights.values()), layers)


def _refuse_too_little(sizes: Sizes, widths: Sequence[int], budget: int) -> None:
    least = sizes.fixed + sum(min(layer[bits] for bits in widths) for layer in sizes.layers.values())
    if budget < least:
        raise PlanError(
            f"--max-size: got {budget / sizes.full:.3f}x ({budget:,} bytes of weights); allowed at least {least / sizes.full:.3f}x "
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


def _predicted(layers: Sequence[LayerSensitivity], bits: Mapping[str, int]) -> float:
    """The error of all layers together if their errors are independent: the sum."""
    return sum(layer.inputs + layer.weights[bits[layer.name]] for layer in layers)


def mixed_policy(policy: Policy, prepared: Prepared, report: SensitivityReport) -> str:
    """The policy with the chosen widths as rules, packed weights, and what they come to; it plans what the report says."""
    chosen = report.assignments[CHOSEN]
    rules = mixed_rules(policy, prepared, chosen.bits)
    made = policy.model_copy(
        update={
            "name": f"{policy.name}-mixed",
            "quantization": policy.quantization.model_copy(update={"layers": rules}),
            "export": policy.export.model_copy(update={"weights": "packed"}),
        }
    )
    planned = plan_layers(prepared.split, rules, policy.progressive.ladder, prepared.model.example)
    assert {layer.name: layer.weights.bits for layer in planned} == dict(chosen.bits), "the rules do not say what was chosen"
    head = [
        f"# Widths chosen layer by layer: {chosen.bytes / report.full_bytes:.3f}x the size of float32, weights packed.",
        "#",
        f"#     {report.command}",
        "#",
        f"# Error of the output on {report.states} states of the calibration set, before any training: {chosen.error:.2e} of its square.",
    ]
    return "\n".join(head) + "\n\n" + dump_policy(Policy.model_validate(made.model_dump()), whole=False)


def mixed_rules(policy: Policy, prepared: Prepared, bits: Mapping[str, int]) -> tuple[LayerRule, ...]:
    """The policy's rules, each in as many as its layers have widths, widest first; layers in floating point stay there."""
    names = list(quantizable_layers(prepared.split))
    rules = []
    for index, rule in enumerate(policy.quantization.layers):
        if rule.keep_float:
            rules.append(rule)
            continue
        widths: dict[int, list[str]] = {}
        for layer in prepared.plan:
            if layer.rule_index == index:
                widths.setdefault(bits[layer.name], []).append(layer.name)
        for width in sorted(widths, reverse=True):
            assert rule.weights is not None, "a rule that quantizes has both quantizers"
            match = tuple(patterns(widths[width], [name for name in names if name not in widths[width]]))
            rules.append(rule.model_copy(update={"match": match, "weights": rule.weights.model_copy(update={"bits": width})}))
    return tuple(rules)
