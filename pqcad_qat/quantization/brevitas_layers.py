"""The quantized layers as Brevitas builds them: injectors for a plan's specs, and layers and proxies made faster.

Brevitas builds a quantizer from an injector: a class whose attributes name the implementation of every part (scaling,
zero point, rounding, clamp) and the values that they need. The `dependencies` library reads these attributes and
passes each part what its constructor asks for by name. A proxy then connects the quantizer to a layer.
`weight_quantizer` and `input_quantizer` make such injectors.

Brevitas's own forward pass defines a quantizer's values and gradients here. For speed the proxies call ``fused``
instead, which gives the same ones by fake_quantization.py.

This is the only file that imports Brevitas.

Not here: what is done with the layers once they exist (quantized_layer.py).
"""
# Brevitas ships no types, so mypy treats its classes as Any:
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

STATELESS = ("output_quant", "bias_quant", "_zero_hw_sentinel", "zero_point")
"""Submodules of a Brevitas layer whose Parameters and buffers, if any, are constants."""


class BlendedQuant(RescalingIntQuant):
    """The quantizer of a weight, which may be in a blend from one width to the next.

    Three buffers hold the state of the blend, so that a checkpoint has it. forward is Brevitas's own at the present
    width, and defines the values; ``fused`` gives the same values and gradients, and computes the blend too.

    Attributes:
        learned: whether the range is a Parameter; otherwise it is computed from the weight.
        symmetric: whether the zero point is 0.
        next_bit_width: width that the blend leads to, 0 where there is no blend.
        blend_share: share of that width, 0 to 1.
        next_range: range at that width, as a multiple of the present range.
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
        self.register_buffer("next_bit_width", torch.tensor(0.0))
        self.register_buffer("blend_share", torch.tensor(0.0))
        self.register_buffer("next_range", torch.ones(scaling_shape))

    def fused(self, x: Tensor) -> Tensor:
        """(1 - share) Q_bits(x) + share Q_next(x) in a blend, otherwise Q_bits(x)."""
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
        """x quantized at any width, over its present range times ``factor``."""
        span, low = self._range(x)
        return self._at(x, span * factor, None if low is None else low * factor, bits)

    def grid(self, x: Tensor) -> Grid:
        """The range, its lower end, and the smallest and largest integer at the present width."""
        return *self._range(x), integer_range(
            int(number(self.msb_clamp_bit_width_impl, "bit_width")), self.symmetric, self.symmetric
        )

    def _at(
        self, x: Tensor, span: Tensor, low: Tensor | None, bits: float, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """x quantized at this width over this range; a range computed from the weight has a straight clamp."""
        return quantize(
            x,
            span,
            low,
            integer_range(int(bits), self.symmetric, self.symmetric),
            straight=not self.learned,
            dtype=dtype,
        )

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The range and its lower end (None if symmetric): Parameters, or statistics of x."""
        if self.learned:
            return self.scaling_impl.value, None if self.symmetric else self.zero_point_impl.value
        return self.scaling_impl.parameter_list_stats(
            x
        ), None if self.symmetric else self.zero_point_impl.parameter_list_stats(x)


class InputQuant(RescalingIntQuant):
    """The quantizer of an input, whose sign may only be known after calibration.

    forward is Brevitas's own, and defines the values; ``fused`` gives the same values and gradients.

    Attributes:
        symmetric: whether the zero point is 0.
        signed: whether the integers are signed, a buffer.
        calibrated: whether the range is known to be set.
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
        """Brevitas's forward pass, after its parts know the sign that calibration found."""
        self._require_range()
        self.int_quant.signed = self.int_scaling_impl.signed = bool(number(self, "signed"))
        values: tuple[Tensor, Tensor, Tensor, Tensor] = super().forward(x)
        return values

    def fused(self, x: Tensor) -> Tensor:
        """x quantized and dequantized."""
        self._require_range()
        return quantize(x, *self.grid(x), straight=False, dtype=product_dtype(x))

    def grid(self, x: Tensor) -> Grid:
        """The range, its lower end, and the smallest and largest integer; the same for every x."""
        bounds = integer_range(
            int(number(self.msb_clamp_bit_width_impl, "bit_width")), bool(number(self, "signed")), False
        )
        return self.scaling_impl.value, None if self.symmetric else self.zero_point_impl.value, bounds

    def _require_range(self) -> None:
        """Refuse an input without a range, which is NaN; once there is one, it is not looked at again.

        Raises:
            ModelError: the range is not set.
        """
        if self.calibrated:
            return
        # Detached, since this runs only once: activation checkpointing would miss its autograd node when it recomputes.
        if not bool(self.scaling_impl.value.detach().isfinite()):
            raise ModelError(
                "an input quantizer has no range yet: calibrate_ranges or a calibrated state must come "
                "before a forward pass"
            )
        self.calibrated = True


class FixedScaling(ParameterScaling):
    """A scale that is not trained; it is a buffer, and so in the state dict as a learned one is."""

    def __init__(self, scaling_init: Tensor, restrict_scaling_impl: nn.Module, scaling_min_val: float) -> None:
        super().__init__(scaling_init, restrict_scaling_impl=restrict_scaling_impl, scaling_min_val=scaling_min_val)
        _make_buffer(self)


class FixedZeroPoint(ParameterZeroPoint):
    """A zero point that is not trained, in units of the input; it is in the state dict as a learned one is."""

    def __init__(self, zero_point_init: Tensor, int_quant: IntQuant, quantize_zero_point: bool) -> None:
        super().__init__(zero_point_init, int_quant, quantize_zero_point)
        _make_buffer(self)


class WeightSpan(nn.Module):
    """The range of a weight, computed from its values: the full span times a share.

    The share is searched whenever the width changes.

    Attributes:
        ratio: (rows,), the share of the full span for each row that has a scale.
    """

    ratio: Tensor  # (rows,)

    def __init__(self, symmetric: bool, per_channel: bool, rows: int) -> None:
        super().__init__()
        self.symmetric, self.per_channel = symmetric, per_channel
        self.register_buffer("ratio", torch.ones(rows))

    def forward(self, x: Tensor) -> Tensor:
        """The weight as rows -> (rows,), the range of each."""
        return weight_span(x if self.per_channel else x.reshape(1, -1), self.symmetric) * self.ratio


class WeightLow(nn.Module):
    """The lower end of a weight's range, computed from its values in the same way.

    Attributes:
        ratio: (rows,), the share of the full span for each row that has a scale.
    """

    ratio: Tensor  # (rows,)

    def __init__(self, per_channel: bool, rows: int) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.register_buffer("ratio", torch.ones(rows))

    def forward(self, x: Tensor) -> Tensor:
        """The weight as rows -> (rows,), the lower end of each row's range, at most 0."""
        low: Tensor = (x if self.per_channel else x.reshape(1, -1)).amin(dim=1).clamp(max=0) * self.ratio
        return low


class WeightProxy(WeightQuantProxyFromInjector):
    """Brevitas's weight proxy with three changes.

    - It calls the fused quantizer, or returns a frozen weight.
    - It returns plain tensors instead of Brevitas's objects for quantized tensors.
    - It loads its state in place. Brevitas would build the quantizer anew, and an optimizer would still hold the old
      Parameters.

    Attributes:
        frozen: quantized weight that is returned as long as it is set; see conversion.frozen_weights.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.frozen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The quantized weight, or the weight itself where the quantizer is off."""
        if self.disable_quant:
            return x
        weight: Tensor = self.tensor_quant.fused(x) if self.frozen is None else self.frozen
        return weight

    def retrieve_attribute(self, attribute: str) -> Any:
        """A value that Brevitas's interface offers, such as the scale, from Brevitas's own forward pass."""
        return getattr(self.create_quant_tensor(self.tensor_quant(self.tracked_parameter_list[0])), attribute)

    def _load_from_state_dict(self, *args: Any) -> None:
        _load_in_place(super()._load_from_state_dict, *args)


class InputProxy(ActQuantProxyFromInjector):
    """Brevitas's activation proxy, changed in the same way as WeightProxy, but never frozen."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized input, or the input itself where the quantizer is off."""
        if self.disable_quant:
            return x
        y: Tensor = self.fused_activation_quant_proxy.tensor_quant.fused(x)
        return y

    def retrieve_attribute(self, attribute: str, force_eval: bool = True) -> Any:
        """A value that Brevitas's interface offers, such as the scale, from Brevitas's own forward pass over zeros."""
        quantized = self.fused_activation_quant_proxy(
            torch.zeros_like(self.fused_activation_quant_proxy.tensor_quant.scaling_impl.value)
        )
        return getattr(self.create_quant_tensor(quantized, x=None), attribute)

    def _load_from_state_dict(self, *args: Any) -> None:
        _load_in_place(super()._load_from_state_dict, *args)


class QuantizedConv2d(brevitas.nn.QuantConv2d):
    """A QuantConv2d that holds its plan and shows its quantization when printed.

    Attributes:
        plan: plan of the layer.
        description: function from the layer to the text that is shown.
    """

    plan: LayerPlan
    description: Any  # layer -> str

    def reset_parameters(self) -> None:
        """Do nothing: Parameters come from the floating-point layer, and the random generator is not advanced."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, I, H, W) -> (B, O, H', W')."""
        y: Tensor = self._conv_forward(self.input_quant(x), self.weight_quant(self.weight), self.bias)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.description(self)}"


class QuantizedLinear(brevitas.nn.QuantLinear):
    """A QuantLinear that holds its plan and shows its quantization when printed.

    Attributes:
        plan: plan of the layer.
        description: function from the layer to the text that is shown.
        shared_input: shared result for the layers that read the same tensor, None where there are no others.
    """

    plan: LayerPlan
    description: Any  # layer -> str
    shared_input: SharedInput | None = None

    def reset_parameters(self) -> None:
        """Do nothing: Parameters come from the floating-point layer, and the random generator is not advanced."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        shared = None if self.input_quant.disable_quant else self.shared_input
        quantized = self.input_quant(x) if shared is None else shared.quantized(x, product_dtype(x), self.input_quant)
        return F.linear(quantized, self.weight_quant(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.description(self)}"


def weight_quantizer(plan: LayerPlan, weight: Tensor) -> Any:
    """The Brevitas injector for a layer's weights, at the first rung of its ladder.

    A learned range is a Parameter for the scale and, if asymmetric, one for the zero point; both are set later.
    Otherwise the range is computed from the weight at each forward pass. A value written `this.NAME` refers to another
    attribute of the injector. It gives the zero point's statistics the same view of the weight as the scale's.
    """
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
    """Keep only submodules with state registered; the others become plain attributes, which work as before.

    A Brevitas layer has about fifty submodules, and diffusers walks over all modules of a model at every forward pass
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
    """Make the child a plain attribute instead of a registered submodule.

    It is then in no walk over modules and in no state dict, and does not move to another device with the model.
    """
    del module._modules[name]
    object.__setattr__(module, name, child)


def _common(spec: QuantizerSpec, bits: int) -> dict[str, Any]:
    """Attributes that all injectors have.

    The width is a buffer (STATEFUL_CONST), so that it can change during training. The scale is an ordinary float (FP)
    of at least `SMALLEST_RANGE`.
    """
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
    """Attributes of an injector whose range is a stored tensor of this shape, which starts at `start`."""
    return {
        "scaling_impl": scaling,
        "scaling_impl_type": ScalingImplType.PARAMETER,
        "scaling_init": torch.full(shape, start),
        "zero_point_impl": ZeroZeroPoint if symmetric else zero_point,
        "zero_point_init": torch.zeros(shape),
        "zero_point_shape": shape,
    }


_READ: MutableMapping[Tensor, tuple[int, float]] = WeakTensorKeyDictionary()
"""Buffer on an accelerator -> its version when it was last read or written, and its value then.

A tensor's version is torch's count of the writes to it.
"""


def number(module: nn.Module, name: str) -> float:
    """A buffer's value as a number.

    On an accelerator a read waits for the device. So the buffer is read again only after it was written to, and the
    forward pass does not wait.
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
    """Write a buffer so that `number` knows its value without waiting for the accelerator."""
    buffer = module._buffers[name]
    assert buffer is not None
    buffer.fill_(value)
    if buffer.device.type != "cpu":
        _READ[buffer] = (buffer._version, torch.tensor(value, dtype=buffer.dtype).item())


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which layers multiply: autocast's where it is enabled, otherwise float32.

    A quantizer rounds its result to this dtype at once, so autocast need not do it in a pass of its own.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def _make_buffer(module: Any) -> None:
    """Turn the Parameter `value` of a module into a buffer."""
    value = module.value.detach()
    del module.value
    module.register_buffer("value", value)


def _load_in_place(load: Any, *args: Any) -> None:
    """Load a state while Brevitas's option to build quantizers anew on loading is off."""
    rebuild, config.REINIT_ON_STATE_DICT_LOAD = config.REINIT_ON_STATE_DICT_LOAD, False
    try:
        load(*args)
    finally:
        config.REINIT_ON_STATE_DICT_LOAD = rebuild
