"""The only file that knows Brevitas: quantized layers are built here, and their widths, ranges and blends read and set.

Not here: which layers are quantized (plan.py), and walking over a model (conversion.py).
"""
# Brevitas ships no types, so its classes are Any to mypy:
# mypy: disable-error-code="misc"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import brevitas.nn
import numpy as np
import torch
from brevitas import config
from brevitas.core.function_wrapper import TensorClamp, TensorClampSte
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.scaling import ParameterScaling, StatsFromParameterScaling
from brevitas.core.stats import AbsMax
from brevitas.core.zero_point import ParameterZeroPoint, StatsFromParameterZeroPoint, ZeroZeroPoint
from brevitas.inject.enum import BitWidthImplType, FloatToIntImplType, QuantType, RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from brevitas.quant.solver import ActQuantSolver, WeightQuantSolver
from dependencies import this  # type: ignore[import-untyped]  # the injection library that Brevitas is built on
from torch import Tensor, nn

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec
from pqcad_qat.quantization.ranges import input_grid, weight_ratio, weight_rows, weight_span
from pqcad_qat.quantization.rounding import quantize

SMALLEST_RANGE = 1e-10  # of a channel of zeros: keeps its scale positive


class BlendState(NamedTuple):
    """A transition under way: the layer computes (1 - share) Q_bits(W) + share Q_next_bits(W)."""

    bits: int
    next_bits: int
    share: float


@dataclass(frozen=True)
class IntegerLayer:
    """A quantized layer in integers: float32(weight_int - weight_zero_point) * weight_scale is the weight that PyTorch computes with.

    Scales are float32, per channel of shape (O, 1, 1, 1) or (O, 1), per tensor of shape (); zero points have the scales' shape.
    The input becomes clamp(round(x / input_scale + input_zero_point), input_low, input_high).
    """

    name: str
    kind: str
    weight_int: np.ndarray[Any, np.dtype[np.int8]]  # (O, I, kh, kw) or (O, I)
    weight_scale: np.ndarray[Any, np.dtype[np.float32]]
    weight_zero_point: np.ndarray[Any, np.dtype[np.int8]]
    weight_bits: int
    bias: np.ndarray[Any, np.dtype[np.float32]] | None  # (O,)
    input_scale: float
    input_zero_point: int
    input_low: int
    input_high: int
    input_bits: int
    input_group: str
    stride: tuple[int, ...]  # these four: (h, w) of a Conv2d; empty of a Linear
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


# ---- the modules that Brevitas's injectors put together --------------------------------------------------------------------------


class FusedIntQuant(IntQuant):
    """Brevitas's IntQuant with the same values and gradients, computed by rounding.quantize."""

    def __init__(
        self,
        narrow_range: bool,
        signed: bool,
        symmetric: bool,
        input_view_impl: nn.Module,
        float_to_int_impl: nn.Module,
        tensor_clamp_impl: nn.Module,
    ) -> None:
        super().__init__(narrow_range, signed, input_view_impl, float_to_int_impl, tensor_clamp_impl)
        self.symmetric = symmetric
        self.straight = isinstance(tensor_clamp_impl, TensorClampSte)

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        low, high = self.bounds(_number(self, "bit_width", bit_width))
        # scales are float32: an autocast input is quantized in float32 too, since bfloat16 cannot tell 256 levels apart
        return quantize(x.float(), scale, None if self.symmetric else zero_point, low, high, self.straight)

    def bounds(self, bits: float) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return int(self.min_int(bits)), int(self.max_int(bits))


class BlendedQuant(RescalingIntQuant):
    """A weight's quantizer, which can be on its way from one width to the next: its whole state is in three buffers."""

    def __init__(
        self,
        int_quant: nn.Module,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        zero_point_impl: nn.Module,
        bit_width_impl: nn.Module,
        scaling_shape: tuple[int, ...],
    ) -> None:
        super().__init__(int_quant, scaling_impl, int_scaling_impl, zero_point_impl, bit_width_impl)
        self.register_buffer("next_bit_width", torch.tensor(0.0))  # 0: no transition
        self.register_buffer("blend_share", torch.tensor(0.0))
        self.register_buffer("next_range", torch.ones(scaling_shape))  # range at the next width, as a multiple of the present one

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, scale, zero_point, bit_width = self.at(x, self.msb_clamp_bit_width_impl(), None)
        if _number(self, "next_bit_width", self.next_bit_width):
            y = torch.lerp(y, self.at(x, self.next_bit_width, self.next_range)[0], self.blend_share)
        return y, scale, zero_point, bit_width

    def at(self, x: Tensor, bit_width: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize x at any width, over its range times ``factor``."""
        scale = self.scaling_impl(x, self.int_scaling_impl(bit_width))
        zero_point = self.zero_point_impl(x, scale, bit_width)
        if factor is not None:
            scale = scale * factor
        return self.int_quant(scale, zero_point, bit_width, x), scale, zero_point, bit_width


class InputQuant(RescalingIntQuant):
    """An input's quantizer, whose sign may be known only after calibration."""

    def __init__(
        self,
        int_quant: FusedIntQuant,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        zero_point_impl: nn.Module,
        bit_width_impl: nn.Module,
    ) -> None:
        super().__init__(int_quant, scaling_impl, int_scaling_impl, zero_point_impl, bit_width_impl)
        self.register_buffer("signed", torch.tensor(float(int_quant.signed)))
        self.calibrated = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.calibrated:
            self._require_range()
        signed = bool(_number(self, "signed", self.signed))
        self.int_quant.signed = signed
        bit_width = self.msb_clamp_bit_width_impl()
        scale = self.scaling_impl(x, self.int_scaling_impl(bit_width, signed))
        zero_point = self.zero_point_impl(x, scale, bit_width)
        return self.int_quant(scale, zero_point, bit_width, x), scale, zero_point, bit_width

    def _require_range(self) -> None:
        if not self.scaling_impl.value.isfinite().all():
            raise ModelError("an input quantizer has no range yet: calibrate_ranges or a calibrated state must come before a forward pass")
        self.calibrated = True


class FixedScaling(ParameterScaling):
    """A scale that training leaves alone; like the learned one it is in the state dict."""

    def __init__(self, scaling_init: Tensor, restrict_scaling_impl: nn.Module, scaling_min_val: float) -> None:
        super().__init__(scaling_init, restrict_scaling_impl=restrict_scaling_impl, scaling_min_val=scaling_min_val)
        _make_buffer(self)


class FixedZeroPoint(ParameterZeroPoint):
    """A zero point that training leaves alone; like the learned one it is in the state dict, in units of the input."""

    def __init__(self, zero_point_init: Tensor, int_quant: FusedIntQuant, quantize_zero_point: bool) -> None:
        super().__init__(zero_point_init, int_quant, quantize_zero_point)
        _make_buffer(self)


class WeightSpan(nn.Module):
    """The range of a weight computed from its values: the full span, times a share that is searched when the width changes."""

    ratio: Tensor  # (rows,)

    def __init__(self, symmetric: bool, per_channel: bool, rows: int) -> None:
        super().__init__()
        self.symmetric, self.per_channel = symmetric, per_channel
        self.register_buffer("ratio", torch.ones(rows))

    def forward(self, x: Tensor) -> Tensor:
        return weight_span(x if self.per_channel else x.reshape(1, -1), self.symmetric) * self.ratio


class WeightLow(nn.Module):
    """The lower end of a weight's range, computed like its span."""

    ratio: Tensor  # (rows,)

    def __init__(self, per_channel: bool, rows: int) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.register_buffer("ratio", torch.ones(rows))

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = (x if self.per_channel else x.reshape(1, -1)).amin(dim=1).clamp(max=0) * self.ratio
        return low


class WeightProxy(WeightQuantProxyFromInjector):
    """Brevitas's weight proxy, without its quantized-tensor objects (slow) and its rebuild on loading (which orphans Parameters)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.skip_create_quant_tensor = True
        self.frozen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.frozen is None else self.frozen

    def retrieve_attribute(self, attribute: str) -> Any:
        return getattr(self.create_quant_tensor(self.tensor_quant(self.tracked_parameter_list[0])), attribute)

    def _load_from_state_dict(self, *args: Any) -> None:
        _load_in_place(super()._load_from_state_dict, *args)


class InputProxy(ActQuantProxyFromInjector):
    """Brevitas's activation proxy, changed like WeightProxy."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.skip_create_quant_tensor = True

    def retrieve_attribute(self, attribute: str, force_eval: bool = True) -> Any:
        quantized = self.fused_activation_quant_proxy(self._zero_hw_sentinel())
        return getattr(self.create_quant_tensor(quantized, x=None), attribute)

    def _load_from_state_dict(self, *args: Any) -> None:
        _load_in_place(super()._load_from_state_dict, *args)


class QuantizedConv2d(brevitas.nn.QuantConv2d):
    """QuantConv2d that carries its plan and shows its quantization."""

    plan: LayerPlan

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


class QuantizedLinear(brevitas.nn.QuantLinear):
    """QuantLinear that carries its plan and shows its quantization."""

    plan: LayerPlan

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self)}"


QuantizedLayer = QuantizedConv2d | QuantizedLinear


# ---- building, and back ----------------------------------------------------------------------------------------------------------


def quantized_layer(layer: nn.Conv2d | nn.Linear, plan: LayerPlan) -> QuantizedLayer:
    """A Brevitas layer around the same Parameters: weights at the first rung of the plan's ladder, the input still without a range."""
    quantizers = {"weight_quant": _weight_quantizer(plan, layer.weight), "input_quant": _input_quantizer(plan)}
    if isinstance(layer, nn.Conv2d):
        quantized: QuantizedLayer = QuantizedConv2d(**_geometry(layer), **quantizers)
    else:
        quantized = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", **quantizers)
    quantized.plan = plan
    quantized.weight, quantized.bias = layer.weight, layer.bias  # builds the weight quantizer anew, on the weight's device
    quantized.input_quant.to(layer.weight.device)
    quantized.weight_quant.to(layer.weight.device)
    estimate_weight_range(quantized)
    quantized.train(layer.training)
    return quantized


def float_layer(layer: QuantizedLayer) -> nn.Conv2d | nn.Linear:
    """The floating-point layer around the same Parameters."""
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, QuantizedConv2d):
        plain = nn.Conv2d(**_geometry(layer))
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)


def share_input(layer: QuantizedLayer, leader: QuantizedLayer) -> None:
    """Make the layer use the leader's input quantizer.

    Only the leader registers it as a module: one Parameter, and one entry of the state dict.
    """
    del layer._modules["input_quant"]
    layer.__dict__["input_quant"] = leader.input_quant


def describe(layer: QuantizedLayer) -> str:
    """The quantization of a layer in a few words."""
    weight_bits, input_bits = read_bits(layer)
    blend = blend_state(layer)
    towards = f"->{blend.next_bits} ({blend.share:.2f})" if blend else ""
    weights, inputs = layer.plan.weights, layer.plan.inputs
    granularity = "per_channel" if weights.per_channel else "per_tensor"
    return f"weights={weight_bits}{towards} bits {_kind(weights)} {granularity}, inputs={input_bits} bits {_kind(inputs)}"


# ---- widths and blends -----------------------------------------------------------------------------------------------------------


def read_bits(layer: QuantizedLayer) -> tuple[int, int]:
    """(weight bits, input bits); during a transition the width that it comes from."""
    return int(_weights(layer).msb_clamp_bit_width_impl.bit_width), int(_inputs(layer).msb_clamp_bit_width_impl.bit_width)


def set_weight_bits(layer: QuantizedLayer, bits: int, reestimate: bool = True) -> None:
    """Jump to another weight width: a buffer write. ``reestimate`` also finds the range anew, by the plan's method, for that width.

    A learned scale is rewritten in place: the Parameter, its gradient and the optimizer's state stay.
    """
    _clear_blend(layer)
    _weights(layer).msb_clamp_bit_width_impl.bit_width.fill_(bits)
    if reestimate:
        estimate_weight_range(layer)


def set_input_bits(layer: QuantizedLayer, bits: int) -> None:
    """Another input width over the same range, for every layer that shares the quantizer."""
    _inputs(layer).msb_clamp_bit_width_impl.bit_width.fill_(bits)


def begin_blend(layer: QuantizedLayer, to_bits: int) -> None:
    """Begin the transition to another width with a share of 0: the layer still computes what it did."""
    assert blend_state(layer) is None, "the layer is in a transition already"
    quant = _weights(layer)
    quant.next_range.copy_(_range_factor(layer, to_bits))
    quant.blend_share.zero_()
    quant.next_bit_width.fill_(to_bits)


def set_blend(layer: QuantizedLayer, share: float) -> None:
    """Set the share (lambda, 0..1) of the next width in a transition under way."""
    assert blend_state(layer) is not None, "the layer is in no transition"
    _weights(layer).blend_share.fill_(share)


def end_blend(layer: QuantizedLayer) -> None:
    """End the transition on the next width alone, whatever the share is: afterwards the layer is a plain one of that width."""
    blend = blend_state(layer)
    assert blend is not None, "the layer is in no transition"
    quant = _weights(layer)
    with torch.no_grad():
        for name, value in _range_tensors(layer).items():
            value.mul_(quant.next_range.reshape(value.shape) if name != "ratio" else quant.next_range.reshape(-1))
    quant.msb_clamp_bit_width_impl.bit_width.fill_(blend.next_bits)
    _clear_blend(layer)


def blend_state(layer: QuantizedLayer) -> BlendState | None:
    """The transition under way, if any."""
    quant = _weights(layer)
    next_bits = int(quant.next_bit_width)
    return BlendState(read_bits(layer)[0], next_bits, float(quant.blend_share)) if next_bits else None


@torch.no_grad()
def perturbation(layer: QuantizedLayer, to_bits: int) -> float:
    """|| Q_next(W) - Q_now(W) || / || Q_now(W) ||, with the range that the next width would get."""
    quant = _weights(layer)
    now = quant(layer.weight)[0]
    bits = torch.full_like(quant.next_bit_width, to_bits)
    following = quant.at(layer.weight, bits, _range_factor(layer, to_bits))[0]
    return float((following - now).norm() / now.norm().clamp(min=SMALLEST_RANGE))


@torch.no_grad()
def quantized_weight(layer: QuantizedLayer) -> Tensor:
    """The weight that the layer computes with, detached."""
    weight: Tensor = _weights(layer)(layer.weight)[0]
    return weight


# ---- ranges ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def estimate_weight_range(layer: QuantizedLayer) -> None:
    """Set the range of the weights from their values, by the plan's method and for the present width."""
    span, low, ratio = _weight_range(layer, read_bits(layer)[0])
    for name, value in _range_tensors(layer).items():
        value.copy_({"scale": span * ratio, "zero_point": -low * ratio, "ratio": ratio}[name.rstrip("_")].reshape(value.shape))


@torch.no_grad()
def set_input_range(layer: QuantizedLayer, low: float, high: float) -> None:
    """Set the range of the layer's input, low <= 0 <= high, for every layer that shares the quantizer.

    Zero is always on the grid (padding needs it): an asymmetric zero point is the rounded integer, not the real one. The range stays fixed,
    or is where a learned scale (and, if asymmetric, a learned lower end) starts.
    """
    spec, quant = layer.plan.inputs, _inputs(layer)
    bits = read_bits(layer)[1]
    signed = (low < 0) if spec.signed == "auto" else spec.signed
    scale, _, _, largest = input_grid(low, high, bits, signed, spec.symmetric)
    if not (math.isfinite(scale) and scale > 0):
        raise ModelError(f"layer {layer.plan.name}: its input range [{low:g}, {high:g}] leaves nothing to quantize as {_kind(spec)}")
    quant.signed.fill_(float(signed))
    quant.scaling_impl.value.fill_(scale * (largest + 1 if signed else largest))
    if not spec.symmetric:
        quant.zero_point_impl.value.fill_(-low)


def is_calibrated(layer: QuantizedLayer) -> bool:
    """Whether the layer's input has a range."""
    return math.isfinite(_inputs(layer).scaling_impl.value.item())


# ---- integers --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def integer_layer(name: str, layer: QuantizedLayer) -> IntegerLayer:
    """The layer in the integers and scales that its forward pass computes with, exactly. Raises ExportError within a transition."""
    blend = blend_state(layer)
    if blend is not None:
        raise ExportError(f"layer {name} is between {blend.bits} and {blend.next_bits} bits: end the transition before taking its integers")
    quant = _weights(layer)
    value, scale, zero_point, bit_width = quant(layer.weight)
    offset = 0 if quant.int_quant.signed else 2 ** (int(bit_width) - 1)  # unsigned integers moved into the range of int8
    integers = quant.int_quant.to_int(scale, zero_point, bit_width, layer.weight) - offset
    zero_point = (zero_point - offset).expand_as(scale) if offset else torch.zeros_like(scale)
    assert integers.abs().add(integers < 0).max() <= 128, "a weight is out of int8's range"
    assert torch.equal((integers - zero_point) * scale, value), "the integers do not give the weight back"
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
    quant = _inputs(layer)
    _, scale, zero_point, bit_width = quant(torch.zeros((), device=layer.weight.device))
    return float(scale), int(zero_point), *quant.int_quant.bounds(float(bit_width))


def _padding(name: str, layer: QuantizedLayer) -> tuple[int, ...]:
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding != "same":
        return tuple(layer.padding)
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise ExportError(f"layer {name}: padding 'same' of an even kernel {tuple(layer.kernel_size)} is uneven; give padding as numbers")
    return tuple(t // 2 for t in total)


# ---- injectors: a spec in Brevitas's vocabulary ----------------------------------------------------------------------------------


def _weight_quantizer(plan: LayerPlan, weight: Tensor) -> Any:
    spec = plan.weights
    rows = weight.shape[0] if spec.per_channel else 1
    shape = (rows, *(1 for _ in weight.shape[1:])) if spec.per_channel else ()
    attributes: dict[str, Any] = {
        **_common(spec, plan.ladder[0]),
        "proxy_class": WeightProxy,
        "tensor_quant": BlendedQuant,
        "scaling_per_output_type": ScalingPerOutputType.CHANNEL if spec.per_channel else ScalingPerOutputType.TENSOR,
        "scaling_shape": shape,
        "signed": spec.symmetric,
        "narrow_range": spec.symmetric,
        "tensor_clamp_impl": TensorClamp if spec.learned_scale else TensorClampSte,
        "per_channel": spec.per_channel,
        "rows": rows,
    }
    if spec.learned_scale:
        attributes |= _parameters(ParameterScaling, ParameterZeroPoint, ScalingImplType.PARAMETER, shape, 1.0, spec.symmetric)
    else:
        plain = spec.symmetric and spec.range == "min_max"
        attributes |= {
            "scaling_impl": StatsFromParameterScaling,
            "scaling_impl_type": ScalingImplType.STATS,
            "scaling_stats_op": None,
            "scaling_stats_impl": AbsMax if plain else WeightSpan,
            "zero_point_impl": ZeroZeroPoint if spec.symmetric else StatsFromParameterZeroPoint,
            "zero_point_stats_impl": WeightLow,
            "zero_point_shape": shape,
            "zero_point_stats_input_view_shape_impl": this.scaling_stats_input_view_shape_impl,
            "zero_point_stats_input_concat_dim": this.scaling_stats_input_concat_dim,
        }
    return type("PlannedWeightQuant", (WeightQuantSolver,), attributes)


def _input_quantizer(plan: LayerPlan) -> Any:
    spec = plan.inputs
    scaling, zero_point = (ParameterScaling, ParameterZeroPoint) if spec.learned_scale else (FixedScaling, FixedZeroPoint)
    attributes = {
        **_common(spec, spec.bits),
        **_parameters(scaling, zero_point, ScalingImplType.PARAMETER, (), math.nan, spec.symmetric),
        "proxy_class": InputProxy,
        "tensor_quant": InputQuant,
        "scaling_per_output_type": ScalingPerOutputType.TENSOR,
        "signed": spec.symmetric and spec.signed is not False,
        "narrow_range": False,
        "tensor_clamp_impl": TensorClamp,
    }
    return type("PlannedInputQuant", (ActQuantSolver,), attributes)


def _common(spec: QuantizerSpec, bits: int) -> dict[str, Any]:
    return {
        "quant_type": QuantType.INT,
        "bit_width_impl_type": BitWidthImplType.STATEFUL_CONST,
        "bit_width": bits,
        "float_to_int_impl_type": FloatToIntImplType.ROUND,
        "restrict_scaling_type": RestrictValueType.FP,
        "scaling_min_val": SMALLEST_RANGE,
        "int_quant": FusedIntQuant,
        "symmetric": spec.symmetric,
        "quantize_zero_point": True,
    }


def _parameters(scaling: Any, zero_point: Any, kind: Any, shape: tuple[int, ...], start: float, symmetric: bool) -> dict[str, Any]:
    return {
        "scaling_impl": scaling,
        "scaling_impl_type": kind,
        "scaling_init": torch.full(shape, start),
        "zero_point_impl": ZeroZeroPoint if symmetric else zero_point,
        "zero_point_init": torch.zeros(shape),
        "zero_point_shape": shape,
    }


def _geometry(layer: nn.Conv2d) -> dict[str, Any]:
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
        "device": "meta",  # its Parameters are replaced at once
    }


# ---- reading and writing the state -----------------------------------------------------------------------------------------------


def _weights(layer: QuantizedLayer) -> Any:
    return layer.weight_quant.tensor_quant


def _inputs(layer: QuantizedLayer) -> Any:
    return layer.input_quant.fused_activation_quant_proxy.tensor_quant


def _clear_blend(layer: QuantizedLayer) -> None:
    quant = _weights(layer)
    quant.next_bit_width.zero_()
    quant.blend_share.zero_()
    quant.next_range.fill_(1.0)


def _weight_range(layer: QuantizedLayer, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(span, low, ratio) of each row that shares a scale, all (rows,): the weight should be represented over span * ratio."""
    spec = layer.plan.weights
    rows = weight_rows(layer.weight, spec.per_channel)
    span = weight_span(rows, spec.symmetric).clamp(min=SMALLEST_RANGE)
    return span, rows.amin(dim=1).clamp(max=0), weight_ratio(rows, bits, spec.symmetric, spec.range)


def _range_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """The tensors that hold the range of the weights, to be written in place: learned ones, or shares of the full span."""
    quant = _weights(layer)
    if layer.plan.weights.learned_scale:
        learned = {"scale": quant.scaling_impl.value}
        return learned if layer.plan.weights.symmetric else learned | {"zero_point": quant.zero_point_impl.value}
    statistics = [quant.scaling_impl.parameter_list_stats.stats.stats_impl]
    if not layer.plan.weights.symmetric:
        statistics.append(quant.zero_point_impl.parameter_list_stats.stats.stats_impl)
    return {"ratio" + "_" * i: module.ratio for i, module in enumerate(statistics) if hasattr(module, "ratio")}


@torch.no_grad()
def _range_factor(layer: QuantizedLayer, bits: int) -> Tensor:
    """The range that the weights should have at another width, as a multiple of the present one, in the scale's shape."""
    span, _, ratio = _weight_range(layer, bits)
    held = _range_tensors(layer)
    present = held["scale"].abs().reshape(-1) if "scale" in held else span * held.get("ratio", torch.ones_like(span))
    factor = span * ratio / present.clamp(min=SMALLEST_RANGE)
    return factor.reshape(_weights(layer).next_range.shape)


def _number(module: nn.Module, name: str, buffer: Tensor) -> float:
    """A buffer's value. On accelerators it is read again only after it was written, so that the forward pass does not wait for it."""
    if buffer.device.type == "cpu":
        return buffer.item()
    known = module.__dict__.setdefault("_numbers", {})
    tensor, version, value = known.get(name, (None, -1, 0.0))
    if tensor is not buffer or version != buffer._version:
        value = buffer.item()
        known[name] = (buffer, buffer._version, value)
    return float(value)


def _make_buffer(module: Any) -> None:
    value = module.value.detach()
    del module.value
    module.register_buffer("value", value)


def _load_in_place(load: Any, *args: Any) -> None:
    rebuild, config.REINIT_ON_STATE_DICT_LOAD = config.REINIT_ON_STATE_DICT_LOAD, False
    try:
        load(*args)
    finally:
        config.REINIT_ON_STATE_DICT_LOAD = rebuild


def _kind(spec: QuantizerSpec) -> str:
    sign = "" if spec.per_channel or not spec.symmetric else {True: "signed ", False: "unsigned ", "auto": ""}[spec.signed]
    return f"{sign}{'symmetric' if spec.symmetric else 'asymmetric'} {'learned' if spec.learned_scale else 'statistics'}"
