"""A quantized variant that samples from an INT8 graph of its own, where simulated quantizers would take much longer.

The graph is written and proven like a deployed folder, in batches of the policy's evaluation, and deleted once it is
loaded. Around its planned layers everything is computed in float32, attention too, as PyTorch does it. So both compute
the same integers from the same inputs; what else differs is the order of float32 sums.

Not here: the folder that ships (deploy.py), and the sampling itself (samplers.py).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.export.execution import INT8, loaded_precision, refuse_float
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.machine.accelerators import accelerator
from pqcad_qat.machine.files import room_for
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import SIMULATED, VARIANTS
from pqcad_qat.quantization.plan_facts import expected_bytes
from pqcad_qat.quantization.quantizable_layers import parameter_count
from pqcad_qat.serving.compiled_sizes import FULL_PRECISION
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.vnni import has_vnni
from pqcad_qat.stages.export_request import denoiser_request
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.samplers import Sampler, deployed_variant

WORTH_A_GRAPH = 5e9
"""Denoiser calls times parameters from which on a graph is made. Making and proving one takes some 10 seconds and more
for large models, in which PyTorch simulates about as many calls (NOTES.md).
"""


def in_int8(policy: Policy, prepared: Prepared, name: str) -> bool:
    """Whether a variant is to sample from a graph of its own: if much is to be sampled, no accelerator simulates it
    faster, and no sums of 8-bit weights may overflow because this CPU has no VNNI.
    """
    calls = policy.evaluation.images * policy.sampling_steps(name)
    work = calls * parameter_count(prepared.model.denoiser)
    if VARIANTS[name].runtime != SIMULATED or accelerator() is not None or work < WORTH_A_GRAPH:
        return False
    return bool(has_vnni()) or all(layer.weights.bits < 8 for layer in prepared.plan)


def int8_sampler(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    name: str,
    model: nn.Module,
    calibration: CalibrationSet,
) -> Sampler | None:
    """Return the sampler of a variant's own INT8 graph; None where the graph is not proven, of which the run warns:
    there PyTorch has to simulate it.

    Args:
        policy, prepared: policy and full-precision model that it was made by.
        run: the run; the graph is written into its folder for a while.
        console: where progress and the warning are shown.
        name: the variant.
        model: its quantized model.
        calibration: states on which the integers are compared.
    """
    request = denoiser_request(policy, prepared, name=name, model=model, calibration=calibration)
    request = replace(request, batch_size=min(policy.evaluation.batch_size, policy.evaluation.images))
    try:
        with working(console, f"sample {name}: making and proving its INT8 graph"):
            deployed = _proven(prepared, run, request, calibration)
    except (ExportError, ModelError) as error:
        run.warn(f"sample {name}: PyTorch simulates it, because its INT8 graph was not proven: {error}", console)
        return None
    return deployed_variant(name, deployed, policy.sampling_steps(name))


def _proven(prepared: Prepared, run: RunFolder, request: ExportRequest, calibration: CalibrationSet) -> OVUNet2DModel:
    """Write the graph, load it, and prove it.

    Raises:
        ExportError: a layer has no INT8 form, did not execute in it, or gets other integers than PyTorch's.
        ModelError: OpenVINO cannot compile it.
    """
    size = expected_bytes(prepared.split, prepared.plan, packed=False)
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=run.path) as scratch, room_for(run.path, size):
        folder = Path(scratch) / "openvino"
        export_model(request, folder)
        deployed = OVUNet2DModel.from_pretrained(folder, properties=FULL_PRECISION)
        refuse_float(prepared.plan, loaded_precision(deployed, request.layers), "its graph")
        with recorded_inputs(request.model, next(calibration.inputs(1, 1)), Path(scratch)) as inputs:
            parity = layer_parity(folder, request.layers, inputs)
    if differ := [layer.name for layer in parity.layers if layer.different and layer.precision in INT8]:
        raise ExportError(f"{', '.join(differ)}: got integers that are not PyTorch's; allowed the same")
    return deployed
