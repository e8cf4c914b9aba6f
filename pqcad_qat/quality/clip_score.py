"""CLIP score, which tells how well pictures show what their prompts say (Hessel et al. 2021, arXiv 2104.08718).

The CLIP model is a folder that transformers can load, with weights in safetensors; loading runs no code of it.
Not here: which prompt an image was made for (stages/clip_scores.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import file_digest
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.models.config_values import silent
from pqcad_qat.models.model_folder import CONFIG
from pqcad_qat.models.pipeline_parts import check_transformers, load_with_transformers, loading

SCALE = 100
"""Factor of the cosine, as is customary; Hessel et al. take 2.5 in its place."""

BATCH = 32
"""Number of pictures at a time."""

MODEL = "CLIPModel"
"""Class in transformers of the models that are read."""

PROCESSORS = (("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json"))
"""Files that tell how prompts become inputs, and pictures; one of each kind is enough."""


@dataclass(frozen=True)
class ClipScore:
    """Mean score of images, from 0 to 100, and its standard error; None for a single image."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Clip:
    """A CLIP model with what makes its inputs of prompts and pictures; all three are classes of transformers."""

    model: Any
    tokenizer: Any
    preprocessor: Any


def check_clip(folder: Path) -> None:
    """Check that a folder is a CLIP model that can be loaded, without keeping its weights.

    Raises:
        ModelError: it is not, or transformers is not installed.
    """
    check_transformers(str(folder))
    kind = read_json(folder / CONFIG, "the folder of a CLIP model").get("model_type")
    if kind != "clip":
        raise ModelError(f"{folder / CONFIG}: model_type: got {shown(kind)}; allowed 'clip'")
    _processors(folder)
    load_with_transformers(folder, MODEL, device_map="meta")


def clip_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the folder's files, in hexadecimal."""
    lines = [f"{file.name} {file_digest(file)}\n" for file in sorted(folder.iterdir()) if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_clip(folder: Path) -> Clip:
    """Load a CLIP model in float32 and evaluation mode.

    Raises:
        ModelError: a file is missing or damaged.
    """
    return Clip(load_with_transformers(folder, MODEL).eval().requires_grad_(False), *_processors(folder))


def clip_scorer(folder: Path, prompts: Sequence[str]) -> Callable[[Tensor], ClipScore]:
    """Load a CLIP model, and return the function that scores uint8 pictures (N, C, H, W), one for each of N prompts.

    Raises:
        ModelError: a file is missing or damaged.
    """
    clip = load_clip(folder)
    different = list(dict.fromkeys(prompts))
    wanted = prompt_embeddings(clip, different)[[different.index(prompt) for prompt in prompts]]

    def scored(pictures: Tensor) -> ClipScore:
        return clip_score(
            torch.cat([picture_embeddings(clip, batch) for batch in torch.split(pictures, BATCH)]), wanted
        )

    return scored


def clip_name(folder: Path) -> str:
    """Name and SHA-256 of a CLIP model, as reports show it."""
    return f"{folder.name}, sha256 {clip_digest(folder)}"


@torch.no_grad()
def prompt_embeddings(clip: Clip, prompts: Sequence[str]) -> Tensor:
    """Embed prompts as float32 (P, D) of length 1; those that are too long for the model are cut."""
    longest = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return normalize(clip.model.get_text_features(**tokens).pooler_output)


@torch.no_grad()
def picture_embeddings(clip: Clip, pictures: Tensor) -> Tensor:
    """Embed uint8 pictures (N, C, H, W) as float32 (N, D) of length 1; grey is repeated."""
    pixels = pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    inputs = clip.preprocessor(images=[Image.fromarray(each) for each in pixels], return_tensors="pt")
    return normalize(clip.model.get_image_features(inputs["pixel_values"]).pooler_output)


def clip_score(pictures: Tensor, prompts: Tensor) -> ClipScore:
    """Score embeddings of pictures (N, D) against those of the prompts (N, D) that they were made for, pair by pair."""
    scores = SCALE * (pictures * prompts).sum(dim=1).double().clamp(min=0)
    error = None if len(scores) < 2 else float(scores.std()) / math.sqrt(len(scores))
    return ClipScore(float(scores.mean()), error)


def _processors(folder: Path) -> tuple[Any, Any]:
    """Load the tokenizer, and what prepares pictures: by Pillow, so that scores do not depend on torchvision."""
    from transformers import AutoImageProcessor, CLIPTokenizer

    for names in PROCESSORS:
        if not any((folder / name).is_file() for name in names):
            raise ModelError(f"{folder}: got no {' or '.join(names)}; allowed a {MODEL} with its processor")
    with loading(folder, "processor"), silent("transformers"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "backend": "pil"}
        return tokenizer, AutoImageProcessor.from_pretrained(folder, **options)
