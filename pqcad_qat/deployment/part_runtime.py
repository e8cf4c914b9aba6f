"""Run the other parts of a deployed folder: its VAE decoder, and its text encoders with their tokenizers.

Not here: the denoiser (runtime.py), how parts are made (parts.py), or what a pipeline makes of them (text_to_image.py). Needs openvino and
numpy; prompts take the library tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.deployment.compiled import Requests, compile_graph
from pqcad_qat.deployment.folder import GRAPH, PARTS, tokenizer_of
from pqcad_qat.deployment.runtime import Float32
from pqcad_qat.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PictureDecoder:
    """The VAE's decoder, compiled for one picture at a time.

    Attributes:
        config: diffusers' config of the VAE.
        factor: pixels of a picture's side for one of its latents'.
    """

    def __init__(
        self, folder: Path, sample_shape: tuple[int, int, int], device: str = "CPU", properties: Mapping[str, Any] | None = None
    ) -> None:
        """`folder` is deployed; `sample_shape` (C, h, w) is that of its latents."""
        self.config = _json(folder / PARTS["vae"] / "config.json")
        self.factor: int = 2 ** (len(self.config["block_out_channels"]) - 1)
        graph = _read(folder / PARTS["vae"])
        self._port = graph.inputs[0].get_any_name()
        self._requests = Requests(_compiled(graph, (1, *sample_shape), device, properties))

    def __call__(self, latents: Float32) -> Float32:
        """Pictures (N, 3, H, W), about in [-1, 1], of latents (N, C, h, w) as the denoiser gives them."""
        scaled = scaled_latents(self.config, latents)
        return np.concatenate([self._requests.infer({self._port: one}, [0])[0] for one in np.split(scaled, len(scaled))])


def scaled_latents(config: Mapping[str, Any], latents: Float32) -> Float32:
    """Latents (N, C, h, w) of a denoiser as its VAE takes them; by the mean and deviation of each channel where its config has them."""
    mean, deviation = (config.get(key) for key in ("latents_mean", "latents_std"))
    scaled = np.asarray(latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0), np.float32)
    if mean is None or deviation is None:
        return scaled
    spread, middle = (np.asarray(value, np.float32).reshape(1, -1, 1, 1) for value in (deviation, mean))
    return np.asarray(scaled * spread + middle, np.float32)


class PromptEncoder:
    """A text encoder and its tokenizer, compiled for one prompt at a time.

    Attributes:
        config: transformers' config of the encoder.
        outputs: what it can give, by name.
        layers: of a CLIP that gives `hidden_states.0` to `hidden_states.LAYERS`.
        tokens: that every prompt is filled up or cut to.
        masked: whether it is told which of the tokens are the prompt's, as PixArt's T5 is.
    """

    def __init__(self, folder: Path, part: str, device: str = "CPU", properties: Mapping[str, Any] | None = None) -> None:
        """`folder` is deployed; `part` is text_encoder, text_encoder_2 or text_encoder_3."""
        self.config = _json(folder / part / "config.json")
        graph = _read(folder / part)
        self.outputs = tuple(port.get_any_name() for port in graph.outputs)
        self.layers = sum(name.startswith("hidden_states.") for name in self.outputs) - 1
        self.tokens: int = graph.input("input_ids").get_partial_shape()[1].get_length()
        self.masked = len(graph.inputs) > 1
        self._tokenizer = _tokenizer(folder / tokenizer_of(part), self.tokens)
        self._requests = Requests(_compiled(graph, (1, self.tokens), device, properties))

    def ids(self, prompt: str) -> npt.NDArray[np.int64]:
        """(1, tokens)."""
        return np.array([self._tokenizer.encode(prompt).ids], np.int64)

    def mask(self, prompt: str) -> npt.NDArray[np.int64]:
        """(1, tokens): 1 for the prompt's tokens, 0 for those that fill it up."""
        return np.array([self._tokenizer.encode(prompt).attention_mask], np.int64)

    def __call__(self, prompt: str, outputs: Sequence[str]) -> dict[str, Float32]:
        """What the encoder gives for a prompt, by name, (1, ...)."""
        return self.encoded(self.ids(prompt), outputs, self.mask(prompt) if self.masked else None)

    def encoded(self, ids: npt.NDArray[np.int64], outputs: Sequence[str], mask: npt.NDArray[np.int64] | None = None) -> dict[str, Float32]:
        """The same for tokens (1, tokens), all of which count where no mask is given."""
        given = {"input_ids": ids} | ({"attention_mask": np.ones_like(ids) if mask is None else mask} if self.masked else {})
        return dict(zip(outputs, self._requests.infer(given, outputs), strict=True))


def _read(part: Path) -> ov.Model:
    """A part's graph.

    Raises:
        ModelError: OpenVINO cannot read it.
    """
    try:
        return ov.Core().read_model(part / GRAPH)
    except RuntimeError as error:
        raise ModelError(f"{part / GRAPH}: OpenVINO cannot read it: {error}") from error


def _compiled(graph: ov.Model, shape: tuple[int, ...], device: str, properties: Mapping[str, Any] | None) -> ov.CompiledModel:
    """A graph whose inputs all have this fixed shape.

    Raises:
        ModelError: OpenVINO cannot compile it.
    """
    try:
        graph.reshape({port: list(shape) for port in graph.inputs})
    except RuntimeError as error:
        raise ModelError(f"{graph.friendly_name}: OpenVINO cannot give its inputs the shape {shape}: {error}") from error
    return compile_graph(graph, ov.Core(), device, properties)


def _tokenizer(folder: Path, tokens: int) -> Tokenizer:
    """A tokenizer that cuts and fills up prompts as the pipeline's own does.

    Raises:
        ModelError: the library tokenizers is not installed, or the pipeline's padding token is not in the vocabulary.
    """
    if find_spec("tokenizers") is None:
        raise ModelError(f"{folder}: takes the library tokenizers, which is not installed: pip install tokenizers")
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = _json(folder / "tokenizer_config.json").get("pad_token")
    padding = named["content"] if isinstance(named, dict) else named
    if padding is None or (number := made.token_to_id(padding)) is None:
        raise ModelError(f"{folder / 'tokenizer_config.json'}: pad_token: got {named!r}; allowed a token of the vocabulary")
    made.enable_truncation(tokens)
    made.enable_padding(length=tokens, pad_id=number, pad_token=padding)
    return made


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
