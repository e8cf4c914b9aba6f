"""The quantized layers as Brevitas builds them: an injector for each spec of a plan, and faster layers and proxies.

Brevitas builds a quantizer from an injector: a class whose attributes name the implementation of every part (scaling,
zero point, rounding, clamp) and the values that they need. The `dependencies` library reads these attributes and
passes each part what its constructor asks for by name. A proxy then connects the quantizer to a layer.
`weight_quantizer` and `input_quantizer` make such injectors.

For speed the proxies call a quantizer's ``fused`` instead of Brevitas's forward pass, and return plain tensors.

Not here: the quantizers (brevitas_quantizers.py), and what is done with the layers once they exist (quantized_layer.py,
layer_state.py). Only these two files that are named after Brevitas import it.
"""
# Brevitas ships no types, so mypy treats its classes as Any:
# mypy: disable-error-code="misc"

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import brevitas.nn
import torch
import torch.nn.functional as F
from brevitas import config
from brevitas.core.function_wrapper import TensorClamp, TensorClampSte
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

from pqcad_qat.quantization.brevitas_quantizers import (
    BlendedQuant,
    FixedScaling,
    FixedZeroPoint,
    InputQuant,
    WeightLow,
    WeightSpan,
)
from pqcad_qat.quantization.fake_quantization import SMALLEST_RANGE, product_dtype
from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec
from pqcad_qat.quantization.shared_input import SharedInput

STATELESS = ("output_quant", "bias_quant", "_zero_hw_sentinel", "zero_point")
"""Submodules of a Brevitas layer whose Parameters and buffers, if any, are constants."""


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
    """Brevitas's activation proxy, changed in the same way as WeightProxy, but never frozen.

    Attributes:
        factors: what the channels of the input are multiplied by (equalization.py), in a shape that does it; None where
            they are not.
    """

    factors: Tensor | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("factors", None)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized input, or, where the quantizer is off, the input itself, in the units of the weights."""
        if self.factors is not None:
            x = x * self.factors
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

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        stored = state.get(f"{prefix}factors")
        if self.factors is None and stored is not None:
            self.factors = torch.empty_like(stored)
        _load_in_place(super()._load_from_state_dict, state, prefix, *args)


class QuantizedConv2d(brevitas.nn.QuantConv2d):
    """A QuantConv2d that holds its plan and shows its quantization when printed.

    Attributes:
        plan: plan of the layer.
        description: function from the layer to the text that is shown.
        update: what training adds to the weight, where the weight itself is not trained (trained_part.py).
    """

    plan: LayerPlan
    description: Any  # layer -> str
    update: nn.Module | None

    def reset_parameters(self) -> None:
        """Do nothing: Parameters come from the floating-point layer, and the random generator is not advanced."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, I, H, W) -> (B, O, H', W')."""
        y: Tensor = self._conv_forward(self.input_quant(x), self.weight_quant(trained_weight(self)), self.bias)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.description(self)}"


class QuantizedLinear(brevitas.nn.QuantLinear):
    """A QuantLinear that holds its plan and shows its quantization when printed.

    Attributes:
        plan: plan of the layer.
        description: function from the layer to the text that is shown.
        update: what training adds to the weight, where the weight itself is not trained (trained_part.py).
        shared_input: shared result for the layers that read the same tensor, None where there are no others.
    """

    plan: LayerPlan
    description: Any  # layer -> str
    update: nn.Module | None
    shared_input: SharedInput | None = None

    def reset_parameters(self) -> None:
        """Do nothing: Parameters come from the floating-point layer, and the random generator is not advanced."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        shared = None if self.input_quant.disable_quant else self.shared_input
        quantized = self.input_quant(x) if shared is None else shared.quantized(x, product_dtype(x), self.input_quant)
        return F.linear(quantized, self.weight_quant(trained_weight(self)), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.description(self)}"


def trained_weight(layer: QuantizedConv2d | QuantizedLinear) -> Tensor:
    """The weight before its quantizer, with the update that is trained where there is one."""
    weight: Tensor = layer.weight if layer.update is None else layer.update(layer.weight)
    return weight


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


def _load_in_place(load: Any, *args: Any) -> None:
    """Load a state while Brevitas's option to build quantizers anew on loading is off."""
    rebuild, config.REINIT_ON_STATE_DICT_LOAD = config.REINIT_ON_STATE_DICT_LOAD, False
    try:
        load(*args)
    finally:
        config.REINIT_ON_STATE_DICT_LOAD = rebuild
