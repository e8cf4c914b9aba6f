"""A deployed denoiser against what a user would run instead: PyTorch, OpenVINO float32 and BF16, NNCF's post-training INT8.

Not here: how a call is timed (benchmark.py), nor image quality (fidelity.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DModel
from rich.console import Console
from torch import nn

from pqcad_qat.deployment.runtime import OVUNet2DModel
from pqcad_qat.diffusion.denoiser import read_json
from pqcad_qat.evaluation.benchmark import (
    BF16,
    F32,
    Inputs,
    convert_float,
    example_inputs,
    nncf_baseline,
    openvino_candidate,
    time_interleaved,
    torch_candidate,
)
from pqcad_qat.evaluation.hardware import hardware
from pqcad_qat.evaluation.record import Timing

WARM_UP = 3
PRECISIONS: Mapping[str, Mapping[str, str]] = {"ov-fp32": F32, "ov-bf16": BF16}
"""What a variant asks of OpenVINO; the others take its defaults."""


def time_denoisers(denoiser: nn.Module, files: Mapping[str, Path], inputs: Inputs, runs: int) -> dict[str, Timing]:
    """Milliseconds of one call (one sampling step of a batch), every candidate in turns in this process.

    Args:
        denoiser: full precision, for PyTorch: the candidate `fp32`.
        files: variant -> what OpenVINO runs, a graph's xml or a deployed folder; `ov-bf16` is left out where BF16 is not native.
        inputs: of every candidate.
    """
    threads = torch.get_num_threads()  # PyTorch is timed on every core; what comes after goes on as before
    candidates: dict[str, Callable[[], object]] = {"fp32": torch_candidate(denoiser, inputs)}
    for name, file in files.items():
        if name != "ov-bf16" or hardware().native_bf16:
            candidates[name] = openvino_candidate(file, PRECISIONS.get(name, {}), inputs)
    try:
        return time_interleaved(candidates, runs, WARM_UP)
    finally:
        torch.set_num_threads(threads)


def compare_speed(folder: Path, runs: int, console: Console) -> dict[str, Timing]:
    """Time a deployed folder against its own architecture with random weights, which cost what trained ones cost.

    Raises:
        ModelError: the folder (or `openvino/` in it) is not a deployed one.
    """
    deployed = OVUNet2DModel.from_pretrained(folder / "openvino" if (folder / "openvino").is_dir() else folder)
    denoiser = UNet2DModel.from_config(read_json(deployed.folder / "unet" / "config.json")).eval()
    with tempfile.TemporaryDirectory() as temporary, console.status("building the baselines, then timing in turns"):
        plain = convert_float(denoiser, deployed.sample_shape, deployed.batch_size, Path(temporary) / "float")
        noise = [example_inputs(deployed.sample_shape, deployed.batch_size, seed) for seed in range(16)]
        nncf_xml = nncf_baseline(plain, noise, Path(temporary) / "nncf")
        float_xml = Path(temporary) / "float" / nncf_xml.name
        files = {"ov-fp32": float_xml, "ov-bf16": float_xml, "nncf-int8": nncf_xml, "pqcad-openvino": deployed.folder}
        return time_denoisers(denoiser, files, example_inputs(deployed.sample_shape, deployed.batch_size), runs)
