"""The plain torch modules that stand in for a quantized model's own while it is traced: what OpenVINO shall see, and
nothing more.

Not here: Brevitas, sinusoids of time (time_tables.py), and the conversion itself (export_model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from nncf.torch.quantization.layers import INT8AsymmetricWeightsDecompressor, INT8SymmetricWeightsDecompressor
from torch import Tensor, nn

from pqcad_qat.errors import ExportError
from pqcad_qat.export.time_tables import TablesInTurn
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.families.latent_rows import PLACES, places, text_places
from pqcad_qat.models.families.table import families

if TYPE_CHECKING:
    from pqcad_qat.quantization.quantized_layer import IntegerLayer

SIGNED_GRID = (-128, 127)
UNSIGNED_GRID = (0, 255)


def effective_weights(layer: IntegerLayer) -> npt.NDArray[np.int8] | npt.NDArray[np.int16]:
    """weight_int - weight_zero_point: the integers that the scale multiplies; the layer's own array where that is the
    same.
    """
    if not layer.weight_zero_point.any():
        return layer.weight_int
    return np.asarray(layer.weight_int.astype(np.int16) - np.asarray(layer.weight_zero_point, np.int16))


def needs_vnni(layer: IntegerLayer) -> bool:
    """Whether the layer may overflow on CPUs without VNNI.

    There OpenVINO adds products of an unsigned and a signed byte in pairs, in 16 bits that saturate (vpmaddubsw);
    signed inputs are moved up by 128 first. Weights of 7 bits and fewer never reach the bound.
    """
    largest_input = layer.input_high + (128 if layer.input_low < 0 else 0)
    return 2 * largest_input * int(np.abs(effective_weights(layer).astype(np.int16)).max()) > np.iinfo(np.int16).max


def traced_path(node: str) -> str:
    """The path of the module that a node was traced in, by the node's name; of a layer that bears its path as name,
    that path.
    """
    return node.partition("/")[0].removeprefix("__module.denoiser").removeprefix(".")


class QuantizedInput(nn.Module):
    """x -> its nearest point of the layer's input grid, as a FakeQuantize that OpenVINO executes in INT8.

    OpenVINO takes 256 levels to INT8 and leaves narrower grids (7, 6, 5, 3, 2 bits) in floating point. A narrower grid
    is therefore
    written as a Clamp to its ends, which lie on the grid, before a FakeQuantize of 256 levels with the same scale and
    zero point: the same values, for every width.
    """

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        low, high, zero = layer.input_low, layer.input_high, layer.input_zero_point
        self.grid = SIGNED_GRID if low < 0 else UNSIGNED_GRID
        if not self.grid[0] <= low <= zero <= high <= self.grid[1]:
            raise ExportError(
                f"{layer.name}: the input grid must lie in {self.grid} and hold its zero point, got "
                f"{(low, high)} and {zero}"
            )
        self.scale, self.zero_point = float(layer.input_scale), int(zero)
        self.bounds = None if (low, high) == self.grid else ((low - zero) * self.scale, (high - zero) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.bounds is not None:
            x = torch.clamp(x, *self.bounds)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.grid)


class QuantizedWeight(nn.Module):
    """Integer weights behind NNCF's decompressor, whose scale stays float32 (NNCF's own float16 would change the
    function).
    """

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        weights = effective_weights(layer)
        scale = torch.from_numpy(np.array(layer.weight_scale, np.float32))
        # a zero point, if any, is folded in: below 8 bits that always fits
        if weights.min() >= -128 and weights.max() <= 127:
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
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

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


class FixedOutputs(nn.Module):
    """A module of constants alone: what it gave, as buffers."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        for number, output in enumerate(outputs):
            self.register_buffer(str(number), output)

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.buffers())


def fixed_rotations(model: nn.Module, sample_shape: tuple[int, int, int], tokens: int | None) -> dict[str, nn.Module]:
    """The rotary embedding of patches of x_t (C, H, W) and of so many tokens of text as the constant that it is: BF16
    would round its angles.
    """
    classes = {name for family in families().values() for name in family.rotations}
    embeddings = {path: module for path, module in model.named_modules() if type(module).__name__ in classes}
    ids = torch.from_numpy(np.concatenate([text_places(tokens or 0), places(*sample_shape[1:])]))
    with torch.no_grad():
        return {path: FixedOutputs(module(ids)) for path, module in embeddings.items()}


class TracedDenoiser(nn.Module):
    """`predict` as a module with tensors alone as inputs, as tracing needs: (x_t, t, conditions in order) ->
    prediction.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names = tuple(names)

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        return predict(self.denoiser, sample, timestep, self._named(timestep, conditions))

    def _named(self, timestep: Tensor, conditions: Sequence[Tensor]) -> dict[str, Tensor]:
        """The conditions by name, once the tables of time know what they are looked up by."""
        named = dict(zip(self.names, conditions, strict=True))
        for module in self.denoiser.modules():
            if isinstance(module, TablesInTurn):
                module.begin({"timestep": timestep, **named})
        return named


class TracedSequence(TracedDenoiser):
    """The same for a denoiser that takes rows: (rows of patches, t / 1000, conditions in order, places of patches and
    of text) -> rows.

    The places are not looked at: `fixed_rotations` knows them.
    """

    def forward(self, hidden_states: Tensor, timestep: Tensor, *rest: Tensor) -> Tensor:
        conditions, ids = rest[: -len(PLACES)], dict(zip(PLACES, rest[-len(PLACES) :], strict=True))
        named = self._named(timestep, conditions)
        found: Tensor = self.denoiser(hidden_states, timestep=timestep, **named, **ids, return_dict=False)[0]
        return found


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with modules (by path) replaced wherever they hang, while the context lasts; afterwards it is as it
    was.
    """
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
