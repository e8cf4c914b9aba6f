"""Running of a deployed folder's VAE: latents to pictures, and pictures to latents.

Not here: the denoiser (runtime.py), how parts are made (part_export.py), or how a pipeline uses them
(text_to_image.py). Needs openvino and numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.models.families.family import factor_of
from pqcad_qat.serving.compiled_graph import Requests, compile_graph, shared_core
from pqcad_qat.serving.graph_checks import port_of
from pqcad_qat.serving.manifest import CONFIG, GRAPH, PART_FOLDERS, VAE_ENCODER
from pqcad_qat.serving.on_demand import OnDemand
from pqcad_qat.serving.part_runtime import read_part, reshape_part
from pqcad_qat.serving.per_size import PerSize, Size
from pqcad_qat.serving.runtime import Float32

MOST_BLOCKS, MOST_SCALE = 12, 1e9
"""Largest number of blocks, and upper bound on the magnitude of scaling values, in a VAE's config."""

CHANNEL_SCALES = ("latents_mean", "latents_std")
"""Keys of a VAE's config with a mean and a deviation for each channel of the latents."""


class _SizedPart(ABC):
    """A part of the VAE, compiled for one picture of each size that comes; any number of threads may call it."""

    def __init__(
        self, part: Path, port: str, device: str, properties: Mapping[str, Any] | None, *, own: Size | None = None
    ) -> None:
        """Read the part's graph, whose input is `port`; what is compiled for the size `own` is always kept."""
        self._part, self._port, self._own = part, port, own
        self._device, self._properties = device, properties
        self._sizes = OnDemand(self._read)
        self._sizes()

    def drop(self) -> None:
        """Free the memory of the graphs, which the next call reads and compiles again."""
        self._sizes.drop()

    @abstractmethod
    def _shapes(self, size: Size) -> tuple[list[int], list[int]]:
        """Shapes of the input, whose height and width are `size`, and of the output."""

    def _results(self, rows: Float32) -> Float32:
        """What the graph gives for each of the rows (N, ...)."""
        requests = self._sizes().at(rows.shape[2:])
        return np.concatenate([requests.infer({self._port: single}, [0])[0] for single in np.split(rows, len(rows))])

    def _read(self) -> PerSize[Requests]:
        return PerSize(partial(self._compile, read_part(self._part, {self._port})), self._own)

    def _compile(self, graph: ov.Model, size: Size) -> Requests:
        copy, (inputs, outputs) = graph.clone(), self._shapes(size)
        reshape_part(copy, tuple(inputs), self._part)
        allowed = (outputs, "float32")
        if (output := port_of(copy.outputs[0])) != allowed:
            raise ModelError(
                f"{self._part / GRAPH}: got the output {output}; allowed {allowed}, of the input {tuple(inputs)}"
            )
        return Requests(compile_graph(copy, shared_core(), self._device, self._properties))


class PictureDecoder(_SizedPart):
    """The VAE's decoder.

    Attributes:
        config: diffusers' config of the VAE.
        factor: ratio of a picture's side in pixels to the side of its latents.
    """

    def __init__(
        self,
        folder: Path,
        sample_shape: tuple[int, int, int],
        device: str = "CPU",
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the decoder, and compile it for latents of this shape.

        Args:
            folder: the deployed folder.
            sample_shape: shape (C, h, w) of the latents.
            device: OpenVINO's name of the device.
            properties: OpenVINO properties that override the defaults.

        Raises:
            ModelError: the files cannot be read, or do not decode latents of this shape.
        """
        part = folder / PART_FOLDERS["vae"]
        self._channels, *size = sample_shape
        self.config, self.factor = _vae_config(part, self._channels)
        own = (size[0], size[1])
        super().__init__(part, "latent_sample", device, properties, own=own)
        self._sizes().at(own)

    def __call__(self, latents: Float32) -> Float32:
        """Decode latents (N, C, h, w), as the denoiser returns them, to pictures (N, 3, H, W) in about [-1, 1].

        Raises:
            ModelError: the graph does not take latents of this size.
        """
        return self._results(scaled_latents(self.config, latents))

    def _shapes(self, size: Size) -> tuple[list[int], list[int]]:
        return [1, self._channels, *size], [1, 3, *(self.factor * side for side in size)]


class PictureEncoder(_SizedPart):
    """The VAE's encoder."""

    def __init__(
        self, folder: Path, channels: int, device: str = "CPU", properties: Mapping[str, Any] | None = None
    ) -> None:
        """Open the encoder; it is compiled for a size when the first picture of it comes.

        Args:
            folder: the deployed folder.
            channels: number of channels of the latents.
            device: OpenVINO's name of the device.
            properties: OpenVINO properties that override the defaults.

        Raises:
            ModelError: the config cannot be read.
        """
        part = folder / VAE_ENCODER
        self._channels = channels
        self._config, self._factor = _vae_config(part, channels)
        super().__init__(part, "sample", device, properties)

    def __call__(self, pictures: Float32) -> Float32:
        """Encode pictures (N, 3, H, W) in [-1, 1] to latents (N, C, h, w) as the denoiser takes them: the mean of those
        that the VAE allows.

        Raises:
            ModelError: the graph does not take pictures of this size.
        """
        return unscaled_latents(self._config, self._results(pictures)[:, : self._channels])

    def _shapes(self, size: Size) -> tuple[list[int], list[int]]:
        return [1, 3, *size], [1, 2 * self._channels, *(side // self._factor for side in size)]


def _vae_config(part: Path, channels: int) -> tuple[dict[str, Any], int]:
    """Config of a VAE, and the ratio of a picture's side to that of its latents.

    Raises:
        ModelError: the config cannot be read, or not be used.
    """
    config = read_json(part / CONFIG)
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= MOST_BLOCKS:
        raise ModelError(
            f"{part / CONFIG}: block_out_channels: got {shown(blocks)}; allowed a list of 1 to {MOST_BLOCKS}"
        )
    _check_scale(config, channels, part / CONFIG)
    return config, factor_of(blocks)


def scaled_latents(config: Mapping[str, Any], latents: Float32) -> Float32:
    """Scale a denoiser's latents (N, C, h, w) to those that its VAE takes.

    Where the config has a mean and deviation for each channel, they are applied too.
    """
    mean, deviation = _of_channels(config)
    return np.asarray((latents / config["scaling_factor"] + _shift(config)) * deviation + mean, np.float32)


def unscaled_latents(config: Mapping[str, Any], latents: Float32) -> Float32:
    """Scale latents (N, C, h, w) of a VAE's encoder to those of a denoiser: the inverse of `scaled_latents`."""
    mean, deviation = _of_channels(config)
    return np.asarray(((latents - mean) / deviation - _shift(config)) * config["scaling_factor"], np.float32)


def _shift(config: Mapping[str, Any]) -> float:
    return float(config.get("shift_factor") or 0.0)


def _of_channels(config: Mapping[str, Any]) -> tuple[Float32, Float32]:
    """Mean and deviation of the latents (1, C or 1, 1, 1): 0 and 1 unless the config has both."""
    found = [config.get(key) for key in CHANNEL_SCALES]
    values = [[0.0], [1.0]] if None in found else found
    mean, deviation = (np.asarray(value, np.float32).reshape(1, -1, 1, 1) for value in values)
    return mean, deviation


def _check_scale(config: Mapping[str, Any], channels: int, path: Path) -> None:
    """Raise ModelError for a VAE's config that `scaled_latents` cannot use."""
    rules = {
        "scaling_factor": (
            _is_number(config.get("scaling_factor")) and bool(config["scaling_factor"]),
            "a number other than 0",
        ),
        "shift_factor": (config.get("shift_factor") is None or _is_number(config["shift_factor"]), "null or a number"),
    }
    for key in CHANNEL_SCALES:
        values = config.get(key)
        numbers = isinstance(values, list) and len(values) == channels and all(map(_is_number, values))
        rules[key] = (values is None or numbers, f"null or {channels} numbers, one a channel")
    for key, (fits, allowed) in rules.items():
        if not fits:
            raise ModelError(f"{path}: {key}: got {shown(config.get(key))}; allowed {allowed}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < MOST_SCALE
