"""One quantized layer in integers: what export writes, and what the deployed model is compared with.

Not here: the layer itself (quantized_layer.py), and its place in a graph (export/traceable_modules.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pqcad_qat.errors import ExportError
from pqcad_qat.quantization.brevitas_layers import QuantizedConv2d
from pqcad_qat.quantization.fake_quantization import integer_range
from pqcad_qat.quantization.layer_state import (
    QuantizedLayer,
    blend_state,
    input_quantizer_of,
    quantized_weight,
    read_bits,
    weight_quantizer_of,
)


@dataclass(frozen=True)
class IntegerLayer:
    """A quantized layer in integers.

    float32(weight_int - weight_zero_point) * weight_scale is exactly the weight that PyTorch computes with. The input,
    its channels multiplied by input_factors, becomes clamp(round(x / input_scale + input_zero_point), input_low,
    input_high).

    Attributes:
        name: path of the layer.
        kind: "Conv2d" or "Linear".
        weight_int: (O, I, kh, kw) or (O, I), integers of the weight.
        weight_scale: scales of shape (O, 1, 1, 1) or (O, 1) per channel, and () per tensor.
        weight_zero_point: zero points, in the scales' shape.
        weight_bits: width of the weights.
        bias: (O,), or None.
        input_scale: scale of the input.
        input_zero_point: integer that stands for an input of 0.
        input_low: smallest integer of the input.
        input_high: largest integer of the input.
        input_bits: width of the input.
        input_factors: (I,), what the channels of the input are multiplied by before all this; None for nothing.
        input_group: path of the layer whose input quantizer this one uses, its own if none is shared.
        stride: (h, w) of a Conv2d, empty for a Linear.
        padding: (h, w) of a Conv2d, empty for a Linear.
        dilation: (h, w) of a Conv2d, empty for a Linear.
        groups: groups of a Conv2d, 1 for a Linear.
    """

    name: str
    kind: str
    weight_int: np.ndarray[Any, np.dtype[np.int8]]
    weight_scale: np.ndarray[Any, np.dtype[np.float32]]
    weight_zero_point: np.ndarray[Any, np.dtype[np.int8]]
    weight_bits: int
    bias: np.ndarray[Any, np.dtype[np.float32]] | None
    input_scale: float
    input_zero_point: int
    input_low: int
    input_high: int
    input_bits: int
    input_factors: np.ndarray[Any, np.dtype[np.float32]] | None
    input_group: str
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@torch.no_grad()
def integer_layer(name: str, layer: QuantizedLayer) -> IntegerLayer:
    """The layer in exactly the integers and scales that its forward pass computes with.

    The proof is made here for every layer: the integers must be in the range of int8, and must give back the quantized
    weight without any error. They come from Brevitas's own forward pass, while the quantized weight comes from the
    fused one, so this also compares the two. Unsigned integers are moved into the range of int8, together with their
    zero point, which changes no value.

    Raises:
        ExportError: the layer is in a blend.
    """
    blend = blend_state(layer)
    if blend is not None:
        raise ExportError(
            f"layer {name}: got weights between {blend.bits} and {blend.next_bits} bits; allowed those of one width, "
            "so end the transition before taking its integers"
        )
    quant = weight_quantizer_of(layer)
    _, scale, zero_point, bit_width = quant(layer.weight)
    # Unsigned integers are moved into the range of int8 by half their range.
    offset = 0 if quant.int_quant.signed else 2 ** (int(bit_width) - 1)
    integers = quant.int_quant.to_int(scale, zero_point, bit_width, layer.weight) - offset
    zero_point = (zero_point - offset).expand_as(scale) if offset else torch.zeros_like(scale)
    assert integers.equal(integers.clamp(-128, 127)), "a weight is out of int8's range"
    assert torch.equal((integers - zero_point) * scale, quantized_weight(layer)), (
        "the integers do not give the weight back"
    )
    input_scale, input_zero_point, input_low, input_high = input_parameters(layer)
    convolution, factors = isinstance(layer, QuantizedConv2d), layer.input_quant.factors
    return IntegerLayer(
        name=name,
        kind=layer.plan.kind,
        weight_int=integers.to(torch.int8).cpu().numpy(),
        weight_scale=scale.cpu().numpy(),
        weight_zero_point=zero_point.to(torch.int8).cpu().numpy(),
        weight_bits=int(bit_width),
        bias=None if layer.bias is None else layer.bias.detach().cpu().numpy(),
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        input_low=input_low,
        input_high=input_high,
        input_bits=read_bits(layer)[1],
        input_factors=None if factors is None else factors.flatten().cpu().numpy(),
        input_group=layer.plan.input_group,
        stride=tuple(layer.stride) if convolution else (),
        padding=_padding(name, layer) if convolution else (),
        dilation=tuple(layer.dilation) if convolution else (),
        groups=layer.groups if convolution else 1,
    )


@torch.no_grad()
def input_parameters(layer: QuantizedLayer) -> tuple[float, int, int, int]:
    """(scale, zero point, smallest and largest integer) of the layer's input quantizer."""
    quant = input_quantizer_of(layer)
    _, scale, zero_point, bit_width = quant(torch.zeros((), device=layer.weight.device))
    return float(scale), int(zero_point), *integer_range(int(bit_width), quant.int_quant.signed, narrow=False)


def _padding(name: str, layer: QuantizedLayer) -> tuple[int, ...]:
    """The padding of a convolution as numbers.

    Raises:
        ExportError: it is 'same' and would be uneven.
    """
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding != "same":
        return tuple(layer.padding)
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise ExportError(
            f"layer {name}: got padding 'same' with an even kernel {tuple(layer.kernel_size)}, which is uneven; "
            "allowed padding as numbers"
        )
    return tuple(t // 2 for t in total)
