"""The plain torch modules that stand in for a quantized model's own while it is traced: what OpenVINO shall see, and nothing more.

Not here: Brevitas, and the conversion itself (export.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from nncf.torch.quantization.layers import INT8AsymmetricWeightsDecompressor, INT8SymmetricWeightsDecompressor
from torch import Tensor, nn

from pqcad_qat.diffusion.architectures import LARGEST_SIZE
from pqcad_qat.diffusion.denoiser import predict
from pqcad_qat.errors import ExportError

if TYPE_CHECKING:
    from pqcad_qat.quantization.quantizers import IntegerLayer

SIGNED_GRID = (-128, 127)
UNSIGNED_GRID = (0, 255)


def effective_weights(layer: IntegerLayer) -> npt.NDArray[np.int8] | npt.NDArray[np.int16]:
    """weight_int - weight_zero_point: the integers that the scale multiplies; the layer's own array where that is the same."""
    if not layer.weight_zero_point.any():
        return layer.weight_int
    return np.asarray(layer.weight_int.astype(np.int16) - np.asarray(layer.weight_zero_point, np.int16))


def needs_vnni(layer: IntegerLayer) -> bool:
    """Whether the layer may overflow on CPUs without VNNI.

    There OpenVINO adds products of an unsigned and a signed byte in pairs, in 16 bits that saturate (vpmaddubsw); signed inputs are moved
    up by 128 first. Weights of 7 bits and fewer never reach the bound.
    """
    largest_input = layer.input_high + (128 if layer.input_low < 0 else 0)
    return 2 * largest_input * int(np.abs(effective_weights(layer).astype(np.int16)).max()) > np.iinfo(np.int16).max


class QuantizedInput(nn.Module):
    """x -> its nearest point of the layer's input grid, as a FakeQuantize that OpenVINO executes in INT8.

    OpenVINO takes 256 levels to INT8 and leaves narrower grids (7, 6, 5, 3, 2 bits) in floating point. A narrower grid is therefore
    written as a Clamp to its ends, which lie on the grid, before a FakeQuantize of 256 levels with the same scale and zero point: the
    same values, for every width.
    """

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        low, high, zero = layer.input_low, layer.input_high, layer.input_zero_point
        self.grid = SIGNED_GRID if low < 0 else UNSIGNED_GRID
        if not self.grid[0] <= low <= zero <= high <= self.grid[1]:
            raise ExportError(f"{layer.name}: the input grid must lie in {self.grid} and hold its zero point, got {(low, high)} and {zero}")
        self.scale, self.zero_point = float(layer.input_scale), int(zero)
        self.bounds = None if (low, high) == self.grid else ((low - zero) * self.scale, (high - zero) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.bounds is not None:
            x = torch.clamp(x, *self.bounds)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.grid)


class QuantizedWeight(nn.Module):
    """Integer weights behind NNCF's decompressor, whose scale stays float32 (NNCF's own float16 would change the function)."""

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        weights = effective_weights(layer)
        scale = torch.from_numpy(np.array(layer.weight_scale, np.float32))
        if weights.min() >= -128 and weights.max() <= 127:  # a zero point, if any, is folded in: below 8 bits that always fits
            self.decompressor = INT8SymmetricWeightsDecompressor(scale)
            integers = torch.from_numpy(weights.astype(np.int8, copy=False))  # of a large model the only copy
        else:
            offset = np.asarray(layer.weight_zero_point, np.int16) + np.int16(128)
            self.decompressor = INT8AsymmetricWeightsDecompressor(scale, torch.from_numpy(np.array(offset, np.int16)))
            integers = torch.from_numpy((layer.weight_int.astype(np.int16) + 128).astype(np.uint8))
        self.decompressor._scale = scale
        self.register_buffer("integers", integers)

    def forward(self) -> Tensor:
        weight: Tensor = self.decompressor(self.integers)
        return weight


class IntegerConv2d(nn.Module):
    """The Conv2d of an IntegerLayer: (B, I, H, W) -> (B, O, H', W')."""

    bias: Tensor | None

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.input, self.weight = QuantizedInput(layer), QuantizedWeight(layer)
        self.register_buffer("bias", _bias(layer))
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.input(x), self.weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class IntegerLinear(nn.Module):
    """The Linear of an IntegerLayer: (..., I) -> (..., O)."""

    bias: Tensor | None

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.input, self.weight = QuantizedInput(layer), QuantizedWeight(layer)
        self.register_buffer("bias", _bias(layer))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input(x), self.weight(), self.bias)


def _bias(layer: IntegerLayer) -> Tensor | None:
    return None if layer.bias is None else torch.from_numpy(np.array(layer.bias, np.float32))


class TimestepTable(nn.Module):
    """A module of the time step alone, as a table of its outputs for t = 0 .. T-1: time steps (B,) -> (B, D).

    OpenVINO computes outside the plan in BF16 where the CPU has it, and a BF16 time step of 999 is 1000: sines of it are wrong by up to
    2 radians. A table is right in every precision. Where the layer that reads it is planned, the table holds the integers of that
    layer's input quantizer: a quarter of the size, and BF16 rounds nothing that the quantizer has not rounded already.
    """

    table: Tensor

    def __init__(self, module: nn.Module, timesteps: int, reader: IntegerLayer | None = None) -> None:
        super().__init__()
        with torch.no_grad():
            values = module(torch.arange(timesteps)).float()
        self.scale = None if reader is None else float(reader.input_scale)
        self.zero_point = 0 if reader is None else float(reader.input_zero_point)
        if reader is not None:
            integers = torch.round(values / reader.input_scale + reader.input_zero_point).clamp(reader.input_low, reader.input_high)
            values = integers.to(torch.int8 if reader.input_low < 0 else torch.uint8)
        self.register_buffer("table", values)

    def forward(self, timesteps: Tensor) -> Tensor:
        values = F.embedding(timesteps, self.table)
        return values if self.scale is None else (values.float() - self.zero_point) * self.scale


def timestep_tables(model: nn.Module, train_timesteps: int, layers: Mapping[str, IntegerLayer]) -> dict[str, nn.Module]:
    """Every sinusoidal embedding of the model, by path, as a table: of the time step, and of SDXL's sizes in pixels.

    Args:
        layers: the planned layers, in integers; {} for a model in floating point.
    """
    found: dict[str, nn.Module] = {}
    shared = getattr(getattr(model, "config", None), "class_embed_type", None) == "timestep"  # class labels go through it too
    for path, module in model.named_modules():
        if path == "add_time_proj":
            found[path] = TimestepTable(module, LARGEST_SIZE + 1)
        elif path == "time_proj" or isinstance(module, Timesteps):
            scope = path.removesuffix("time_proj")
            readers = [layers.get(f"{scope}{name}.linear_1") for name in ("time_embedding", "timestep_embedder")]
            reader = None if shared else next((layer for layer in readers if layer is not None), None)
            found[path] = TimestepTable(module, train_timesteps, reader)
    return found


class TracedDenoiser(nn.Module):
    """`predict` as a module with tensors alone as inputs, as tracing needs: (x_t, t, conditions in order) -> prediction."""

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names = tuple(names)

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        return predict(self.denoiser, sample, timestep, dict(zip(self.names, conditions, strict=True)))


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with modules (by path) replaced wherever they hang, while the context lasts; afterwards it is as it was."""
    news = {model.get_submodule(path): module for path, module in replacements.items()}
    children = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    places = [(parent, name, child) for parent, name, child in children if child is not None and child in news]
    try:
        for parent, name, child in places:
            setattr(parent, name, news[child])
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
