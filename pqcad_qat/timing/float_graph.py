"""The full-precision denoiser as an OpenVINO graph, the baseline of speed, and example inputs for timing.

Not here: the export of a quantized model (export/), and NNCF's INT8 version of this graph (baseline_trials.py).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from pqcad_qat.export.time_tables import Times, timestep_tables
from pqcad_qat.export.traceable_modules import TracedDenoiser, fixed_rotations, swapped
from pqcad_qat.models.denoiser import Condition
from pqcad_qat.models.families.family import TEXT
from pqcad_qat.timing.baseline_trials import save_openvino


def example_inputs(
    sample_shape: tuple[int, int, int],
    batch: int,
    seed: int = 0,
    condition: Condition | None = None,
    *,
    timestep_dtype: Literal["int64", "float32"] = "int64",
) -> dict[str, np.ndarray]:
    """Seeded example inputs under the exported models' names.

    They are Gaussian noise `sample`, (B, C, H, W) float32, the time step 500 as `timestep`, (B,), and `condition`, (B,
    ...) by name, where the model takes one.
    """
    noise = np.random.default_rng(seed).standard_normal((batch, *sample_shape), dtype=np.float32)
    return {
        "sample": noise,
        "timestep": np.full(batch, 500, timestep_dtype),
        **{n: v.numpy() for n, v in (condition or {}).items()},
    }


def convert_float(
    model: nn.Module,
    sample_shape: tuple[int, int, int],
    batch: int,
    folder: Path | None = None,
    *,
    times: Times | None = None,
    condition: Condition | None = None,
) -> ov.Model:
    """Convert a float denoiser to an OpenVINO model of static shape, with the export's port names.

    The inputs are sample, timestep and the conditions; the output is out_sample. The denoiser is left unchanged.

    Args:
        model: the denoiser in full precision.
        sample_shape: shape (C, H, W) of one sample.
        batch: fixed batch.
        folder: where the graph is saved as openvino_model.xml, its constants in float32; OpenVINO's default would round
            them to float16. None saves nothing.
        times: times of a table that replaces the time embedding, as in our own export. BF16 rounds time step 999 to
            1000, which would spoil a baseline's images for a reason unrelated to its quantization. None keeps the
            embedding.
        condition: example conditions by name.
    """
    dtype: Literal["int64", "float32"] = "float32" if isinstance(times, Tensor) else "int64"
    inputs = example_inputs(sample_shape, batch, condition=condition, timestep_dtype=dtype)
    example = (torch.from_numpy(inputs["sample"]), torch.from_numpy(inputs["timestep"]), *(condition or {}).values())
    replacements = {} if times is None else timestep_tables(model, times, {})
    replacements |= fixed_rotations(
        model, sample_shape, condition[TEXT].shape[1] if condition and TEXT in condition else None
    )
    training = model.training
    denoiser = TracedDenoiser(model.eval(), tuple(condition or {}))
    with swapped(model, replacements), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trace")  # shapes are static on purpose
        traced = torch.jit.trace(denoiser, example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        converted = ov.convert_model(traced, example_input=example, input=[list(tensor.shape) for tensor in example])
    model.train(training)
    for port, name in zip((*converted.inputs, converted.output(0)), (*inputs, "out_sample"), strict=True):
        port.get_tensor().set_names({name})
    if folder is not None:
        save_openvino(converted, folder)
    return converted
