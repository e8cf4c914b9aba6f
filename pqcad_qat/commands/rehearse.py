"""An architecture of any size with random weights: planned, quantized, exported and proven, with what each stage of it
costs.

Not here: training, or how fast the result runs (benchmark.py). Neither memory nor time depends on the values of
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from pqcad_qat.export.export_model import export_model
from pqcad_qat.export.int8_attention import AttentionRange
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.proof import INT8, execution_precision, layer_parity
from pqcad_qat.machine.files import write_json
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.untrained import fixed_inputs, noise_inputs
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.conversion import taken_integers
from pqcad_qat.quantization.quantized_layer import IntegerLayer
from pqcad_qat.report.record import Hardware
from pqcad_qat.serving.deployed_folder import copy_folder
from pqcad_qat.stages.blueprint import Configs, blueprint, noise_attention, quantized_untrained
from pqcad_qat.timing.hardware import hardware
from pqcad_qat.timing.latency import size_bytes
from pqcad_qat.timing.stage_costs import StageCost, StageMeter

REPORT = "rehearsal.json"
SHIPPED, PACKED = "openvino", "packed"
"""What a rehearsal leaves in its folder: its report, the deployed folder, and the same with packed weights."""


@dataclass(frozen=True)
class Rehearsal:
    """What was found.

    Attributes:
        policy, model: whose rules, and which architecture.
        parameters: of the full-precision denoiser.
        planned, executed_int8: layers planned for INT8, and those that executed so from the shipped file.
        attention: those planned for INT8, and what their products executed in.
        exact: layers whose integers equal PyTorch's.
        sizes: float32 weights, and the folders by the format of their weights, in bytes.
        stages: in order.
        peak_bytes: most resident memory of all stages.
        hardware: of this machine.
        command: that makes it again.
    """

    policy: str
    model: str
    parameters: int
    planned: int
    executed_int8: int
    attention: Mapping[str, str]
    exact: int
    sizes: Mapping[str, int]
    stages: tuple[StageCost, ...]
    peak_bytes: int
    hardware: Hardware
    command: str


def rehearse(
    policy: Policy, configs: Configs, folder: Path, command: str, tell: Callable[[StageCost], None]
) -> Rehearsal:
    """Take an architecture to a deployed folder by a policy's rules, with the proofs of a run.

    Args:
        policy: its model names the architecture; its training does not matter.
        configs: of the architecture.
        folder: where to; an older rehearsal there is replaced.
        command: that is running, for the record.
        tell: of each stage that is over.

    Raises:
        ModelError, PlanError: as blueprint.
        ExportError: a layer that cannot be expressed, or a folder that holds something else.
    """
    meter, source, shipped = StageMeter(tell), policy.model.source, folder / SHIPPED
    with meter.stage("plan"), located(policy):
        drawn = blueprint(configs, source, policy.quantization, policy.model.sample_size)
    model = quantized_untrained(configs, drawn, (1,), meter.stage)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as recorded:
        with meter.stage("inputs of layers"):
            inputs = recorded.enter_context(recorded_inputs(model.denoiser, noise_inputs(model, 1, seed=1), folder))
        with meter.stage("ranges of attention") if policy.quantization.attention == "int8" else nullcontext():
            attention = noise_attention(model, policy.quantization)
        with meter.stage("integers"):
            layers = taken_integers(model.denoiser)
        with meter.stage("convert and write"):
            _export(model, layers, attention, policy, shipped)
        with meter.stage("load and run"):
            executed = execution_precision(shipped, layers)
        with meter.stage("compare integers"):
            parity = layer_parity(shipped, layers, inputs)
    with meter.stage("pack"):
        copy_folder(shipped, folder / PACKED, "packed")
    parameters = sum(parameter.numel() for parameter in drawn.model.denoiser.parameters())
    return Rehearsal(
        policy=policy.name,
        model=source,
        parameters=parameters,
        planned=executed.planned,
        executed_int8=executed.executed_int8,
        attention=executed.attention,
        exact=parity.layers_exact,
        sizes={
            "float32": 4 * parameters,
            policy.export.weights: size_bytes(shipped),
            "packed": size_bytes(folder / PACKED),
        },
        stages=tuple(meter.costs),
        peak_bytes=meter.peak_bytes,
        hardware=hardware(),
        command=command,
    )


def _export(
    model: DiffusionModel,
    layers: Mapping[str, IntegerLayer],
    attention: Mapping[str, AttentionRange],
    policy: Policy,
    folder: Path,
) -> None:
    provenance, conditions = (
        {"policy": policy.name, "model": model.source, "weights": "random"},
        fixed_inputs(model.condition_inputs),
    )
    scheduler, shape, how = model.scheduler_config, model.sample_shape, policy.export
    batch, weights = how.batch_size, how.weights
    export_model(
        model.denoiser, scheduler, layers, shape, batch, weights, folder, provenance, conditions, attention=attention
    )


def stages_table(found: Rehearsal) -> Table:
    """What each stage cost, and below it what came of them."""
    table = Table(
        "stage",
        title=f"{found.model}: {found.parameters / 1e6:,.1f} million parameters, {found.policy}",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("seconds", "MB at the peak", "MB kept"):
        table.add_column(heading, justify="right")
    for cost in found.stages:
        table.add_row(
            cost.name, f"{cost.seconds:.1f}", *(_megabytes(value) for value in (cost.peak_bytes, cost.kept_bytes))
        )
    table.add_row("all", f"{sum(cost.seconds for cost in found.stages):.1f}", _megabytes(found.peak_bytes), "")
    sizes = ", ".join(f"{name} {_megabytes(size)} MB" for name, size in found.sizes.items())
    layers = (
        f"{found.executed_int8} of {found.planned} planned layers ran in INT8, {found.exact} with exactly "
        "PyTorch's integers"
    )
    if found.attention:
        layers += (
            f"; both products of attention in {sum(each in INT8 for each in found.attention.values())} of "
            f"{len(found.attention)}"
        )
    table.caption, table.caption_justify = f"{layers}\n{sizes}", "left"
    return table


def write_rehearsal(found: Rehearsal, folder: Path) -> Path:
    """Write its record as JSON; returns the file."""
    write_json(folder / REPORT, asdict(found))
    return folder / REPORT


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f}"
