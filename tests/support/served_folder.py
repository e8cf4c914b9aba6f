"""A program that makes what `serving` serves: one model deployed as int8 and packed, a text-to-image pipeline, and
their images from the full environment.

Not here: any test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from deployed_fixture import PROVENANCE, SHAPE, quantized_unet
from serving import images_of, page_script
from tiny_runs import SCHEDULER

from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.serving.deployed_folder import copy_folder
from pqcad_qat.stages.samplers import openvino_variant, sample_images

STEPS, IMAGES = 4, 4


def make(served: Path) -> None:
    """Write int8/ and packed/, and beside them int8.npy and packed.npy: uint8 images (B, C, H, W) of seed 0."""
    quantized = quantized_unet({"bits": 4}, {"bits": 8, "symmetric": False})
    folder, scheduler = served / "packed", {**SCHEDULER, "num_inference_steps": STEPS}
    request = ExportRequest(quantized.model, scheduler, quantized.layers, SHAPE, batch_size=2, provenance=PROVENANCE)
    export_model(request, folder, "packed")
    variant = openvino_variant("full", folder)
    copy_folder(folder, served / "int8", "int8")
    for name in ("int8", "packed"):
        np.save(served / f"{name}.npy", sample_images(variant, IMAGES, 0, IMAGES).numpy())


def make_pipeline(served: Path) -> None:
    """Write text/openvino, and text.npy, the images of the page's prompt; this needs transformers."""
    from text_pipelines import deployed

    folder = deployed("stable-diffusion", served / "text", {"vae": "auto", "text_encoder": "auto"}).folder
    np.save(served / "text.npy", images_of(page_script("prompt"), folder))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    make_pipeline(Path(sys.argv[1]))
