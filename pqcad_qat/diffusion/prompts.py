"""Prompts become the conditions of a text-conditional model: through the text encoders of its own pipeline's folder.

Not here: what is done with conditions (conditions.py). Takes the library transformers, which the extra `text` installs.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from pqcad_qat.errors import ModelError

LAYOUTS = {
    "StableDiffusionPipeline": ("encoder_hidden_states", "unconditional.encoder_hidden_states"),
    "StableDiffusionXLPipeline": (
        "encoder_hidden_states",
        "unconditional.encoder_hidden_states",
        "text_embeds",
        "unconditional.text_embeds",
    ),
}
"""Class of a pipeline -> what its `encode_prompt` returns, in order, by the names of a file of embeddings."""

HEAVY = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that prompts are not encoded with."""

BATCH = 16
"""Prompts encoded at a time."""


@torch.no_grad()
def encode_prompts(prompts: Path, folder: Path) -> dict[str, Tensor]:
    """The tensors of a file of embeddings (conditions.py): of every prompt, and of the empty one as the unconditional.

    Args:
        prompts: a prompt a line; empty lines are passed over.
        folder: a local pipeline's, with its text encoders (safetensors) and tokenizers.

    Raises:
        ModelError: transformers is not installed, there are no prompts, or no pipeline of a known class with text encoders.
    """
    lines = _lines(prompts)
    if find_spec("transformers") is None:
        raise ModelError("conditions.prompts: takes the library transformers, which is not installed: pip install 'pqcad-qat[text]'")
    pipeline, names = _text_parts(folder)
    parts = [lines[first : first + BATCH] for first in range(0, len(lines), BATCH)]
    both = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    encoded = [dict(zip(names, pipeline.encode_prompt(part, **both), strict=True)) for part in parts]
    found = {name: torch.cat([part[name] for part in encoded]).float() for name in names}
    found |= {name: value[:1] for name, value in found.items() if name.startswith("unconditional.")}
    return found | _sizes(folder, len(lines), names)


def _lines(prompts: Path) -> list[str]:
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{prompts}: cannot be read as text: {error}; conditions.prompts names a file with a prompt a line") from error
    if not lines:
        raise ModelError(f"{prompts}: got no prompt; allowed one or more, a line each")
    return lines


def _text_parts(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """The pipeline with its text encoders alone, and the names of what they give."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"conditions.prompts: {folder} is no local pipeline's folder with a text encoder; conditions.embeddings takes a file"
        )
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if name not in LAYOUTS:
        raise ModelError(
            f"{index}: _class_name: got {name!r}; allowed for prompts {', '.join(LAYOUTS)}; conditions.embeddings takes a file of what the "
            "pipeline's own encode_prompt gives (README, Flow matching)"
        )
    pipeline_class = getattr(diffusers, name)
    known = json.loads(index.read_text(encoding="utf-8"))
    absent = {part: None for part in HEAVY if part in known}
    try:
        return pipeline_class.from_pretrained(folder, use_safetensors=True, local_files_only=True, **absent), LAYOUTS[name]
    except Exception as error:  # diffusers and transformers raise anything from OSError to KeyError on a damaged folder
        raise ModelError(f"{folder}: cannot load its text encoders: {error}") from error


def _sizes(folder: Path, count: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    """SDXL's sizes: an original and a target of the model's own size, not cropped."""
    if "text_embeds" not in names:
        return {}
    size = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]
    vae = folder / "vae" / "config.json"
    factor = 2 ** (len(json.loads(vae.read_text(encoding="utf-8"))["block_out_channels"]) - 1) if vae.is_file() else 8
    height, width = (factor * side for side in ((size, size) if isinstance(size, int) else size))
    sizes = torch.tensor([[height, width, 0, 0, height, width]])
    return {"time_ids": sizes.expand(count, -1).clone(), "unconditional.time_ids": sizes}
