"""The state of one quantized layer: its widths, its blend and its ranges, read and changed by these functions.

A width or a range changes by writing to a buffer or Parameter in place, so that optimizers and checkpoints keep their
references.

Not here: how a layer is built (quantized_layer.py), and when its width changes (training/bit_schedule.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.quantization.brevitas_layers import QuantizedConv2d, QuantizedLinear, trained_weight
from pqcad_qat.quantization.buffer_values import buffer_value, write_buffer
from pqcad_qat.quantization.equalization import over_inputs, over_weights
from pqcad_qat.quantization.fake_quantization import SMALLEST_RANGE
from pqcad_qat.quantization.plan import quantizer_words
from pqcad_qat.quantization.ranges import input_grid, weight_ratio, weight_rows, weight_span

QuantizedLayer = QuantizedConv2d | QuantizedLinear
"""The two kinds of quantized layer."""

WITHIN = 0.499
"""Largest distance from its level, in levels, to which a weight is moved that is to stay rounded to it."""


class BlendState(NamedTuple):
    """A blend under way: the layer computes (1 - share) Q_bits(W) + share Q_next_bits(W).

    Attributes:
        bits: width before the blend.
        next_bits: width after it.
        share: share of the next width, lambda, 0 to 1.
    """

    bits: int
    next_bits: int
    share: float


def read_bits(layer: QuantizedLayer) -> tuple[int, int]:
    """(weight bits, input bits); during a blend, the weight width before it."""
    weight_bits = buffer_value(weight_quantizer_of(layer).msb_clamp_bit_width_impl, "bit_width")
    input_bits = buffer_value(input_quantizer_of(layer).msb_clamp_bit_width_impl, "bit_width")
    return int(weight_bits), int(input_bits)


def set_weight_bits(layer: QuantizedLayer, bits: int, reestimate: bool = True) -> None:
    """Set another weight width at once, without a blend, and end any blend.

    ``reestimate`` also finds the range anew, by the plan's method and for that width. A learned scale is rewritten in
    place, so the Parameter, its gradient and the optimizer's state stay.
    """
    _clear_blend(layer)
    weight_quantizer_of(layer).msb_clamp_bit_width_impl.bit_width.fill_(bits)
    if reestimate:
        estimate_weight_range(layer)


def set_input_bits(layer: QuantizedLayer, bits: int) -> None:
    """Set another input width over the same range, for every layer that shares the quantizer."""
    input_quantizer_of(layer).msb_clamp_bit_width_impl.bit_width.fill_(bits)


def begin_blend(layer: QuantizedLayer, to_bits: int) -> None:
    """Begin a blend to another width with a share of 0, at which the layer still computes the same.

    The range at the next width is found now, and kept as a multiple of the present range, so that it follows a range
    that is trained meanwhile.
    """
    assert blend_state(layer) is None, "the layer is in a transition already"
    quant = weight_quantizer_of(layer)
    quant.next_range.copy_(_range_factor(layer, to_bits))
    quant.blend_share.zero_()
    quant.next_bit_width.fill_(to_bits)


def set_blend(layer: QuantizedLayer, share: float) -> None:
    """Set the share (lambda, 0 to 1) of the next width in a blend under way."""
    assert blend_state(layer) is not None, "the layer is in no transition"
    write_buffer(weight_quantizer_of(layer), "blend_share", share)


def end_blend(layer: QuantizedLayer) -> None:
    """End the blend at the next width, whatever its share is; afterwards only that width computes.

    The present range is multiplied by the factor that the blend used, so the next width computes what it did within
    the blend.
    """
    blend = blend_state(layer)
    assert blend is not None, "the layer is in no transition"
    quant = weight_quantizer_of(layer)
    with torch.no_grad():
        for value in _range_tensors(layer).values():
            value.mul_(quant.next_range.reshape(value.shape))
    quant.msb_clamp_bit_width_impl.bit_width.fill_(blend.next_bits)
    _clear_blend(layer)


def blend_state(layer: QuantizedLayer) -> BlendState | None:
    """The blend under way, or None."""
    quant = weight_quantizer_of(layer)
    next_bits = int(buffer_value(quant, "next_bit_width"))
    return BlendState(read_bits(layer)[0], next_bits, buffer_value(quant, "blend_share")) if next_bits else None


@torch.no_grad()
def perturbation(layer: QuantizedLayer, to_bits: int) -> float:
    """|| Q_next(W) - Q_now(W) || / || Q_now(W) ||, with the range that the next width would get."""
    quant = weight_quantizer_of(layer)
    weight = trained_weight(layer)
    now = quant.fused(weight)
    following = quant.at(weight, to_bits, _range_factor(layer, to_bits))
    return float((following - now).norm() / now.norm().clamp(min=SMALLEST_RANGE))


@torch.no_grad()
def quantized_weight(layer: QuantizedLayer) -> Tensor:
    """The weight that the layer computes with, detached."""
    weight: Tensor = weight_quantizer_of(layer).fused(trained_weight(layer))
    return weight


@torch.no_grad()
def level_size(layer: QuantizedLayer) -> Tensor:
    """The distance of two levels of the layer's weights, in their units; broadcastable to them."""
    span, _, (smallest, largest) = weight_quantizer_of(layer).grid(trained_weight(layer))
    size: Tensor = span.abs() / (-smallest or largest)
    return size


@torch.no_grad()
def move_within_levels(layer: QuantizedLayer, wanted: Tensor) -> None:
    """Move the weights, which have no update that is trained apart, as near to `wanted`, of their shape, as they can go
    without being rounded to other levels.
    """
    assert layer.update is None, "the update would be added to weights that hold it already"
    rounded = quantized_weight(layer)
    reach = WITHIN * level_size(layer)
    moved = rounded + torch.minimum(torch.maximum(wanted.to(rounded.device) - rounded, -reach), reach)
    layer.weight.copy_(moved)
    # beside a boundary the last bit of a sum may decide otherwise
    layer.weight.copy_(torch.where(quantized_weight(layer) == rounded, moved, rounded))


@torch.no_grad()
def move_onto_levels(layer: QuantizedLayer) -> None:
    """Move every weight to the level that it is rounded to."""
    layer.weight.copy_(quantized_weight(layer))


@torch.no_grad()
def equalize_input(layer: QuantizedLayer, factors: Tensor, before: Tensor | None) -> None:
    """Multiply the channels of the layer's input by these factors (I,), divide its weights by them, and find the ranges
    of the weights anew. Its weights have been divided by the factors `before`, if any.
    """
    factors = factors.to(layer.weight.device)
    if before is not None:
        layer.weight.mul_(over_weights(before, layer))
    layer.input_quant.factors = over_inputs(factors, layer)
    layer.weight.div_(over_weights(factors, layer))
    estimate_weight_range(layer)


def weights_for(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """A weight of the floating-point layer, in the units that the quantized layer has its own in."""
    factors = layer.input_quant.factors
    return weight if factors is None else weight / over_weights(factors.to(weight.device), layer)


@torch.no_grad()
def estimate_weight_range(layer: QuantizedLayer) -> None:
    """Set the range of the weights from their values, by the plan's method and for the present width."""
    span, low, ratio = _weight_range(layer, read_bits(layer)[0])
    values = {"scale": span * ratio, "zero_point": -low * ratio, "span_ratio": ratio, "low_ratio": ratio}
    for name, stored in _range_tensors(layer).items():
        stored.copy_(values[name].reshape(stored.shape))


@torch.no_grad()
def set_input_range(layer: QuantizedLayer, low: float, high: float) -> None:
    """Set the range of the layer's input, low <= 0 <= high, for every layer that shares the quantizer.

    Zero is always on the grid, since padding needs it: the zero point of an asymmetric range is rounded to an integer.
    The range then stays fixed, or a learned scale (and, if asymmetric, a learned lower end) starts from it.

    Raises:
        ModelError: the range has no values that the quantizer can represent.
    """
    spec, quant = layer.plan.inputs, input_quantizer_of(layer)
    bits = read_bits(layer)[1]
    signed = (low < 0) if spec.signed == "auto" else spec.signed
    scale, _, _, largest = input_grid(low, high, bits, signed, symmetric=spec.symmetric)
    if not (math.isfinite(scale) and scale > 0):
        raise ModelError(
            f"layer {layer.plan.name}: got an input range of [{low:g}, {high:g}]; allowed one with values that a grid "
            f"can represent that is {quantizer_words(spec)}"
        )
    quant.signed.fill_(float(signed))
    quant.scaling_impl.value.fill_(scale * (largest + 1 if signed else largest))
    if not spec.symmetric:
        quant.zero_point_impl.value.fill_(-low)


def is_calibrated(layer: QuantizedLayer) -> bool:
    """Whether the layer's input has a range."""
    return math.isfinite(input_quantizer_of(layer).scaling_impl.value.item())


@torch.no_grad()
def range_sizes(layer: QuantizedLayer) -> tuple[float, float]:
    """(range of the weights, range of the input), in units of the tensors.

    The former is the mean over the weights' scales.
    """
    weight, _ = weight_quantizer_of(layer).grid(trained_weight(layer))[:2]
    return float(weight.abs().mean()), float(input_quantizer_of(layer).grid(layer.weight)[0].abs())


def weight_quantizer_of(layer: QuantizedLayer) -> Any:
    """The quantizer of the layer's weights, a BlendedQuant."""
    return layer.weight_quant.tensor_quant


def input_quantizer_of(layer: QuantizedLayer) -> Any:
    """The quantizer of the layer's input, an InputQuant."""
    return layer.input_quant.fused_activation_quant_proxy.tensor_quant


def _clear_blend(layer: QuantizedLayer) -> None:
    """Reset the buffers of a blend to those of a layer without one."""
    quant = weight_quantizer_of(layer)
    quant.next_bit_width.zero_()
    quant.blend_share.zero_()
    quant.next_range.fill_(1.0)


def _weight_range(layer: QuantizedLayer, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(span, low, ratio) of each row that shares a scale, all (rows,).

    The weight should be represented over span * ratio, with the lower end low * ratio.
    """
    spec = layer.plan.weights
    rows = weight_rows(trained_weight(layer), spec.per_channel)
    span = weight_span(rows, spec.symmetric).clamp(min=SMALLEST_RANGE)
    return span, rows.amin(dim=1).clamp(max=0), weight_ratio(rows, bits, spec.symmetric, spec.range)


def _range_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """The tensors that hold the range of the weights, by name, to be written in place.

    They are the Parameters of a learned range, otherwise the shares of the full span and of its lower end. A symmetric
    range of extremes has no share, since it is always the full span.
    """
    quant = weight_quantizer_of(layer)
    if layer.plan.weights.learned_scale:
        learned = {"scale": quant.scaling_impl.value}
        return learned if layer.plan.weights.symmetric else learned | {"zero_point": quant.zero_point_impl.value}
    span = quant.scaling_impl.parameter_list_stats.stats.stats_impl
    if layer.plan.weights.symmetric:
        return {"span_ratio": span.ratio} if hasattr(span, "ratio") else {}
    low = quant.zero_point_impl.parameter_list_stats.stats.stats_impl
    return {"span_ratio": span.ratio, "low_ratio": low.ratio}


@torch.no_grad()
def _range_factor(layer: QuantizedLayer, bits: int) -> Tensor:
    """The range that the weights should have at another width, as a multiple of the present one.

    It has the scale's shape.
    """
    span, _, ratio = _weight_range(layer, bits)
    stored = _range_tensors(layer)
    if "scale" in stored:
        present = stored["scale"].abs().reshape(-1)
    else:
        present = span * stored.get("span_ratio", torch.ones_like(span))
    factor = span * ratio / present.clamp(min=SMALLEST_RANGE)
    return factor.reshape(weight_quantizer_of(layer).next_range.shape)
