"""A program that makes what `optimum_pipelines` loads: tiny text-to-image folders, and the images of a prompt by this
package's runtime.

Not here: any test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from text_pipelines import T5_TOKENS, deployed

from pqcad_qat.models.families.latent_rows import packed
from pqcad_qat.sampling.trajectory import initial_noise
from pqcad_qat.serving.text_to_image import TextToImage

ASKED = {"prompt": "a cat and a dog", "negative": "a mat", "guidance": 2.5, "steps": 4, "seed": 7}

T5 = {"max_sequence_length": T5_TOKENS, "height": 16, "width": 16}

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
EPSILON = {**BETAS, "prediction_type": "epsilon", "set_alpha_to_one": False}
SCHEDULES = {"stable-diffusion": EPSILON, "stable-diffusion-xl": {**BETAS, "prediction_type": "v_prediction"}}
"""Schedules of Stable Diffusion, by kind of pipeline, with both predictions."""

CALLED: Mapping[str, Mapping[str, Any]] = {
    "stable-diffusion": {"guidance_scale": ASKED["guidance"]},
    "stable-diffusion-xl": {"guidance_scale": ASKED["guidance"]},
    "stable-diffusion-3": {"guidance_scale": ASKED["guidance"], **T5},
    "flux": {"true_cfg_scale": ASKED["guidance"], "guidance_scale": 3.5, **T5},
}
"""Mapping from the kind of pipeline to the arguments by which its diffusers class makes the same image."""


def make(served: Path) -> None:
    """For every kind, write KIND/openvino, and in KIND/ asked.json, noise.npy and image.npy.

    noise.npy is (1, C, h, w), or packed for Flux; image.npy is uint8 (1, 3, H, W).
    """
    for kind, called in CALLED.items():
        formats = {"vae": "int8", "text_encoder": "int8-weights"}
        where = deployed(kind, served / kind, formats, SCHEDULES.get(kind))
        pipeline = TextToImage.from_pretrained(where.folder, properties={"INFERENCE_PRECISION_HINT": "f32"})
        image = pipeline(ASKED["prompt"], ASKED["negative"], ASKED["guidance"], ASKED["steps"], seed=ASKED["seed"])
        np.save(served / kind / "image.npy", image)
        noise = initial_noise(ASKED["seed"], 0, 1, pipeline.denoiser.sample_shape)  # type: ignore[arg-type]
        np.save(served / kind / "noise.npy", packed(noise) if kind == "flux" else noise)
        asked = {"prompt": ASKED["prompt"], "negative_prompt": ASKED["negative"], "num_inference_steps": ASKED["steps"]}
        (served / kind / "asked.json").write_text(json.dumps({**asked, **called}))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
