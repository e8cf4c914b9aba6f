"""Running of a deployed folder's text encoders with their tokenizers, and reading of any part beside the denoiser.

Not here: the denoiser (runtime.py), the VAE (vae_runtime.py), how parts are made (part_export.py), or how a pipeline
uses them (text_to_image.py). Needs openvino and numpy; prompts also need the library tokenizers.
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
from pqcad_qat.serving.manifest import CONFIG, GRAPH, LARGEST_SIDE, WEIGHTS
from pqcad_qat.serving.on_demand import OnDemand
from pqcad_qat.serving.packing import UNREADABLE, read_text_and_weights
from pqcad_qat.serving.runtime import Float32

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ONE_STREAM: Mapping[str, int] = {"NUM_STREAMS": 1}
"""OpenVINO property of every text encoder, whatever the caller asks for.

Why: with several streams in BF16, OpenVINO 2026.4 now and then compiles a layer of compressed weights to wrong ones,
where a width is not a multiple of 64. All pictures of that process are then wrong. NOTES.md has the measurement.
"""


class PromptEncoder:
    """A text encoder and its tokenizer, compiled for one prompt at a time; any number of threads may call it.

    Attributes:
        config: transformers' config of the encoder.
        outputs: names of the graph's outputs.
        layers: number of layers of a CLIP, which returns `hidden_states.0` to `hidden_states.LAYERS`.
        tokens: number of tokens to which every prompt is padded or cut.
        masked: whether the encoder takes a mask of the prompt's tokens, as PixArt's T5 does.
    """

    def __init__(
        self, folder: Path, part: str, device: str = "CPU", properties: Mapping[str, Any] | None = None
    ) -> None:
        """Load and compile the encoder.

        Args:
            folder: the deployed folder.
            part: text_encoder, text_encoder_2 or text_encoder_3.
            device: OpenVINO's name of the device.
            properties: OpenVINO properties that override the defaults, but ONE_STREAM.

        Raises:
            ModelError: the files of the encoder or its tokenizer cannot be read, or the library tokenizers is not
                installed.
        """
        self._part, self._device, self._properties = folder / part, device, properties
        self.config = read_json(self._part / CONFIG)
        graph = self._read()
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
        self._requests = OnDemand(lambda: self._compile(self._read()), self._compile(graph))

    def _read(self) -> ov.Model:
        return read_part(self._part, {"input_ids"})

    def _compile(self, graph: ov.Model) -> Requests:
        reshape_part(graph, (1, self.tokens), self._part)
        return Requests(compile_graph(graph, shared_core(), self._device, {**(self._properties or {}), **ONE_STREAM}))

    def drop(self) -> None:
        """Free the memory of the graph, which the next call reads and compiles again."""
        self._requests.drop()

    def ids(self, prompt: str) -> npt.NDArray[np.int64]:
        """Token ids of a prompt, (1, tokens)."""
        return np.array([self._tokenizer.encode(prompt).ids], np.int64)

    def mask(self, prompt: str) -> npt.NDArray[np.int64]:
        """Mask of a prompt's tokens, (1, tokens): 1 for its own tokens, 0 for padding."""
        return np.array([self._tokenizer.encode(prompt).attention_mask], np.int64)

    def cut(self, prompt: str) -> str:
        """The end of a prompt that exceeds the encoder's tokens and is not read; "" if nothing is cut."""
        overflow = self._tokenizer.encode(prompt).overflowing
        places = zip(overflow[0].offsets, overflow[0].special_tokens_mask, strict=True) if overflow else ()
        starts = [start for (start, end), special in places if not special and end > start]
        return prompt[min(starts) :] if starts else ""

    def __call__(self, prompt: str, outputs: Sequence[str]) -> dict[str, Float32]:
        """Encode a prompt: output name -> values (1, ...)."""
        return self.encoded(self.ids(prompt), outputs, self.mask(prompt) if self.masked else None)

    def encoded(
        self, ids: npt.NDArray[np.int64], outputs: Sequence[str], mask: npt.NDArray[np.int64] | None = None
    ) -> dict[str, Float32]:
        """Encode tokens (1, tokens); without a mask, all of them count.

        Raises:
            ModelError: the graph lacks one of these outputs.
        """
        inputs = {"input_ids": ids} | (
            {"attention_mask": np.ones_like(ids) if mask is None else mask} if self.masked else {}
        )
        if missing := [name for name in outputs if name not in self.outputs]:
            raise ModelError(
                f"{self._part / GRAPH}: got no output {missing[0]}; allowed a graph with {', '.join(outputs)}, from "
                "which the denoiser's text is made"
            )
        return dict(zip(outputs, self._requests().infer(inputs, outputs), strict=True))


def read_part(part: Path, needed: Collection[str]) -> ov.Model:
    """Read a part's graph and check that it has ports of these names, and outputs.

    Raises:
        ModelError: OpenVINO cannot read the graph, or it lacks them.
    """
    graph = read_text_and_weights(part / GRAPH, part / WEIGHTS, shared_core())
    try:
        known = {name for port in (*graph.inputs, *graph.outputs) for name in port.get_names()}
    except UNREADABLE as error:
        raise ModelError(
            f"{part / GRAPH}: got a graph that OpenVINO cannot read: {reason(error)}; allowed the one that was exported"
        ) from error
    if not known.issuperset(needed) or not graph.outputs:
        raise ModelError(
            f"{part / GRAPH}: got a graph without {', '.join(needed)} or without outputs; allowed one with both"
        )
    return graph


def reshape_part(graph: ov.Model, shape: tuple[int, ...], part: Path) -> None:
    """Give all inputs of a graph this fixed shape.

    Raises:
        ModelError: OpenVINO cannot do so.
    """
    try:
        graph.reshape({port: list(shape) for port in graph.inputs})
    except UNREADABLE as error:
        raise ModelError(
            f"{part / GRAPH}: got inputs that OpenVINO cannot give the shape {shape}: {reason(error)}; "
            "allowed the graph that was exported"
        ) from error


def _tokenizer(folder: Path, tokens: int) -> Tokenizer:
    """Load a tokenizer that cuts and pads prompts as the pipeline's own does.

    Raises:
        ModelError: the library tokenizers is not installed, the files cannot be read, or the padding token is not in
            the vocabulary.
    """
    if find_spec("tokenizers") is None:
        raise ModelError(
            f"{folder}: got no library tokenizers to read it; allowed once it is installed: pip install tokenizers"
        )
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path}: got no such file; allowed the tokenizer of the text encoder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(
            f"{path}: got a file that is no tokenizer: {reason(error)}; allowed one of the library tokenizers"
        ) from error
    entry = read_json(folder / "tokenizer_config.json").get("pad_token")
    padding = entry.get("content") if isinstance(entry, dict) else entry
    pad_id = tokenizer.token_to_id(padding) if isinstance(padding, str) and _encodable(padding) else None
    if padding is None or pad_id is None:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: pad_token: got {shown(entry)}; allowed a token of the vocabulary"
        )
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens, pad_id=pad_id, pad_token=padding)
    return tokenizer


def _encodable(text: str) -> bool:
    """Whether the text is valid UTF-8: a damaged file's JSON may hold lone surrogates, which the library refuses."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text
