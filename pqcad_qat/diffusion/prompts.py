"""Prompts become the conditions of a text-conditional model: through the text encoders of its own pipeline's folder.

Not here: what is done with conditions (conditions.py). Takes the library transformers, which the extra `text` installs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from pqcad_qat.content_store import kept
from pqcad_qat.diffusion.pipeline_parts import TEXT_ENCODERS, TOKENIZERS, PipelineParts, check_transformers
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

EMBEDDINGS = "embeddings.safetensors"
"""What is kept of prompts once they are encoded."""


def kept_prompts(prompts: Path, folder: Path, store: Path) -> Path:
    """The file of embeddings of these prompts by the encoders of this folder: made once, and read back from the store from then on.

    Args:
        prompts, folder: as of `encode_prompts`.
        store: beside the runs; the file's place in it is named by the hash of the prompts, encoders, tokenizers and sizes.

    Raises:
        ModelError: as `encode_prompts`.
    """
    lines, (pipeline, names) = _lines(prompts), _layout(folder)
    decides = {
        "prompts": lines,
        "pipeline": pipeline,
        "encoders": PipelineParts(folder, {}).digest(*TEXT_ENCODERS, *TOKENIZERS),
        "sizes": {name: value.tolist() for name, value in _sizes(folder, 1, names).items()},
    }

    def make(draft: Path) -> None:
        save_file({name: value.contiguous() for name, value in encode_prompts(prompts, folder).items()}, draft / EMBEDDINGS)

    return kept(store, decides, make) / EMBEDDINGS


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
    check_transformers("conditions.prompts")
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


def _layout(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The class of the pipeline, and the names of what its encoders give."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"conditions.prompts: {folder} is no pipeline's folder with a text encoder; conditions.embeddings takes a file")
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if name not in LAYOUTS:
        raise ModelError(
            f"{index}: _class_name: got {name!r}; allowed for prompts {', '.join(LAYOUTS)}; conditions.embeddings takes a file of what the "
            "pipeline's own encode_prompt gives (README, Flow matching)"
        )
    return name, LAYOUTS[name]


def _text_parts(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """The pipeline with its text encoders alone, and the names of what they give."""
    name, names = _layout(folder)
    known = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent = {part: None for part in HEAVY if part in known}
    try:
        return getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, local_files_only=True, **absent), names
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
