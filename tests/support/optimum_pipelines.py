"""A check of deployed text-to-image folders in optimum-intel's OVDiffusionPipeline: they execute in INT8, and give the
images of this package's runtime.

`tox -e check,optimum` runs it where optimum-intel is installed and this package is not, on folders that
`served_pipelines` made.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from int8_nodes import int8_layers
from optimum.intel import OVDiffusionPipeline

CLASSES = {
    "stable-diffusion": "OVStableDiffusionPipeline",
    "stable-diffusion-xl": "OVStableDiffusionXLPipeline",
    "stable-diffusion-3": "OVStableDiffusion3Pipeline",
    "flux": "OVFluxPipeline",
}

LEVELS = 1
"""Largest difference of two pictures with fixed shapes, in levels of 255; it comes from the order in which a step's
terms are added.
"""

NEAR_DB = 30.0
"""Smallest PSNR in dB with dynamic shapes, optimum-intel's default. Its kernels then add in another order, and values
beside a rounding boundary fall to either side of it.
"""


def image_of(pipeline: Any, kind: Path) -> np.ndarray:
    """Picture (1, 3, H, W) of the request in asked.json, in whole numbers from 0 to 255."""
    asked = json.loads((kind / "asked.json").read_text())
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(latents=torch.from_numpy(np.load(kind / "noise.npy")), output_type="np", **asked).images
    return np.rint(255 * found.transpose(0, 3, 1, 2))


def check(kind: Path) -> None:
    """Raise AssertionError if the pipeline has another class, its denoiser leaves INT8, or its picture differs."""
    wanted = np.load(kind / "image.npy").astype(float)
    assert wanted.std() > 10
    pipeline = OVDiffusionPipeline.from_pretrained(kind / "openvino", ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    assert type(pipeline).__name__ == CLASSES[kind.name], type(pipeline)
    free = image_of(pipeline, kind)
    decibels = 20 * np.log10(255 / np.sqrt(np.mean((free - wanted) ** 2) + 1e-9))
    assert decibels > NEAR_DB, f"{kind.name}: {decibels:.1f} dB with free sizes"
    planned = json.loads((kind / "openvino" / "manifest.json").read_text())["layers"]
    executed = int8_layers((pipeline.unet or pipeline.transformer).request, planned)
    assert executed == planned.keys(), f"{kind.name}: {len(executed)} of {len(planned)} planned layers in INT8"
    pipeline.reshape(batch_size=1, height=wanted.shape[2], width=wanted.shape[3], num_images_per_prompt=1)
    off = np.abs(image_of(pipeline, kind) - wanted).max()
    assert off <= LEVELS, f"{kind.name}: off by {off} of 255"
    print(
        f"{kind.name}: off by {off:.0f} of 255, with free sizes by {np.abs(free - wanted).max():.0f}, the "
        "denoiser in INT8"
    )


def main(served: Path) -> None:
    assert importlib.util.find_spec("pqcad_qat") is None
    for name in CLASSES:
        check(served / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
