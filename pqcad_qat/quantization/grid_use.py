"""How a tensor uses the grid of its quantizer: what is clipped, what became zero, what is not finite.

Not here: which of it is trouble (training/trouble.py), nor the grid itself (rounding.py, ranges.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pqcad_qat.quantization.quantizers import QuantizedLayer
from pqcad_qat.quantization.rounding import SMALLEST_RANGE, unclamped


class GridUse(NamedTuple):
    """A tensor on its grid.

    Attributes:
        integers: after the clamp, in the tensor's shape.
        clipped: share of the values that round to an integer beyond the grid's ends, 0..1.
        collapsed: the range of some row is at its smallest, or every value became zero; a tensor of zeros is never collapsed.
    """

    integers: Tensor
    clipped: float
    collapsed: bool


def weight_use(layer: QuantizedLayer) -> GridUse:
    """Of a layer's weights at the present width; within a blend, the width that it comes from."""
    return _use(layer.weight, _weights(layer))


def input_use(layer: QuantizedLayer, x: Tensor) -> GridUse:
    """Of what a layer reads."""
    return _use(x, _inputs(layer))


@torch.no_grad()
def not_finite(layer: QuantizedLayer) -> list[str]:
    """What of a layer holds NaN or infinity, each in a few words: weights, bias, and the ranges of both quantizers."""
    held = {"weights": layer.weight, "bias": layer.bias}
    for kind, quant in (("weights", _weights(layer)), ("input", _inputs(layer))):
        span, low, _ = quant.grid(layer.weight)
        held |= {f"range of the {kind}": span, f"lower end of the range of the {kind}": low}
    counts = {name: int((~value.isfinite()).sum()) for name, value in held.items() if value is not None}
    return [f"{name} ({count} of {held[name].numel()} values)" for name, count in counts.items() if count]


@torch.no_grad()
def _use(x: Tensor, quant: Any) -> GridUse:
    span, low, bounds = quant.grid(x)
    raw, zero_point = unclamped(x, span, low, bounds)
    integers = raw.clamp(*bounds)
    clipped = int(torch.count_nonzero(raw != integers)) / raw.numel()
    vanished = not bool((integers if zero_point is None else integers - zero_point).any())
    smallest = bool((span.abs() <= SMALLEST_RANGE).any())
    return GridUse(integers, clipped, (vanished or smallest) and _alive(x, span))


def _alive(x: Tensor, span: Tensor) -> bool:
    """Whether a row whose range is at its smallest, or else any, holds values over it."""
    rows = (x.reshape(span.numel(), -1) if span.numel() > 1 else x.reshape(1, -1)).abs().amax(dim=1) > SMALLEST_RANGE
    smallest = span.abs().reshape(-1) <= SMALLEST_RANGE
    return bool((rows & smallest).any() if smallest.any() else rows.any())


def _weights(layer: QuantizedLayer) -> Any:
    return layer.weight_quant.tensor_quant


def _inputs(layer: QuantizedLayer) -> Any:
    return layer.input_quant.fused_activation_quant_proxy.tensor_quant
