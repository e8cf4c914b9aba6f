"""Proofs of a deployed folder, read back from its files: what it executes in, and that it computes what PyTorch does.

Not here: the methods (export/execution.py, export/proof.py), and when a folder is proven (deploy.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.export.execution import ExecutionReport, execution_at_any_size, loaded_precision, refuse_float
from pqcad_qat.export.export_model import ExportRequest
from pqcad_qat.export.proof import ParityReport, end_to_end_psnr
from pqcad_qat.models.denoiser import predict
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.serving.deployed_folder import unverified_manifest
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.stage_records import IntegerParity

PARITY_INPUTS = 64
"""Number of states on which the deployed model is compared end to end with the quantized PyTorch model."""


def whole_proofs(
    prepared: Prepared, request: ExportRequest, folder: Path, calibration: CalibrationSet
) -> tuple[ExecutionReport, float]:
    """What the shipped model executes in, and its PSNR as of `_end_to_end`; it is loaded once for both.

    Raises:
        ExportError: as `refuse_float`.
    """
    deployed = OVUNet2DModel.from_pretrained(folder)
    executed = loaded_precision(deployed, request.layers)
    refuse_float(prepared.plan, executed, folder)
    return executed, _end_to_end(deployed, request.model, calibration)


def at_any_size(prepared: Prepared, request: ExportRequest, folder: Path) -> int | None:
    """Number of planned layers that execute in INT8 where the shipped graph is compiled as it is on disk, for any batch
    and size; None for a graph of one size, and for packed weights, which other programs do not read.

    Raises:
        ExportError: as `refuse_float`.
    """
    if not request.any_size or unverified_manifest(folder)["weights"]["format"] != "int8":
        return None
    executed = execution_at_any_size(folder, request.layers, request.attention)
    refuse_float(prepared.plan, executed, f"{folder}, compiled for any size")
    return executed.executed_int8


@torch.no_grad()
def _end_to_end(deployed: OVUNet2DModel, model: nn.Module, calibration: CalibrationSet) -> float:
    """PSNR in dB between the predictions of the deployed model and of the quantized PyTorch model, on states of the
    calibration set.
    """
    ours, theirs = [], []
    with frozen_weights(model.eval()):
        for x, t, condition in calibration.inputs(PARITY_INPUTS, 32):
            theirs.append(predict(model, x, t, condition).numpy())
            ours.append(
                deployed.predict(x.numpy(), t.numpy(), {name: value.numpy() for name, value in condition.items()})
            )
    return end_to_end_psnr(np.concatenate(ours), np.concatenate(theirs))


def integer_parity(parity: ParityReport) -> IntegerParity:
    return IntegerParity(
        layers_checked=parity.layers_checked,
        layers_exact=parity.layers_exact,
        worst_layer=parity.worst_layer,
        worst_error=parity.worst_error,
        exact={layer.name: layer.exact for layer in parity.layers},
    )
