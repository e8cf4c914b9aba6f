"""The command `rehearse`: plan, quantize, export and prove an architecture of any size with random weights, and report
the cost of each stage.

Not here: training, or how fast the result runs (benchmark.py). Neither memory nor time depends on the values of
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

from pqcad_qat.errors import UsageError
from pqcad_qat.export.execution import execution_precision
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.int8_attention import AttentionRange
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.machine.files import write_json
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.untrained import architecture_configs, architectures, fixed_inputs, noise_inputs
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.conversion import taken_integers
from pqcad_qat.quantization.integer_layer import IntegerLayer
from pqcad_qat.report.rehearsal_record import Rehearsal, StageCost
from pqcad_qat.serving.deployed_folder import copy_folder
from pqcad_qat.stages.untrained_models import blueprint, noise_attention, quantized_untrained
from pqcad_qat.timing.hardware import hardware
from pqcad_qat.timing.latency import size_bytes
from pqcad_qat.timing.stage_costs import StageMeter

REPORT = "rehearsal.json"
SHIPPED, PACKED = "openvino", "packed"
"""Names in a rehearsal's folder of the deployed folder, and of the same folder with packed weights."""


def rehearse(policy: Policy, folder: Path, command: str, tell: Callable[[StageCost], None]) -> tuple[Rehearsal, Path]:
    """Deploy an architecture by a policy's rules, with the proofs of a run; return the record, and the file that holds
    it.

    Args:
        policy: policy whose model names the architecture; its training section does not matter.
        folder: output folder; an older rehearsal in it is replaced.
        command: running command, for the record.
        tell: function called with the cost of each finished stage.

    Raises:
        UsageError: the policy's model is not an architecture.
        ModelError, PlanError: as for `stages.blueprint.blueprint`.
        ExportError: a layer cannot be expressed, or the folder holds something else.
    """
    if (configs := architecture_configs(policy.model.source)) is None:
        raise UsageError(
            f"--model: got {policy.model.source!r}; allowed a denoiser's config.json, a folder with one, or an "
            f"architecture: {', '.join(architectures())}"
        )
    meter = StageMeter(tell)
    source, shipped = policy.model.source, folder / SHIPPED
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
            _export(model, layers, attention, policy, folder=shipped)
        with meter.stage("load and run"):
            executed = execution_precision(shipped, layers)
        with meter.stage("compare integers"):
            parity = layer_parity(shipped, layers, inputs)
    with meter.stage("pack"):
        copy_folder(shipped, folder / PACKED, "packed")
    parameters = sum(parameter.numel() for parameter in drawn.model.denoiser.parameters())
    rehearsal = Rehearsal(
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
    write_json(folder / REPORT, asdict(rehearsal))
    return rehearsal, folder / REPORT


def _export(
    model: DiffusionModel,
    layers: Mapping[str, IntegerLayer],
    attention: Mapping[str, AttentionRange],
    policy: Policy,
    *,
    folder: Path,
) -> None:
    request = ExportRequest(
        model=model.denoiser,
        scheduler_config=model.scheduler_config,
        layers=layers,
        sample_shape=model.sample_shape,
        batch_size=policy.export.batch_size,
        provenance={"policy": policy.name, "model": model.source, "weights": "random"},
        conditions=fixed_inputs(model.condition_inputs),
        attention=attention,
    )
    export_model(request, folder, policy.export.weights)
