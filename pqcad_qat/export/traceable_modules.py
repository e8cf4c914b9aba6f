"""Plain torch modules that stand in for a quantized model's own modules while it is traced for OpenVINO.

Not here: Brevitas, time embeddings (time_tables.py), and the conversion itself (export_model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqcad_qat.errors import ExportError
from pqcad_qat.export.time_tables import TablesInTurn
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.families.latent_rows import PLACES, places, text_places
from pqcad_qat.models.families.table import families
from pqcad_qat.serving.packing import LAYER

if TYPE_CHECKING:
    from pqcad_qat.quantization.integer_layer import IntegerLayer

SIGNED_GRID = (-128, 127)
"""Lowest and highest integer of a signed byte."""

UNSIGNED_GRID = (0, 255)
"""Lowest and highest integer of an unsigned byte."""


def effective_weights(layer: IntegerLayer) -> npt.NDArray[np.int8] | npt.NDArray[np.int16]:
    """weight_int - weight_zero_point: the integers that the scale multiplies.

    Where there is no zero point, the result is the layer's own array, not a copy.
    """
    if not layer.weight_zero_point.any():
        return layer.weight_int
    return np.asarray(layer.weight_int.astype(np.int16) - np.asarray(layer.weight_zero_point, np.int16))


def needs_vnni(layer: IntegerLayer) -> bool:
    """Whether the integer sums of the layer may overflow on CPUs without VNNI.

    On such CPUs OpenVINO multiplies unsigned bytes by signed ones and adds the products in pairs, in 16 bits that
    saturate (vpmaddubsw). Signed inputs are shifted up by 128 first. Weights of 7 bits and fewer never reach the bound.
    """
    largest_input = layer.input_high + (128 if layer.input_low < 0 else 0)
    return 2 * largest_input * int(np.abs(effective_weights(layer).astype(np.int16)).max()) > np.iinfo(np.int16).max


def traced_path(node: str) -> str:
    """The path of the module in which a node was traced, taken from the node's name.

    For a planned layer, whose node bears the module path, that is the path itself.
    """
    return node.removeprefix(LAYER).partition("/")[0].removeprefix("__module.denoiser").removeprefix(".")


class QuantizedInput(nn.Module):
    """Round x to the nearest point of the layer's input grid, in a form that OpenVINO executes in INT8.

    OpenVINO executes a FakeQuantize of 256 levels in INT8, but leaves narrower grids (7, 6, 5, 3, 2 bits) in floating
    point. A narrower grid is therefore written as a Clamp followed by a FakeQuantize of 256 levels with the same scale
    and zero point. The Clamp's bounds are the ends of the grid, which are grid points themselves. The values are the
    same for every width.

    Attributes:
        factors: what the channels are multiplied by before that, in a shape that does it; None for nothing.
    """

    factors: Tensor | None

    def __init__(self, layer: IntegerLayer) -> None:
        """Take the grid of the layer's input.

        Raises:
            ExportError: the grid does not fit into a byte, or its zero point lies outside it.
        """
        super().__init__()
        low, high, zero = layer.input_low, layer.input_high, layer.input_zero_point
        self.grid = SIGNED_GRID if low < 0 else UNSIGNED_GRID
        if not self.grid[0] <= low <= zero <= high <= self.grid[1]:
            raise ExportError(
                f"{layer.name}: input grid: got {(low, high)} with the zero point {zero}; allowed one within "
                f"{self.grid} that holds its zero point"
            )
        self.scale, self.zero_point = float(layer.input_scale), int(zero)
        factors = layer.input_factors
        self.register_buffer("factors", None if factors is None else _over_inputs(factors, layer.kind))
        self.bounds = None if (low, high) == self.grid else ((low - zero) * self.scale, (high - zero) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.factors is not None:
            x = x * self.factors
        if self.bounds is not None:
            x = torch.clamp(x, *self.bounds)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.grid)


class QuantizedWeight(nn.Module):
    """Integer weights behind NNCF's decompressor, whose scale stays in float32.

    NNCF's own float16 scale would change the function.
    """

    def __init__(self, layer: IntegerLayer) -> None:
        """Choose the decompressor: symmetric if the effective weights fit int8, else asymmetric with a zero point."""
        # imported here, for it takes a third of a second, and plans use this file too
        from nncf.torch.quantization.layers import (
            INT8AsymmetricWeightsDecompressor,
            INT8SymmetricWeightsDecompressor,
        )

        super().__init__()
        weights = effective_weights(layer)
        scale = torch.from_numpy(np.array(layer.weight_scale, np.float32))
        # a zero point, if any, is subtracted here: below 8 bits the result always fits
        if weights.min() >= -128 and weights.max() <= 127:
            self.decompressor = INT8SymmetricWeightsDecompressor(scale)
            # not copied: a copy of every layer would double a large model's memory
            integers = torch.from_numpy(weights.astype(np.int8, copy=False))
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
    """The Conv2d of an IntegerLayer: (B, I, H, W) -> (B, O, H', W').

    Attributes:
        bias: float32 bias (O,); None where there is none.
    """

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
    """The Linear of an IntegerLayer: (..., I) -> (..., O).

    Attributes:
        bias: float32 bias (O,); None where there is none.
    """

    bias: Tensor | None

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.input, self.weight = QuantizedInput(layer), QuantizedWeight(layer)
        self.register_buffer("bias", _bias(layer))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input(x), self.weight(), self.bias)


def _over_inputs(factors: npt.NDArray[np.float32], kind: str) -> Tensor:
    """Factors (I,) in the shape that multiplies an input of a layer of this kind."""
    return torch.from_numpy(factors.reshape((-1, 1, 1) if kind == "Conv2d" else (-1,)))


def _bias(layer: IntegerLayer) -> Tensor | None:
    return None if layer.bias is None else torch.from_numpy(np.array(layer.bias, np.float32))


class FixedOutputs(nn.Module):
    """A stand-in for a module whose outputs are constant: it returns stored tensors, whatever it is called with."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        for place, output in enumerate(outputs):
            self.register_buffer(str(place), output)

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.buffers())


def fixed_rotations(model: nn.Module, sample_shape: tuple[int, int, int], tokens: int | None) -> dict[str, nn.Module]:
    """Replacements by module path: each rotary embedding as the constant that it is for one size of image and text.

    A constant avoids BF16, which would round the angles.

    Args:
        model: the denoiser.
        sample_shape: shape (C, H, W) of x_t, which fixes the positions of its patches.
        tokens: number of text tokens; None without text.
    """
    classes = {name for family in families().values() for name in family.rotations}
    embeddings = {path: module for path, module in model.named_modules() if type(module).__name__ in classes}
    ids = torch.from_numpy(np.concatenate([text_places(tokens or 0), places(*sample_shape[1:])]))
    with torch.no_grad():
        return {path: FixedOutputs(module(ids)) for path, module in embeddings.items()}


class TracedDenoiser(nn.Module):
    """`predict` as a module that takes tensors only, as tracing requires.

    It takes (x_t, t, conditions in order) and returns the prediction.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names = tuple(names)

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        return predict(self.denoiser, sample, timestep, self._named(timestep, conditions))

    def _named(self, timestep: Tensor, conditions: Sequence[Tensor]) -> dict[str, Tensor]:
        """The conditions by name; the time tables get the graph's inputs on the way."""
        named = dict(zip(self.names, conditions, strict=True))
        for module in self.denoiser.modules():
            if isinstance(module, TablesInTurn):
                module.begin({"timestep": timestep, **named})
        return named


class TracedSequence(TracedDenoiser):
    """TracedDenoiser for a denoiser of rows of patches, such as Flux.

    It takes (rows of patches, t / 1000, conditions in order, positions of patches, positions of text) and returns rows.
    The graph ignores the positions, because `fixed_rotations` has stored their embedding.
    """

    def forward(self, hidden_states: Tensor, timestep: Tensor, *rest: Tensor) -> Tensor:
        conditions, ids = rest[: -len(PLACES)], dict(zip(PLACES, rest[-len(PLACES) :], strict=True))
        named = self._named(timestep, conditions)
        rows: Tensor = self.denoiser(hidden_states, timestep=timestep, **named, **ids, return_dict=False)[0]
        return rows


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace modules, by path, wherever they appear in the model; the originals return when the context ends."""
    # one module may hang in several places, so places are found by the module, not by its path
    stand_ins = {model.get_submodule(path): module for path, module in replacements.items()}
    children = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    places = [(parent, name, child) for parent, name, child in children if child is not None and child in stand_ins]
    try:
        for parent, name, child in places:
            setattr(parent, name, stand_ins[child])
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
