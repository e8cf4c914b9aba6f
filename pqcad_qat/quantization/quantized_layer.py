"""One quantized layer: how it is built and turned back, its widths, blends and ranges, and its integers.

Layers are plain modules, and the functions here read and write their state. A width or a range changes by writing to a
buffer or Parameter in place, so that optimizers and checkpoints keep their references.

Not here: Brevitas's modules (brevitas_layers.py), which layers are quantized (plan.py), and walking over a model
(conversion.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.quantization.brevitas_layers import (
    QuantizedConv2d,
    QuantizedLinear,
    input_quantizer,
    keep_unregistered,
    number,
    unregister_stateless,
    weight_quantizer,
    write_number,
)
from pqcad_qat.quantization.fake_quantization import SMALLEST_RANGE, integer_range
from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec
from pqcad_qat.quantization.ranges import input_grid, weight_ratio, weight_rows, weight_span
from pqcad_qat.quantization.shared_input import SharedInput

QuantizedLayer = QuantizedConv2d | QuantizedLinear
"""The two kinds of quantized layer."""


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


@dataclass(frozen=True)
class IntegerLayer:
    """A quantized layer in integers.

    float32(weight_int - weight_zero_point) * weight_scale is exactly the weight that PyTorch computes with. The input
    becomes clamp(round(x / input_scale + input_zero_point), input_low, input_high).

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
    input_group: str
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


# ---- building, and back


def quantized_layer(layer: nn.Conv2d | nn.Linear, plan: LayerPlan) -> QuantizedLayer:
    """A quantized layer around the same Parameters.

    Weights are at the first rung of the plan's ladder, and the input has no range yet.
    """
    quantizers = {"weight_quant": weight_quantizer(plan, layer.weight), "input_quant": input_quantizer(plan)}
    if isinstance(layer, nn.Conv2d):
        quantized: QuantizedLayer = QuantizedConv2d(**_geometry(layer), device=layer.weight.device, **quantizers)
    else:
        quantized = QuantizedLinear(
            layer.in_features, layer.out_features, layer.bias is not None, device=layer.weight.device, **quantizers
        )
    quantized.plan, quantized.description = plan, describe
    # Brevitas keeps a reference to the weight that a layer was built with, so that weight gives up its memory here.
    quantized.weight.data = torch.empty(0)
    # Assigning the weight makes Brevitas build the weight quantizer anew, on the weight's device.
    quantized.weight, quantized.bias = (layer.weight, layer.bias)
    quantized.input_quant.to(layer.weight.device)
    quantized.weight_quant.to(layer.weight.device)
    unregister_stateless(quantized)
    estimate_weight_range(quantized)
    quantized.train(layer.training)
    return quantized


def float_layer(layer: QuantizedLayer) -> nn.Conv2d | nn.Linear:
    """A floating-point layer around the same Parameters."""
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, QuantizedConv2d):
        plain = nn.Conv2d(**_geometry(layer), device="meta")  # without memory, since its Parameters are replaced below
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)


def share_input(layer: QuantizedLayer, leader: QuantizedLayer) -> None:
    """Make the layer use the leader's input quantizer.

    Only the leader registers it as a module, so that its Parameters are trained and stored once.
    """
    keep_unregistered(layer, "input_quant", leader.input_quant)


def share_results(layers: Iterable[QuantizedLayer]) -> None:
    """Let linear layers that read the same tensor quantize it once for all of them.

    These are the linear layers with one input quantizer that are children of one module. Convolutions are left out:
    each may multiply the integers of its input by itself.
    """
    siblings: dict[tuple[str, str], list[QuantizedLinear]] = {}
    for layer in layers:
        if isinstance(layer, QuantizedLinear):
            siblings.setdefault((layer.plan.input_group, layer.plan.name.rpartition(".")[0]), []).append(layer)
    for readers in siblings.values():
        shared = SharedInput(len(readers)) if len(readers) > 1 else None
        for layer in readers:
            layer.shared_input = shared


def describe(layer: QuantizedLayer) -> str:
    """The quantization of a layer in a few words."""
    weight_bits, input_bits = read_bits(layer)
    blend = blend_state(layer)
    towards = f"->{blend.next_bits} ({blend.share:.2f})" if blend else ""
    weights, inputs = layer.plan.weights, layer.plan.inputs
    granularity = "per_channel" if weights.per_channel else "per_tensor"
    return (
        f"weights={weight_bits}{towards} bits {_kind(weights)} {granularity}, inputs={input_bits} bits {_kind(inputs)}"
    )


# ---- widths and blends


def read_bits(layer: QuantizedLayer) -> tuple[int, int]:
    """(weight bits, input bits); during a blend, the weight width before it."""
    weights, inputs = weight_quantizer_of(layer), input_quantizer_of(layer)
    return int(number(weights.msb_clamp_bit_width_impl, "bit_width")), int(
        number(inputs.msb_clamp_bit_width_impl, "bit_width")
    )


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
    write_number(weight_quantizer_of(layer), "blend_share", share)


def end_blend(layer: QuantizedLayer) -> None:
    """End the blend at the next width, whatever its share is; afterwards only that width computes.

    The present range is multiplied by the factor that the blend used, so the next width computes what it did within
    the blend.
    """
    blend = blend_state(layer)
    assert blend is not None, "the layer is in no transition"
    quant = weight_quantizer_of(layer)
    with torch.no_grad():
        for name, value in _range_tensors(layer).items():
            value.mul_(quant.next_range.reshape(value.shape) if name != "ratio" else quant.next_range.reshape(-1))
    quant.msb_clamp_bit_width_impl.bit_width.fill_(blend.next_bits)
    _clear_blend(layer)


def blend_state(layer: QuantizedLayer) -> BlendState | None:
    """The blend under way, or None."""
    quant = weight_quantizer_of(layer)
    next_bits = int(number(quant, "next_bit_width"))
    return BlendState(read_bits(layer)[0], next_bits, number(quant, "blend_share")) if next_bits else None


@torch.no_grad()
def perturbation(layer: QuantizedLayer, to_bits: int) -> float:
    """|| Q_next(W) - Q_now(W) || / || Q_now(W) ||, with the range that the next width would get."""
    quant = weight_quantizer_of(layer)
    now = quant.fused(layer.weight)
    following = quant.at(layer.weight, to_bits, _range_factor(layer, to_bits))
    return float((following - now).norm() / now.norm().clamp(min=SMALLEST_RANGE))


@torch.no_grad()
def quantized_weight(layer: QuantizedLayer) -> Tensor:
    """The weight that the layer computes with, detached."""
    weight: Tensor = weight_quantizer_of(layer).fused(layer.weight)
    return weight


# ---- ranges


@torch.no_grad()
def estimate_weight_range(layer: QuantizedLayer) -> None:
    """Set the range of the weights from their values, by the plan's method and for the present width."""
    span, low, ratio = _weight_range(layer, read_bits(layer)[0])
    for name, value in _range_tensors(layer).items():
        value.copy_(
            {"scale": span * ratio, "zero_point": -low * ratio, "ratio": ratio}[name.rstrip("_")].reshape(value.shape)
        )


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
            f"layer {layer.plan.name}: its input range [{low:g}, {high:g}] leaves nothing to quantize as {_kind(spec)}"
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
    weight, _ = weight_quantizer_of(layer).grid(layer.weight)[:2]
    return float(weight.abs().mean()), float(input_quantizer_of(layer).grid(layer.weight)[0].abs())


# ---- integers


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
            f"layer {name} is between {blend.bits} and {blend.next_bits} bits: end the transition before "
            "taking its integers"
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
    convolution = isinstance(layer, QuantizedConv2d)
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
            f"layer {name}: padding 'same' of an even kernel {tuple(layer.kernel_size)} is uneven; give "
            "padding as numbers"
        )
    return tuple(t // 2 for t in total)


def _geometry(layer: nn.Conv2d) -> dict[str, Any]:
    """The arguments by which a convolution of the same geometry is built."""
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "bias": layer.bias is not None,
        "padding_mode": layer.padding_mode,
    }


# ---- reading and writing the state


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
    rows = weight_rows(layer.weight, spec.per_channel)
    span = weight_span(rows, spec.symmetric).clamp(min=SMALLEST_RANGE)
    return span, rows.amin(dim=1).clamp(max=0), weight_ratio(rows, bits, spec.symmetric, spec.range)


def _range_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """The tensors that hold the range of the weights, by name, to be written in place.

    They are the Parameters of a learned range, otherwise the shares of the full span. A second share, of the lower
    end, has an underscore after its name. A symmetric range of extremes has no share, since it is always the full
    span.
    """
    quant = weight_quantizer_of(layer)
    if layer.plan.weights.learned_scale:
        learned = {"scale": quant.scaling_impl.value}
        return learned if layer.plan.weights.symmetric else learned | {"zero_point": quant.zero_point_impl.value}
    statistics = [quant.scaling_impl.parameter_list_stats.stats.stats_impl]
    if not layer.plan.weights.symmetric:
        statistics.append(quant.zero_point_impl.parameter_list_stats.stats.stats_impl)
    return {"ratio" + "_" * i: module.ratio for i, module in enumerate(statistics) if hasattr(module, "ratio")}


@torch.no_grad()
def _range_factor(layer: QuantizedLayer, bits: int) -> Tensor:
    """The range that the weights should have at another width, as a multiple of the present one.

    It has the scale's shape.
    """
    span, _, ratio = _weight_range(layer, bits)
    held = _range_tensors(layer)
    present = held["scale"].abs().reshape(-1) if "scale" in held else span * held.get("ratio", torch.ones_like(span))
    factor = span * ratio / present.clamp(min=SMALLEST_RANGE)
    return factor.reshape(weight_quantizer_of(layer).next_range.shape)


def _kind(spec: QuantizerSpec) -> str:
    """A quantizer's spec in a few words."""
    sign = (
        "" if spec.per_channel or not spec.symmetric else {True: "signed ", False: "unsigned ", "auto": ""}[spec.signed]
    )
    return (
        f"{sign}{'symmetric' if spec.symmetric else 'asymmetric'} {'learned' if spec.learned_scale else 'statistics'}"
    )
