"""The classes that describe how a pipeline turns a prompt into conditions: which text encoder gives which condition.

Not here: the layouts themselves (with their families), or the encoders: diffusers' (models/prompts.py) and the deployed
ones (serving/part_runtime.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

LAST, PROJECTED = "last_hidden_state", "text_embeds"
"""Names of a text encoder's outputs: the hidden states of its last layer, and one vector for the whole text."""


class TextEncoder(Protocol):
    """A deployed text encoder with its tokenizer.

    Attributes:
        outputs: names of the outputs that it can give.
        layers: number of layers of a CLIP, whose outputs are `hidden_states.0` to `hidden_states.LAYERS`.
    """

    outputs: tuple[str, ...]
    layers: int

    def __call__(self, prompt: str, outputs: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """Return the named outputs for a prompt, each (1, ...)."""

    def mask(self, prompt: str) -> npt.NDArray[np.int64]:
        """Return the mask (1, tokens): 1 for the prompt's tokens, 0 for padding."""


@dataclass(frozen=True)
class Wanted:
    """Properties of the conditions that a denoiser needs.

    Attributes:
        shapes: mapping from a condition's name to its shape without the batch.
        picture: height and width of the image in pixels.
        guidance: guidance value for a denoiser that takes it as an input.
    """

    shapes: Mapping[str, tuple[int, ...]]
    picture: tuple[int, int]
    guidance: float


Encoders = Mapping[str, TextEncoder]
Conditions = Callable[[Encoders, str, Wanted], Arrays]
"""Function (text encoders by part, prompt, properties wanted) -> the denoiser's conditions by name, each (1, ...)."""


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """How one class of pipelines reads a prompt.

    Attributes:
        gives: outputs of its `encode_prompt` in order, by their names in an embeddings file; "" for one that is not
            kept.
        encoders: the text encoders that a prompt needs.
        optional: encoders that may be left out, with zeros for their output.
        conditions: function that does the work of `encode_prompt` with deployed encoders.
        reads_denoiser: whether its `encode_prompt` reads the denoiser's config.
        before_t5: the encoder whose tokens precede T5's in one sequence; None without such an encoder.
        guidance: default guidance value for a denoiser that takes it as an input.
    """

    gives: tuple[str, ...]
    encoders: tuple[str, ...]
    conditions: Conditions
    optional: tuple[str, ...] = ()
    reads_denoiser: bool = False
    before_t5: str | None = None
    guidance: float = 1.0


def two_clips(encoders: Encoders, prompt: str) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
    """Return the last hidden states but one of both CLIPs, side by side, and each one's vector for the whole text.

    The vector of an encoder without that output is empty.
    """
    states, pooled = [], []
    for part in ("text_encoder", "text_encoder_2"):
        encoder = encoders[part]
        name = f"hidden_states.{encoder.layers - 1}"
        encoded = encoder(prompt, [name, PROJECTED] if PROJECTED in encoder.outputs else [name])
        states.append(encoded[name])
        pooled.append(encoded.get(PROJECTED, np.zeros((1, 0), np.float32)))
    return np.concatenate(states, -1), pooled
