"""The command `sensitivity`: how sensitive each layer is to quantization, and a mixed-width policy within a size limit.

Not here: the measurement and the choice (quantization/), the page (report/sensitivity_page.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet, calibration_set
from pqcad_qat.errors import PlanError
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.progress import progress_bar, working
from pqcad_qat.models.denoiser import PredictArguments
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.loading import dump_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_sensitivity import LayerSensitivity, layer_sensitivities, output_error
from pqcad_qat.quantization.layer_state import set_weight_bits
from pqcad_qat.quantization.mixed_precision import (
    Costs,
    Option,
    choose_bits,
    limit_in_bytes,
    mixed_rules,
    weight_costs,
)
from pqcad_qat.quantization.plan import LayerPlan, plan_layers
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.report.sensitivity_page import Assignment, SensitivityReport, write_sensitivity
from pqcad_qat.stages.prepared import (
    CALIBRATION,
    RANGE_INPUTS,
    SHARED,
    Prepared,
    calibration_recipe,
    prepare,
    with_own_model,
)

OWN, CHOSEN = "the policy's own widths", "chosen"
"""Names of a report's assignments."""


@dataclass(frozen=True)
class Sensitivity:
    """Result of the command, and where it is written.

    Attributes:
        report: errors of every layer at every width.
        page: page that shows the report.
        policy: file of the mixed-width policy; None without a size limit.
    """

    report: SensitivityReport
    page: Path
    policy: Path | None


def sensitivity(
    policy: Policy,
    widths: Sequence[int],
    states: int,
    size: str | None,
    *,
    folder: Path,
    command: str,
    console: Console,
    model: OwnModel | None = None,
) -> Sensitivity:
    """Call `measure_sensitivity` and write the results into a folder; the calibration set lies beside that folder."""
    report, mixed = measure_sensitivity(
        policy, widths, states, size, cache=folder.parent / CALIBRATION, command=command, console=console, model=model
    )
    page = write_sensitivity(report, folder)
    if mixed is None:
        return Sensitivity(report, page, None)
    write_file(folder / "policy.yaml", mixed)
    return Sensitivity(report, page, folder / "policy.yaml")


def measure_sensitivity(
    policy: Policy,
    widths: Sequence[int],
    states: int,
    size: str | None,
    *,
    cache: Path,
    command: str,
    console: Console,
    model: OwnModel | None = None,
) -> tuple[SensitivityReport, str | None]:
    """Measure every planned layer at every width on the calibration set; with a limit, also choose widths within it.

    Args:
        policy: policy whose model and plan are measured.
        widths: widths in bits that a layer may get; the policy's own widths are measured too.
        states: number of states of the calibration set to measure on.
        size: limit on the packed weights, as 2.5MB or 0.15x; each layer gets one of the widths.
        cache: folder in which the calibration set is found or recorded.
        command: command that repeats the measurement, for the report.
        console: console that shows the progress.
        model: module of the user's own, in place of the policy's model.

    Returns:
        The report, and the text of a policy with the chosen widths, None without a limit.

    Raises:
        PqcadError: as for `stages.prepared.prepare`.
        PlanError: even the smallest widths exceed the limit.
    """
    policy = with_own_model(policy, model)
    prepared = prepare(policy, cache.parent / SHARED, model)
    own = {layer.name: layer.weights.bits for layer in prepared.plan}
    measured = sorted({*widths, *own.values()})
    sizes = weight_costs(prepared.split, prepared.plan, measured, packed=True)
    if size is not None:
        _refuse_too_small(sizes.at(widths), size, widths)
    calibration = _calibration(policy, prepared, cache, console)
    quantized = _calibrated(policy, prepared, prepared.plan, calibration, console=console)
    batches = tuple(calibration.inputs(states, policy.training.batch_size))
    layers = _layers(quantized, measured, batches, console)
    assigned = {OWN: own}
    if size is not None:
        assigned[CHOSEN] = _choose(layers, sizes.at(widths), size)
    report = SensitivityReport(
        policy=policy.name,
        model=prepared.model.source,
        states=sum(len(batch[0]) for batch in batches),
        layers=layers,
        parameters={layer.name: layer.parameters for layer in prepared.plan},
        full_bytes=sizes.whole,
        budget_bytes=None if size is None else limit_in_bytes(size, sizes.whole),
        assignments={
            name: Assignment(
                bits=bits,
                bytes=sizes.total(bits),
                predicted=sum(layer.error(bits[layer.name]) for layer in layers),
                error=output_error(quantized, bits, batches),
            )
            for name, bits in assigned.items()
        },
        command=command,
    )
    return report, mixed_policy(policy, prepared, report) if CHOSEN in assigned else None


def _refuse_too_small(sizes: Costs, size: str, widths: Sequence[int]) -> None:
    got, least = limit_in_bytes(size, sizes.whole), sizes.least
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
        calibration, _ = calibration_set(
            prepared.model, recipe, batch, cache, advance=advance, conditions=prepared.conditions
        )
    return calibration


def _calibrated(
    policy: Policy, prepared: Prepared, plan: Sequence[LayerPlan], calibration: CalibrationSet, *, console: Console
) -> nn.Module:
    """Quantize these layers with calibrated ranges, weights at their own widths, without training."""
    model = quantize_model(copy.deepcopy(prepared.split), plan)
    with working(console, "sensitivity: ranges"):
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


def _choose(layers: Sequence[LayerSensitivity], costs: Costs, limit: str) -> dict[str, int]:
    """Choose widths that minimize the sum of the layers' errors within the limit; return layer -> width.

    The choice assumes that errors and costs of layers add up.
    """
    options = {
        layer.name: [Option(bits, cost, layer.error(bits)) for bits, cost in costs.layers[layer.name].items()]
        for layer in layers
    }
    return choose_bits(options, limit_in_bytes(limit, costs.whole) - costs.fixed)


def mixed_policy(policy: Policy, prepared: Prepared, report: SensitivityReport) -> str:
    """Text of the policy with the chosen widths as rules and with packed weights; its first lines state the resulting
    size and error.
    """
    chosen = report.assignments[CHOSEN]
    rules = mixed_rules(
        policy.quantization.layers, prepared.plan, list(quantizable_layers(prepared.split)), chosen.bits
    )
    planned = plan_layers(prepared.split, rules, policy.progressive.ladder, prepared.model.example)
    assert {layer.name: layer.weights.bits for layer in planned} == chosen.bits, "the rules do not say what was chosen"
    mixed = policy.model_copy(
        update={
            "name": f"{policy.name}-mixed",
            "quantization": policy.quantization.model_copy(update={"layers": rules}),
            "export": policy.export.model_copy(update={"weights": "packed"}),
        }
    )
    came_to = (
        f"Widths chosen layer by layer: {chosen.bytes / report.full_bytes:.3f}x the size of float32, weights packed."
    )
    head = [
        f"# {came_to}",
        "#",
        f"#     {report.command}",
        "#",
        f"# Error of the output on {report.states} states of the calibration set, before any training: "
        f"{chosen.error:.2e} of its square.",
    ]
    return "\n".join(head) + "\n\n" + dump_policy(Policy.model_validate(mixed.model_dump()), whole=False)
