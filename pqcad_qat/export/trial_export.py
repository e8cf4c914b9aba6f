"""A module of the user's own deployed once before it is trained, on noise: what cannot end in INT8, with PyTorch's
integers, is known then.

Not here: whether it predicts as a denoiser has to (models/probing.py). Classes of diffusers need no trial: their graphs
are known.
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
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.int8_attention import attention_ranges
from pqcad_qat.export.layer_inputs import recorded_inputs
from pqcad_qat.export.proof import execution_precision, layer_parity, refuse_float
from pqcad_qat.export.traceable_modules import needs_vnni
from pqcad_qat.models.denoiser import DenoiserInput, DiffusionModel, predict
from pqcad_qat.models.own_modules import hold_statistics, one_line
from pqcad_qat.models.probing import one_state, probe_states
from pqcad_qat.models.untrained import fixed_inputs
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.serving.runtime import OVUNet2DModel, has_vnni

STATES = 16
"""Of noise, that the ranges of the trial are taken from."""

FAR = 0.5
"""Of the size of a prediction: no rounding to INT8 moves a deployed one so far, but another function does."""


def try_training_and_export(
    model: DiffusionModel, split: nn.Module, plan: Sequence[LayerPlan], attention: bool
) -> None:
    """Quantize a copy at the plan's target widths, take one step back through it, deploy it in a folder that goes
    again, and prove that.

    Args:
        model: of the user's own.
        split: its module as the plan stands on it, left as it is.
        plan: of its layers.
        attention: whether products of attention are to run in INT8.

    Raises:
        ModelError: it cannot be trained or calibrated.
        ExportError: it cannot be deployed as planned; the message names the layers.
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
    """A step's passes forward and back."""
    x, t, condition = states
    try:
        hold_statistics(quantized.train())
        predict(
            quantized, x[:2], t[:2], {name: value[:2] for name, value in condition.items()}
        ).square().mean().backward()  # type: ignore[no-untyped-call]
    except PqcadError:
        raise
    except Exception as error:  # whatever code of the user's own leads to
        raise ModelError(f"{source}: it cannot be trained: {one_line(error)}") from error
    quantized.zero_grad()


def _deploy(
    model: DiffusionModel, quantized: nn.Module, plan: Sequence[LayerPlan], states: DenoiserInput, *, attention: bool
) -> None:
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
        if other := [layer.name for layer in parity.layers if not layer.exact and layer.name not in saturating]:
            raise ExportError(f"{', '.join(other)}: deployed, the integers of the layer are not PyTorch's")
        _compare(folder, quantized, states)


@torch.no_grad()
def _compare(folder: Path, quantized: nn.Module, states: DenoiserInput) -> None:
    """The deployed graph on each state alone, in float32 outside its layers, beside the module that it was made of."""
    deployed = OVUNet2DModel.from_pretrained(folder, properties={"INFERENCE_PRECISION_HINT": "f32"})
    ours, theirs = [], []
    for place in range(len(states[0])):
        x, t, condition = one_state(states, place)
        theirs.append(predict(quantized, x, t, condition).numpy())
        ours.append(deployed.predict(x.numpy(), t.numpy(), {name: value.numpy() for name, value in condition.items()}))
    error, size = (
        np.linalg.norm(values) for values in (np.concatenate(ours) - np.concatenate(theirs), np.concatenate(theirs))
    )
    if error > FAR * size and size > 0:
        raise ExportError(
            f"deployed, its predictions are {100 * error / size:.0f} % away from PyTorch's: its graph "
            "computes something else"
        )
