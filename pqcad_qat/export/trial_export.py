"""Trial deployment of a user's own module on noise, before training.

It shows early which layers cannot run in INT8 with PyTorch's integers.

Not here: whether the module predicts as a denoiser must (models/probing.py). diffusers' classes need no trial: their
graphs are known.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pqcad_qat.errors import ExportError, ModelError, PqcadError
from pqcad_qat.export.execution import execution_precision, refuse_float
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.int8_attention import attention_ranges
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.export.traceable_modules import needs_vnni
from pqcad_qat.models.denoiser import DenoiserInput, DiffusionModel, predict
from pqcad_qat.models.module_preparation import hold_statistics, one_line
from pqcad_qat.models.probing import one_state, probe_states
from pqcad_qat.models.untrained import fixed_inputs
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.vnni import has_vnni

STATES = 16
"""Number of noise states from which the trial takes its ranges."""

FAR = 0.5
"""Largest allowed error of a deployed prediction, as a fraction of the prediction's norm. Rounding to INT8 stays below
it; a graph that computes another function does not.
"""


def try_training_and_export(
    model: DiffusionModel, split: nn.Module, plan: Sequence[LayerPlan], attention: bool
) -> None:
    """Try out training and deployment on a copy, and check the result.

    The copy is quantized at the plan's target widths, runs one forward and backward pass, and is deployed to a
    temporary folder.

    Args:
        model: the user's own model.
        split: its module in the form that the plan is made for; it is left unchanged.
        plan: the plan of its layers.
        attention: whether the products of attention run in INT8.

    Raises:
        ModelError: the module cannot be trained or calibrated.
        ExportError: the module cannot be deployed as planned; the message names the layers.
    """
    states = probe_states(model, STATES)
    quantized = quantize_model(copy.deepcopy(split), [replace(layer, ladder=(layer.weights.bits,)) for layer in plan])
    calibrate_ranges(quantized, [states])
    _train_once(model.source, quantized, states)
    try:
        _deploy(model, quantized.eval(), plan, states, attention=attention)
    except ExportError as error:
        raise ExportError(f"{model.source}: {error}") from error


def _train_once(source: str, quantized: nn.Module, states: DenoiserInput) -> None:
    """The forward and backward pass of one training step."""
    x, t, condition = states
    try:
        hold_statistics(quantized.train())
        predict(
            quantized, x[:2], t[:2], {name: value[:2] for name, value in condition.items()}
        ).square().mean().backward()  # type: ignore[no-untyped-call]
    except PqcadError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(
            f"{source}: a training step: got {one_line(error)}; allowed a forward and a backward pass without an error"
        ) from error
    quantized.zero_grad()


def _deploy(
    model: DiffusionModel, quantized: nn.Module, plan: Sequence[LayerPlan], states: DenoiserInput, *, attention: bool
) -> None:
    """Deploy to a temporary folder and check the INT8 execution, the layers' integers, and the predictions."""
    layers = integer_layers(quantized)
    with tempfile.TemporaryDirectory(prefix="pqcad-trial-") as scratch:
        folder = Path(scratch) / "openvino"
        ranges = attention_ranges(quantized, [states]) if attention else {}
        request = ExportRequest(
            model=quantized,
            scheduler_config=model.scheduler_config,
            layers=layers,
            sample_shape=model.sample_shape,
            batch_size=1,
            conditions=fixed_inputs(model.condition_inputs),
            visited=states[1].tolist(),
            attention=ranges,
        )
        export_model(request, folder)
        refuse_float(plan, execution_precision(folder, layers), "a trial")
        with recorded_inputs(quantized, states, Path(scratch)) as inputs:
            parity = layer_parity(folder, layers, inputs)
        saturating = set() if has_vnni() else {name for name, layer in layers.items() if needs_vnni(layer)}
        if inexact := [layer.name for layer in parity.layers if not layer.exact and layer.name not in saturating]:
            raise ExportError(f"{', '.join(inexact)}: deployed, got integers that are not PyTorch's; allowed the same")
        _compare(folder, quantized, states)


@torch.no_grad()
def _compare(folder: Path, quantized: nn.Module, states: DenoiserInput) -> None:
    """Compare the deployed graph with the module that it was made from, one state at a time.

    The graph computes in float32 outside its planned layers.
    """
    deployed = OVUNet2DModel.from_pretrained(folder, properties={"INFERENCE_PRECISION_HINT": "f32"})
    differences, expected = [], []
    for place in range(len(states[0])):
        x, t, condition = one_state(states, place)
        arrays = {name: value.numpy() for name, value in condition.items()}
        expected.append(predict(quantized, x, t, condition).numpy())
        differences.append(deployed.predict(x.numpy(), t.numpy(), arrays) - expected[-1])
    error, size = (np.linalg.norm(np.concatenate(values)) for values in (differences, expected))
    if error > FAR * size and size > 0:
        raise ExportError(
            f"deployed, got predictions {100 * error / size:.0f} % away from PyTorch's, as of a graph that computes "
            f"something else; allowed {100 * FAR:.0f} %"
        )
