"""Run the other parts of a deployed folder: its VAE decoder, and its text encoders with their tokenizers.

Not here: the denoiser (runtime.py), how parts are made (part_export.py), or what a pipeline makes of them
(text_to_image.py). Needs openvino and numpy; prompts take the library tokenizers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.serving.compiled_graph import Requests, compile_graph, reason, shared_core
from pqcad_qat.serving.deployed_folder import tokenizer_of
from pqcad_qat.serving.graph_checks import port_of
from pqcad_qat.serving.manifest import CONFIG, GRAPH, LARGEST_SIDE, PARTS, WEIGHTS
from pqcad_qat.serving.packing import UNREADABLE, read_text_and_weights
from pqcad_qat.serving.runtime import Float32

if TYPE_CHECKING:
    from tokenizers import Tokenizer


MOST_BLOCKS, MOST_SCALE = 12, 1e9
"""Bounds on a VAE's config."""


class PictureDecoder:
    """The VAE's decoder, compiled for one picture at a time; it may be called from any number of threads.

    Attributes:
        config: diffusers' config of the VAE.
        factor: pixels of a picture's side for one of its latents'.
    """

    def __init__(
        self,
        folder: Path,
        sample_shape: tuple[int, int, int],
        device: str = "CPU",
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        """`folder` is deployed; `sample_shape` (C, h, w) is that of its latents.

        Raises:
            ModelError: its files cannot be read, or make no pictures of such latents.
        """
        part = folder / PARTS["vae"]
        self.config = read_json(part / CONFIG)
        blocks = self.config.get("block_out_channels")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= MOST_BLOCKS:
            raise ModelError(
                f"{part / CONFIG}: block_out_channels: got {shown(blocks)}; allowed a list of 1 to {MOST_BLOCKS}"
            )
        self.factor: int = 2 ** (len(blocks) - 1)
        _check_scale(self.config, sample_shape[0], part / CONFIG)
        graph = _read(part, {"latent_sample"})
        _reshape(graph, (1, *sample_shape), part)
        _, height, width = sample_shape
        pictures = ([1, 3, self.factor * height, self.factor * width], "float32")
        if (got := port_of(graph.outputs[0])) != pictures:
            raise ModelError(f"{part / GRAPH}: got the output {got}; allowed {pictures}, of latents {sample_shape}")
        self._requests = Requests(compile_graph(graph, shared_core(), device, properties))

    def __call__(self, latents: Float32) -> Float32:
        """Pictures (N, 3, H, W), about in [-1, 1], of latents (N, C, h, w) as the denoiser gives them."""
        scaled = scaled_latents(self.config, latents)
        return np.concatenate(
            [self._requests.infer({"latent_sample": one}, [0])[0] for one in np.split(scaled, len(scaled))]
        )


def scaled_latents(config: Mapping[str, Any], latents: Float32) -> Float32:
    """Latents (N, C, h, w) of a denoiser as its VAE takes them; by the mean and deviation of each channel where its
    config has them.
    """
    mean, deviation = (config.get(key) for key in ("latents_mean", "latents_std"))
    scaled = np.asarray(latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0), np.float32)
    if mean is None or deviation is None:
        return scaled
    spread, middle = (np.asarray(value, np.float32).reshape(1, -1, 1, 1) for value in (deviation, mean))
    return np.asarray(scaled * spread + middle, np.float32)


class PromptEncoder:
    """A text encoder and its tokenizer, compiled for one prompt at a time; it may be called from any number of threads.

    Attributes:
        config: transformers' config of the encoder.
        outputs: what it can give, by name.
        layers: of a CLIP that gives `hidden_states.0` to `hidden_states.LAYERS`.
        tokens: that every prompt is filled up or cut to.
        masked: whether it is told which of the tokens are the prompt's, as PixArt's T5 is.
    """

    def __init__(
        self, folder: Path, part: str, device: str = "CPU", properties: Mapping[str, Any] | None = None
    ) -> None:
        """`folder` is deployed; `part` is text_encoder, text_encoder_2 or text_encoder_3.

        Raises:
            ModelError: its files or its tokenizer's cannot be read, or the library tokenizers is not installed.
        """
        self._part = folder / part
        self.config = read_json(self._part / CONFIG)
        graph = _read(self._part, {"input_ids"})
        self.outputs = tuple(name for port in graph.outputs for name in port.get_names())
        self.layers = sum(name.startswith("hidden_states.") for name in self.outputs) - 1
        sizes, _ = port_of(graph.input("input_ids"))
        if len(sizes) != 2 or not 1 <= sizes[1] <= LARGEST_SIDE:
            raise ModelError(
                f"{self._part / GRAPH}: got input_ids of shape {sizes}; allowed (B, 1 to {LARGEST_SIDE} tokens)"
            )
        self.tokens: int = sizes[1]
        self.masked = len(graph.inputs) > 1
        self._tokenizer = _tokenizer(folder / tokenizer_of(part), self.tokens)
        _reshape(graph, (1, self.tokens), self._part)
        self._requests = Requests(compile_graph(graph, shared_core(), device, properties))

    def ids(self, prompt: str) -> npt.NDArray[np.int64]:
        """(1, tokens)."""
        return np.array([self._tokenizer.encode(prompt).ids], np.int64)

    def mask(self, prompt: str) -> npt.NDArray[np.int64]:
        """(1, tokens): 1 for the prompt's tokens, 0 for those that fill it up."""
        return np.array([self._tokenizer.encode(prompt).attention_mask], np.int64)

    def cut(self, prompt: str) -> str:
        """The end of a prompt that the encoder does not read, since it is longer than its tokens."""
        more = self._tokenizer.encode(prompt).overflowing
        places = zip(more[0].offsets, more[0].special_tokens_mask, strict=True) if more else ()
        starts = [start for (start, end), special in places if not special and end > start]
        return prompt[min(starts) :] if starts else ""

    def __call__(self, prompt: str, outputs: Sequence[str]) -> dict[str, Float32]:
        """What the encoder gives for a prompt, by name, (1, ...)."""
        return self.encoded(self.ids(prompt), outputs, self.mask(prompt) if self.masked else None)

    def encoded(
        self, ids: npt.NDArray[np.int64], outputs: Sequence[str], mask: npt.NDArray[np.int64] | None = None
    ) -> dict[str, Float32]:
        """The same for tokens (1, tokens), all of which count where no mask is given."""
        given = {"input_ids": ids} | (
            {"attention_mask": np.ones_like(ids) if mask is None else mask} if self.masked else {}
        )
        if missing := [name for name in outputs if name not in self.outputs]:
            raise ModelError(
                f"{self._part / GRAPH}: got no output {missing[0]}; allowed one, which the denoiser's text is made of"
            )
        return dict(zip(outputs, self._requests.infer(given, outputs), strict=True))


def _check_scale(config: Mapping[str, Any], channels: int, path: Path) -> None:
    """Raise ModelError for a VAE's config that `scaled_latents` cannot take."""
    rules = {
        "scaling_factor": (
            _is_number(config.get("scaling_factor")) and bool(config["scaling_factor"]),
            "a number other than 0",
        ),
        "shift_factor": (config.get("shift_factor") is None or _is_number(config["shift_factor"]), "null or a number"),
    }
    for key in ("latents_mean", "latents_std"):
        got = config.get(key)
        each = isinstance(got, list) and len(got) == channels and all(map(_is_number, got))
        rules[key] = (got is None or each, f"null or {channels} numbers, one a channel")
    for key, (fits, allowed) in rules.items():
        if not fits:
            raise ModelError(f"{path}: {key}: got {shown(config.get(key))}; allowed {allowed}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < MOST_SCALE


def _read(part: Path, needed: Collection[str]) -> ov.Model:
    """A part's graph, which has an input of these names, and outputs.

    Raises:
        ModelError: OpenVINO cannot read it, or it has not.
    """
    graph = read_text_and_weights(part / GRAPH, part / WEIGHTS, shared_core())
    try:
        known = {name for port in (*graph.inputs, *graph.outputs) for name in port.get_names()}
    except UNREADABLE as error:
        raise ModelError(f"{part / GRAPH}: OpenVINO cannot read it: {reason(error)}") from error
    if not known.issuperset(needed) or not graph.outputs:
        raise ModelError(
            f"{part / GRAPH}: got a graph without {', '.join(needed)} or without outputs; allowed one with both"
        )
    return graph


def _reshape(graph: ov.Model, shape: tuple[int, ...], part: Path) -> None:
    """Give all inputs of a graph this fixed shape.

    Raises:
        ModelError: OpenVINO cannot.
    """
    try:
        graph.reshape({port: list(shape) for port in graph.inputs})
    except UNREADABLE as error:
        raise ModelError(
            f"{part / GRAPH}: OpenVINO cannot give its inputs the shape {shape}: {reason(error)}"
        ) from error


def _tokenizer(folder: Path, tokens: int) -> Tokenizer:
    """A tokenizer that cuts and fills up prompts as the pipeline's own does.

    Raises:
        ModelError: the library tokenizers is not installed, the files cannot be read, or the padding token is not in
            the vocabulary.
    """
    if find_spec("tokenizers") is None:
        raise ModelError(f"{folder}: takes the library tokenizers, which is not installed: pip install tokenizers")
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder / 'tokenizer.json'}: no such file; a text encoder takes its tokenizer")
    try:
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no other class
        raise ModelError(f"{folder / 'tokenizer.json'}: cannot be read as a tokenizer: {reason(error)}") from error
    named = read_json(folder / "tokenizer_config.json").get("pad_token")
    padding = named.get("content") if isinstance(named, dict) else named
    number = made.token_to_id(padding) if isinstance(padding, str) and _encodable(padding) else None
    if padding is None or number is None:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: pad_token: got {shown(named)}; allowed a token of the vocabulary"
        )
    made.enable_truncation(tokens)
    made.enable_padding(length=tokens, pad_id=number, pad_token=padding)
    return made


def _encodable(text: str) -> bool:
    """Whether the library can take it: it has no lone surrogate, as a damaged file's JSON may."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text
