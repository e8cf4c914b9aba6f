"""Brevitas: its injectors for a plan's specs, its layers and proxies without their slow paths. The only file that
imports it.

Not here: what is done with the layers once they exist (quantized_layer.py).
"""
# Brevitas ships no types, so its classes are Any to mypy:
# mypy: disable-error-code="misc"

from __future__ import annotations

import itertools
import math
from collections.abc import MutableMapping
from typing import Any

import brevitas.nn
import torch
import torch.nn.functional as F
from brevitas import config
from brevitas.core.function_wrapper import TensorClamp, TensorClampSte
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.scaling import ParameterScaling, StatsFromParameterScaling
from brevitas.core.stats import AbsMax
from brevitas.core.zero_point import ParameterZeroPoint, StatsFromParameterZeroPoint, ZeroZeroPoint
from brevitas.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
)
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from brevitas.quant.solver import ActQuantSolver, WeightQuantSolver
from dependencies import this  # type: ignore[import-untyped]  # the injection library that Brevitas is built on
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pqcad_qat.errors import ModelError
from pqcad_qat.quantization.fake_quantization import (
    SMALLEST_RANGE,
    Grid,
    integer_range,
    quantize,
)
from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec
from pqcad_qat.quantization.ranges import weight_span
from pqcad_qat.quantization.shared_input import SharedInput

STATELESS = ("output_quant", "bias_quant", "_zero_hw_sentinel", "zero_point")  # they hold constants alone


class BlendedQuant(RescalingIntQuant):
    """A weight's quantizer, which may be on its way from one width to the next: that state is in three buffers.

    forward is Brevitas's own at the present width, and the definition; ``fused`` gives the same values and gradients,
    and the blend.
    """

    def __init__(
        self,
        int_quant: IntQuant,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        zero_point_impl: nn.Module,
        bit_width_impl: nn.Module,
        scaling_shape: tuple[int, ...],
    ) -> None:
        super().__init__(int_quant, scaling_impl, int_scaling_impl, zero_point_impl, bit_width_impl)
        self.learned = isinstance(scaling_impl, ParameterScaling)
        self.symmetric = isinstance(zero_point_impl, ZeroZeroPoint)
        self.register_buffer("next_bit_width", torch.tensor(0.0))  # 0: no transition
        self.register_buffer("blend_share", torch.tensor(0.0))
        # range at the next width, as a multiple of the present one
        self.register_buffer("next_range", torch.ones(scaling_shape))

    def fused(self, x: Tensor) -> Tensor:
        """(1 - share) Q_bits(x) + share Q_next(x), or Q_bits(x) outside a transition."""
        span, low = self._range(x)
        next_bits = number(self, "next_bit_width")
        y = self._at(
            x,
            span,
            low,
            number(self.msb_clamp_bit_width_impl, "bit_width"),
            dtype=torch.float32 if next_bits else product_dtype(x),
        )
        if next_bits:
            factor = self.next_range
            following = self._at(x, span * factor, None if low is None else low * factor, next_bits)
            y = torch.lerp(y, following, self.blend_share)
        return y

    def at(self, x: Tensor, bits: int, factor: Tensor) -> Tensor:
        """Quantize x at any width, over its present range times ``factor``."""
        span, low = self._range(x)
        return self._at(x, span * factor, None if low is None else low * factor, bits)

    def grid(self, x: Tensor) -> Grid:
        """Range, lower end and integers at the present width."""
        return *self._range(x), integer_range(
            int(number(self.msb_clamp_bit_width_impl, "bit_width")), self.symmetric, self.symmetric
        )

    def _at(
        self, x: Tensor, span: Tensor, low: Tensor | None, bits: float, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return quantize(
            x,
            span,
            low,
            integer_range(int(bits), self.symmetric, self.symmetric),
            straight=not self.learned,
            dtype=dtype,
        )

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.learned:
            return self.scaling_impl.value, None if self.symmetric else self.zero_point_impl.value
        return self.scaling_impl.parameter_list_stats(
            x
        ), None if self.symmetric else self.zero_point_impl.parameter_list_stats(x)


class InputQuant(RescalingIntQuant):
    """An input's quantizer, whose sign may be known only after calibration. forward is Brevitas's; ``fused`` is as in
    BlendedQuant.
    """

    def __init__(
        self,
        int_quant: IntQuant,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        zero_point_impl: nn.Module,
        bit_width_impl: nn.Module,
    ) -> None:
        super().__init__(int_quant, scaling_impl, int_scaling_impl, zero_point_impl, bit_width_impl)
        self.symmetric = isinstance(zero_point_impl, ZeroZeroPoint)
        self.register_buffer("signed", torch.tensor(float(int_quant.signed)))
        self.calibrated = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._require_range()
        self.int_quant.signed = self.int_scaling_impl.signed = bool(number(self, "signed"))
        values: tuple[Tensor, Tensor, Tensor, Tensor] = super().forward(x)
        return values

    def fused(self, x: Tensor) -> Tensor:
        self._require_range()
        return quantize(x, *self.grid(x), straight=False, dtype=product_dtype(x))

    def grid(self, x: Tensor) -> Grid:
        """Range, lower end and integers; the same for every x."""
        bounds = integer_range(
            int(number(self.msb_clamp_bit_width_impl, "bit_width")), bool(number(self, "signed")), False
        )
        return self.scaling_impl.value, None if self.symmetric else self.zero_point_impl.value, bounds

    def _require_range(self) -> None:
        if self.calibrated:
            return
        if not bool(self.scaling_impl.value.detach().isfinite()):  # in no graph, which a recomputed forward would lack
            raise ModelError(
                "an input quantizer has no range yet: calibrate_ranges or a calibrated state must come "
                "before a forward pass"
            )
        self.calibrated = True


class FixedScaling(ParameterScaling):
    """A scale that training leaves alone; like the learned one it is in the state dict."""

    def __init__(self, scaling_init: Tensor, restrict_scaling_impl: nn.Module, scaling_min_val: float) -> None:
        super().__init__(scaling_init, restrict_scaling_impl=restrict_scaling_impl, scaling_min_val=scaling_min_val)
        _make_buffer(self)


class FixedZeroPoint(ParameterZeroPoint):
    """A zero point that training leaves alone; like the learned one it is in the state dict, in units of the input."""

    def __init__(self, zero_point_init: Tensor, int_quant: IntQuant, quantize_zero_point: bool) -> None:
        super().__init__(zero_point_init, int_quant, quantize_zero_point)
        _make_buffer(self)


class WeightSpan(nn.Module):
    """The range of a weight computed from its values: the full span, times a share that is searched when the width
    changes.
    """

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
    """Brevitas's weight proxy, but fused, without quantized-tensor objects, and not rebuilt on loading (which orphans
    Parameters).
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.frozen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_quant:
            return x
        weight: Tensor = self.tensor_quant.fused(x) if self.frozen is None else self.frozen
        return weight

    def retrieve_attribute(self, attribute: str) -> Any:
        return getattr(self.create_quant_tensor(self.tensor_quant(self.tracked_parameter_list[0])), attribute)

    def _load_from_state_dict(self, *args: Any) -> None:
        _load_in_place(super()._load_from_state_dict, *args)


class InputProxy(ActQuantProxyFromInjector):
    """Brevitas's activation proxy, changed like WeightProxy."""

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_quant:
            return x
        y: Tensor = self.fused_activation_quant_proxy.tensor_quant.fused(x)
        return y

    def retrieve_attribute(self, attribute: str, force_eval: bool = True) -> Any:
        quantized = self.fused_activation_quant_proxy(
            torch.zeros_like(self.fused_activation_quant_proxy.tensor_quant.scaling_impl.value)
        )
        return getattr(self.create_quant_tensor(quantized, x=None), attribute)

    def _load_from_state_dict(self, *args: Any) -> None:
        _load_in_place(super()._load_from_state_dict, *args)


class QuantizedConv2d(brevitas.nn.QuantConv2d):
    """QuantConv2d that carries its plan and shows its quantization."""

    plan: LayerPlan
    description: Any  # layer -> str

    def reset_parameters(self) -> None:
        """Nothing: the Parameters come from the floating-point layer, and the random generator is left alone."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, I, H, W) -> (B, O, H', W')."""
        y: Tensor = self._conv_forward(self.input_quant(x), self.weight_quant(self.weight), self.bias)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.description(self)}"


class QuantizedLinear(brevitas.nn.QuantLinear):
    """QuantLinear that carries its plan and shows its quantization; ``shared_input`` is of the layers that read one
    tensor with it.
    """

    plan: LayerPlan
    description: Any  # layer -> str
    shared_input: SharedInput | None = None

    def reset_parameters(self) -> None:
        """Nothing: the Parameters come from the floating-point layer, and the random generator is left alone."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        shared = None if self.input_quant.disable_quant else self.shared_input
        quantized = self.input_quant(x) if shared is None else shared.quantized(x, product_dtype(x), self.input_quant)
        return F.linear(quantized, self.weight_quant(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.description(self)}"


def weight_quantizer(plan: LayerPlan, weight: Tensor) -> Any:
    """The Brevitas injector for a layer's weights, at the first rung of its ladder."""
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
        attributes |= _parameters(ParameterScaling, ParameterZeroPoint, shape, 1.0, symmetric=spec.symmetric)
    else:
        attributes |= {
            "scaling_impl": StatsFromParameterScaling,
            "scaling_impl_type": ScalingImplType.STATS,
            "scaling_stats_op": None,
            "scaling_stats_impl": AbsMax if spec.symmetric and spec.range == "min_max" else WeightSpan,
            "zero_point_impl": ZeroZeroPoint if spec.symmetric else StatsFromParameterZeroPoint,
            "zero_point_stats_impl": WeightLow,
            "zero_point_shape": shape,
            "zero_point_stats_input_view_shape_impl": this.scaling_stats_input_view_shape_impl,
            "zero_point_stats_input_concat_dim": this.scaling_stats_input_concat_dim,
        }
    return type("PlannedWeightQuant", (WeightQuantSolver,), attributes)


def input_quantizer(plan: LayerPlan) -> Any:
    """The Brevitas injector for a layer's input; its range is NaN until it is calibrated."""
    spec = plan.inputs
    scaling, zero_point = (
        (ParameterScaling, ParameterZeroPoint) if spec.learned_scale else (FixedScaling, FixedZeroPoint)
    )
    attributes = {
        **_common(spec, spec.bits),
        **_parameters(scaling, zero_point, (), math.nan, symmetric=spec.symmetric),
        "proxy_class": InputProxy,
        "tensor_quant": InputQuant,
        "scaling_per_output_type": ScalingPerOutputType.TENSOR,
        "signed": spec.symmetric and spec.signed is not False,
        "narrow_range": False,
        "tensor_clamp_impl": TensorClamp,
    }
    return type("PlannedInputQuant", (ActQuantSolver,), attributes)


def unregister_stateless(module: nn.Module) -> None:
    """Keep only the submodules with state registered; the others stay plain attributes, which work as before.

    A Brevitas layer has some fifty submodules, and diffusers walks over all of a model's at every forward pass
    (``model.dtype``).
    """
    for name, child in list(module._modules.items()):
        if child is None or (
            name not in STATELESS and any(True for _ in itertools.chain(child.parameters(), child.buffers()))
        ):
            if child is not None:
                unregister_stateless(child)
            continue
        keep_unregistered(module, name, child)


def keep_unregistered(module: nn.Module, name: str, child: nn.Module) -> None:
    """Make the child a plain attribute in the place of the registered one: no walk over the modules, no state dict and
    no move to another device meets it.
    """
    del module._modules[name]
    object.__setattr__(module, name, child)


def _common(spec: QuantizerSpec, bits: int) -> dict[str, Any]:
    return {
        "quant_type": QuantType.INT,
        "bit_width_impl_type": BitWidthImplType.STATEFUL_CONST,
        "bit_width": bits,
        "float_to_int_impl_type": FloatToIntImplType.ROUND,
        "restrict_scaling_type": RestrictValueType.FP,
        "scaling_min_val": SMALLEST_RANGE,
        "symmetric": spec.symmetric,
        "quantize_zero_point": True,
    }


def _parameters(
    scaling: Any, zero_point: Any, shape: tuple[int, ...], start: float, *, symmetric: bool
) -> dict[str, Any]:
    return {
        "scaling_impl": scaling,
        "scaling_impl_type": ScalingImplType.PARAMETER,
        "scaling_init": torch.full(shape, start),
        "zero_point_impl": ZeroZeroPoint if symmetric else zero_point,
        "zero_point_init": torch.zeros(shape),
        "zero_point_shape": shape,
    }


_READ: MutableMapping[Tensor, tuple[int, float]] = WeakTensorKeyDictionary()
"""Buffer on an accelerator -> the version of it that was read or written last, and its value then."""


def number(module: nn.Module, name: str) -> float:
    """A buffer's value. On accelerators it is read again only after it was written, so that the forward pass does not
    wait for it.
    """
    buffer = module._buffers[name]
    assert buffer is not None
    if buffer.device.type == "cpu":
        return buffer.item()
    version, value = _READ.get(buffer, (-1, 0.0))
    if version != buffer._version:
        value = buffer.item()
        _READ[buffer] = (buffer._version, value)
    return float(value)


def write_number(module: nn.Module, name: str, value: float) -> None:
    """Write a buffer whose value `number` then knows without waiting for the accelerator."""
    buffer = module._buffers[name]
    assert buffer is not None
    buffer.fill_(value)
    if buffer.device.type != "cpu":
        _READ[buffer] = (buffer._version, torch.tensor(value, dtype=buffer.dtype).item())


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast has layers multiply in, to which it would round their quantized input and weight in a pass of its
    own; or float32.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


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
