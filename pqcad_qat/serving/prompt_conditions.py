"""What each class of pipeline makes of a prompt: which of its text encoders gives which of the denoiser's conditions.

Not here: the encoders (part_runtime.py), or what is sampled with the conditions (text_to_image.py). Needs numpy. Each
function does what the `encode_prompt` of its class does in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pqcad_qat.serving.graph_inputs import TEXT
from pqcad_qat.serving.part_runtime import PromptEncoder

Arrays = dict[str, npt.NDArray[Any]]

MASK, POOLED = "encoder_attention_mask", "pooled_projections"
LAST, PROJECTED = "last_hidden_state", "text_embeds"

FLUX_GUIDANCE = 3.5
"""As an input, of a folder that does not say another: what FluxPipeline asks for."""


@dataclass(frozen=True)
class Wanted:
    """What the denoiser asks for.

    Attributes:
        shapes: name of a condition -> its shape without the batch.
        picture: height and width in pixels.
        guidance: that a denoiser is told that takes it as an input.
    """

    shapes: Mapping[str, tuple[int, ...]]
    picture: tuple[int, int]
    guidance: float


Encoders = Mapping[str, PromptEncoder]
Conditions = Callable[[Encoders, str, Wanted], Arrays]
"""(text encoders by part, prompt, what is wanted) -> the denoiser's conditions by name, (1, ...)."""


def _stable_diffusion(encoders: Encoders, prompt: str, _: Wanted) -> Arrays:
    return {TEXT: encoders["text_encoder"](prompt, [LAST])[LAST]}


def _stable_diffusion_xl(encoders: Encoders, prompt: str, wanted: Wanted) -> Arrays:
    states, pooled = _two_clips(encoders, prompt)
    # of the original, not cropped, and of the picture
    sizes = np.array([[*wanted.picture, 0, 0, *wanted.picture]], np.int64)
    return {TEXT: states, PROJECTED: pooled[1], "time_ids": sizes}


def _stable_diffusion_3(encoders: Encoders, prompt: str, wanted: Wanted) -> Arrays:
    """CLIP's tokens, filled up to T5's width, and T5's; zeros for the latter where it was left out."""
    states, pooled = _two_clips(encoders, prompt)
    text = np.zeros((1, *wanted.shapes[TEXT]), np.float32)
    tokens, width = states.shape[1:]
    text[:, :tokens, :width] = states
    if "text_encoder_3" in encoders:
        text[:, tokens:] = encoders["text_encoder_3"](prompt, [LAST])[LAST]
    return {TEXT: text, POOLED: np.concatenate(pooled, -1)}


def _flux(encoders: Encoders, prompt: str, wanted: Wanted) -> Arrays:
    pooled = encoders["text_encoder"](prompt, ["pooler_output"])["pooler_output"]
    told = {"guidance": np.array([wanted.guidance], np.float32)} if "guidance" in wanted.shapes else {}
    return {TEXT: encoders["text_encoder_2"](prompt, [LAST])[LAST], POOLED: pooled} | told


def _pixart(encoders: Encoders, prompt: str, _: Wanted) -> Arrays:
    encoder, cleaned = encoders["text_encoder"], prompt.lower().strip()
    return {TEXT: encoder(cleaned, [LAST])[LAST], MASK: encoder.mask(cleaned).astype(np.float32)}


def _two_clips(encoders: Encoders, prompt: str) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
    """The last layer but one of both, side by side, and what each gives for the text as a whole, if it does."""
    states, pooled = [], []
    for part in ("text_encoder", "text_encoder_2"):
        encoder = encoders[part]
        name = f"hidden_states.{encoder.layers - 1}"
        outputs = [name, PROJECTED] if PROJECTED in encoder.outputs else [name]
        found = encoder(prompt, outputs)
        states.append(found[name])
        pooled.append(found.get(PROJECTED, np.zeros((1, 0), np.float32)))
    return np.concatenate(states, -1), pooled


@dataclass(frozen=True)
class PromptLayout:
    """A class of pipelines.

    Attributes:
        encoders: that a prompt takes.
        conditions: what is made of them.
        optional: an encoder for which zeros may stand.
    """

    encoders: tuple[str, ...]
    conditions: Conditions
    optional: tuple[str, ...] = ()


LAYOUTS: Mapping[str, PromptLayout] = {
    "StableDiffusionPipeline": PromptLayout(("text_encoder",), _stable_diffusion),
    "StableDiffusionXLPipeline": PromptLayout(("text_encoder", "text_encoder_2"), _stable_diffusion_xl),
    "StableDiffusion3Pipeline": PromptLayout(
        ("text_encoder", "text_encoder_2"), _stable_diffusion_3, ("text_encoder_3",)
    ),
    "FluxPipeline": PromptLayout(("text_encoder", "text_encoder_2"), _flux),
    "PixArtAlphaPipeline": PromptLayout(("text_encoder",), _pixart),
}
"""By the name of diffusers' class."""
