"""A program that makes what `genai_pipelines` opens: tiny text-to-image folders, and this package's own pictures of
them from the same noise.

Not here: any test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from served_pipelines import SCHEDULES
from text_pipelines import FLOAT, T5_TOKENS, deployed
from torch import Tensor

from pqcad_qat.sampling.trajectory import initial_noise
from pqcad_qat.serving.text_to_image import TextToImage

KINDS: Mapping[str, Mapping[str, Any]] = {
    "stable-diffusion": {"guidance": 2.5},
    "stable-diffusion-2": {"guidance": 2.5},
    "stable-diffusion-xl": {"guidance": 2.5},
    "stable-diffusion-3": {"guidance": 2.5, "tokens": T5_TOKENS},
    "flux": {"guidance": 1.0, "tokens": T5_TOKENS},  # GenAI makes no second pass of guidance
}
"""Kind of pipeline -> the scale of classifier-free guidance, and the tokens that T5 is asked for."""

FORMS: Mapping[str, tuple[int | None, Mapping[str, str]]] = {
    "int8": (4, {"vae": "int8", "text_encoder": "int8-weights"}),
    "float": (None, FLOAT),
}
"""Form of the folder -> bits of the denoiser's weights, and formats of the other parts."""

ADAPTED, RANK = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp"), 2
"""Ends of the paths of the layers that an adapter changes, and its rank."""

PROMPT, NEGATIVE, STEPS, SEED = "a cat and a dog", "a mat", 4, 7

CASES: Mapping[str, Mapping[str, Any]] = {
    "text": {},
    "batch": {"count": 2, "size": (24, 32)},
    "image": {"size": (24, 32), "strength": 0.5},
    "inpainting": {"size": (24, 32), "strength": 1.0, "masked": True},
}
"""Case -> what is asked for: number and size of pictures, and for those that begin from one, how much of it changes."""


def make(served: Path) -> None:
    """For every kind and form, write KIND/FORM/openvino, and beside it for every case CASE.json and CASE.npz.

    CASE.npz has `noise` (N, C, h, w), `wanted`, uint8 (N, 3, H, W), and where it begins from a picture `image`, uint8
    (H, W, 3), and `mask`, uint8 (H, W).
    """
    for kind, of_kind in KINDS.items():
        for form, (bits, formats) in FORMS.items():
            folder = served / kind / form
            schedule = SCHEDULES.get(kind, SCHEDULES["stable-diffusion-xl"] if kind.endswith("2") else None)
            where = deployed(kind, folder, formats, schedule, bits=bits)
            pipeline = TextToImage.from_pretrained(where.folder, properties={"INFERENCE_PRECISION_HINT": "f32"})
            for case, asked in CASES.items():
                _make_case(pipeline, folder, case, {**of_kind, **asked})
        _make_adapted(served / kind, kind, of_kind)


def _make_adapted(folder: Path, kind: str, asked: Mapping[str, Any]) -> None:
    """Write an adapter, adapter.safetensors, a folder to which it is added at run time, `adapted`, and what our runtime
    makes of a folder of the model that it was fused into.
    """
    part = "transformer" if kind in ("stable-diffusion-3", "flux") else "unet"
    weights = Path("pipeline") / part / "diffusion_pytorch_model.safetensors"
    schedule = SCHEDULES.get(kind)
    deployed(kind, folder / "adapted", FLOAT, schedule)
    tensors, adapter = load_file(folder / "adapted" / weights), dict[str, Tensor]()
    dice = torch.Generator().manual_seed(0)
    for name, weight in list(tensors.items()):
        layer = name.removesuffix(".weight")
        if not layer.endswith(ADAPTED):
            continue
        down = torch.randn(RANK, weight.shape[1], generator=dice) / 2
        up = torch.randn(len(weight), RANK, generator=dice) * weight.std() * (1 if part == "unet" else 3)
        tensors[name] = weight + up @ down
        if part == "unet":  # kohya's names, which most files for Stable Diffusion have
            path = f"lora_unet_{layer.replace('.', '_')}"
            adapter |= {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up}
            adapter[f"{path}.alpha"] = torch.tensor(float(RANK))
        else:
            adapter |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter.safetensors")
    fused = deployed(
        kind, folder / "fused", FLOAT, schedule, change=lambda source: save_file(tensors, source.parent / weights)
    )
    for form, made in (("adapted", folder / "adapted" / "openvino"), ("fused", fused.folder)):
        pipeline = TextToImage.from_pretrained(made, properties={"INFERENCE_PRECISION_HINT": "f32"})
        _make_case(pipeline, folder / form, "text", asked)


def _make_case(pipeline: TextToImage, folder: Path, case: str, asked: Mapping[str, Any]) -> None:
    count, size = asked.get("count", 1), asked.get("size", (16, 16))
    negative = NEGATIVE if asked["guidance"] != 1.0 else None
    begins: dict[str, Any] = {}
    if "strength" in asked:
        rows, columns = np.mgrid[: size[0], : size[1]]
        waves = [np.sin(rows / period) * np.cos(columns / period) for period in (2.0, 3.0, 5.0)]
        begins["image"] = np.uint8(127.5 + 127.5 * np.stack(waves, -1))
        if asked.get("masked"):
            begins["mask"] = np.uint8(255 * (columns < size[1] // 2))
    wanted = pipeline(
        PROMPT,
        negative,
        asked["guidance"],
        STEPS,
        seed=SEED,
        count=count,
        size=size,
        strength=asked.get("strength"),
        **begins,
    )
    shape = (pipeline.denoiser.sample_shape[0], *(side // pipeline.decoder.factor for side in size))
    np.savez(folder / f"{case}.npz", noise=initial_noise(SEED, 0, count, shape), wanted=wanted, **begins)
    told = {"prompt": PROMPT, "negative": negative, "steps": STEPS, "count": count, "size": size, **asked}
    (folder / f"{case}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
