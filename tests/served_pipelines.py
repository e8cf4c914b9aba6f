"""What `optimum_pipelines` loads: tiny text-to-image folders, and the images of a prompt that our runtime makes of them.

Not here: any test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from text_pipelines import deployed

from pqcad_qat.deployment.text_to_image import TextToImage
from pqcad_qat.diffusion.sampling import initial_noise

ASKED = {"prompt": "a cat and two dogs", "negative": "a mat", "guidance": 2.5, "steps": 4, "seed": 7}


def make(served: Path) -> None:
    """Write KIND/openvino, and in KIND/ asked.json, noise.npy (1, C, h, w) and image.npy, uint8 (1, 3, H, W), for every kind."""
    for kind in ("stable-diffusion", "stable-diffusion-xl"):
        where = deployed(kind, served / kind, {"vae": "int8", "text_encoder": "int8-weights"})
        pipeline = TextToImage.from_pretrained(where.folder, properties={"INFERENCE_PRECISION_HINT": "f32"})
        image = pipeline(ASKED["prompt"], ASKED["negative"], ASKED["guidance"], ASKED["steps"], ASKED["seed"])  # type: ignore[arg-type]
        np.save(served / kind / "image.npy", image)
        np.save(served / kind / "noise.npy", initial_noise(ASKED["seed"], 0, 1, pipeline.denoiser.sample_shape))  # type: ignore[arg-type]
        (served / kind / "asked.json").write_text(json.dumps(ASKED))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
