"""Statistics of how a tensor uses its quantizer's grid: values that are clipped, zero or not finite.

Not here: which of these count as trouble (training/trouble_warnings.py), and the grid itself (fake_quantization.py,
ranges.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pqcad_qat.quantization.brevitas_layers import trained_weight
from pqcad_qat.quantization.fake_quantization import SMALLEST_RANGE, unclamped
from pqcad_qat.quantization.layer_state import QuantizedLayer, input_quantizer_of, weight_quantizer_of


class GridUse(NamedTuple):
    """Statistics of some values, evenly spread over a tensor, on its grid.

    Attributes:
        integers: (values,), integers after the clamp.
        clipped: share of the values that round to an integer beyond the grid's ends, 0 to 1.
        collapsed: whether every value became zero, or some row's range is the smallest possible. A tensor of zeros
            alone has not collapsed.
    """

    integers: Tensor
    clipped: float
    collapsed: bool


@torch.no_grad()
def weight_use(layer: QuantizedLayer, most: int) -> GridUse:
    """Grid use of at most `most` of a layer's weights at the present width.

    Within a blend that is the earlier of its two widths.
    """
    return _use(trained_weight(layer), weight_quantizer_of(layer), most)


@torch.no_grad()
def input_use(layer: QuantizedLayer, x: Tensor, most: int) -> GridUse:
    """Grid use of at most `most` of the values that a layer reads."""
    return _use(x, input_quantizer_of(layer), most)


@torch.no_grad()
def not_finite(layer: QuantizedLayer) -> list[str]:
    """Parts of a layer that hold NaN or infinity, each in a few words.

    It looks at weights, bias, and the ranges of both quantizers.
    """
    weight = trained_weight(layer)
    tensors = {"weights": weight, "bias": layer.bias}
    for kind, quant in (("weights", weight_quantizer_of(layer)), ("input", input_quantizer_of(layer))):
        span, low, _ = quant.grid(weight)
        tensors |= {f"range of the {kind}": span, f"lower end of the range of the {kind}": low}
    counts = {name: int((~value.isfinite()).sum()) for name, value in tensors.items() if value is not None}
    return [f"{name} ({count} of {tensors[name].numel()} values)" for name, count in counts.items() if count]


def _use(x: Tensor, quant: Any, most: int) -> GridUse:
    """Grid use of at most `most` values of x; each value is quantized with the range of its own row."""
    span, low, bounds = quant.grid(x)
    count = min(most, x.numel())
    index = torch.arange(count, device=x.device) * x.numel() // count
    row = index // (x.numel() // span.numel())
    values = x.reshape(-1)[index]
    raw, zero_point = unclamped(values, span.reshape(-1)[row], None if low is None else low.reshape(-1)[row], bounds)
    integers = raw.clamp(*bounds)
    clipped = int(torch.count_nonzero(raw != integers)) / count
    vanished = not bool((integers if zero_point is None else integers - zero_point).any()) and bool(values.any())
    return GridUse(integers, clipped, vanished or _at_smallest(x, span))


def _at_smallest(x: Tensor, span: Tensor) -> bool:
    """Whether some row that is not zero has the smallest possible range."""
    smallest = span.reshape(-1).abs() <= SMALLEST_RANGE
    return bool(smallest.any()) and bool(x.reshape(span.numel(), -1)[smallest].abs().amax() > SMALLEST_RANGE)
