"""What `serving` serves: one model deployed as int8 and packed, and the images of it that the full environment samples.

Not here: any test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from conftest import SCHEDULER
from deployed_fixture import PROVENANCE, SHAPE, quantized_unet

from pqcad_qat.deployment.export import export_model
from pqcad_qat.deployment.folder import copy_folder
from pqcad_qat.evaluation.variant import openvino_variant, sample_images

STEPS, IMAGES = 4, 4


def make(served: Path) -> None:
    """Write int8/, packed/ and images.npy, uint8 (B, C, H, W) of seed 0."""
    quantized = quantized_unet({"bits": 4}, {"bits": 8, "symmetric": False})
    folder, scheduler = served / "packed", {**SCHEDULER, "num_inference_steps": STEPS}
    export_model(quantized.model, scheduler, quantized.layers, SHAPE, 2, "packed", folder, PROVENANCE)
    variant = openvino_variant("full", folder)
    np.save(served / "images.npy", sample_images(variant, IMAGES, 0, IMAGES).numpy())
    copy_folder(folder, served / "int8", "int8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
