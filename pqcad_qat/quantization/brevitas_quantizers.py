"""Brevitas's quantizers of weights and inputs with what training adds, and the modules that give them their ranges.

Brevitas calls a quantizer with a tensor and gets its quantized values, its scale, its zero point and its width. Each
quantizer here keeps Brevitas's forward pass, which defines values and gradients. For speed it also has a method
``fused``, which gives the same ones by fake_quantization.py.

Not here: how Brevitas puts a quantizer together and calls it (brevitas_layers.py).
"""
# Brevitas ships no types, so mypy treats its classes as Any:
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.scaling import ParameterScaling
from brevitas.core.zero_point import ParameterZeroPoint, ZeroZeroPoint
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.quantization.buffer_values import buffer_value
from pqcad_qat.quantization.fake_quantization import Grid, integer_range, product_dtype, quantize
from pqcad_qat.quantization.ranges import weight_span


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
        bits, next_bits = buffer_value(self.msb_clamp_bit_width_impl, "bit_width"), buffer_value(self, "next_bit_width")
        if not next_bits:
            return self._at(x, span, low, bits, dtype=product_dtype(x))
        present = self._at(x, span, low, bits)
        factor = self.next_range
        following = self._at(x, span * factor, None if low is None else low * factor, next_bits)
        return torch.lerp(present, following, self.blend_share)

    def at(self, x: Tensor, bits: int, factor: Tensor) -> Tensor:
        """x quantized at any width, over its present range times ``factor``."""
        span, low = self._range(x)
        return self._at(x, span * factor, None if low is None else low * factor, bits)

    def grid(self, x: Tensor) -> Grid:
        """The range, its lower end, and the smallest and largest integer at the present width."""
        bits = int(buffer_value(self.msb_clamp_bit_width_impl, "bit_width"))
        return *self._range(x), integer_range(bits, self.symmetric, self.symmetric)

    def _at(
        self, x: Tensor, span: Tensor, low: Tensor | None, bits: float, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """x quantized at this width over this range; a range computed from the weight has a straight clamp."""
        bounds = integer_range(int(bits), self.symmetric, self.symmetric)
        return quantize(x, span, low, bounds, straight=not self.learned, dtype=dtype)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The range and its lower end (None if symmetric): Parameters, or statistics of x."""
        if self.learned:
            return self.scaling_impl.value, None if self.symmetric else self.zero_point_impl.value
        span = self.scaling_impl.parameter_list_stats(x)
        return span, None if self.symmetric else self.zero_point_impl.parameter_list_stats(x)


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
        self.int_quant.signed = self.int_scaling_impl.signed = bool(buffer_value(self, "signed"))
        values: tuple[Tensor, Tensor, Tensor, Tensor] = super().forward(x)
        return values

    def fused(self, x: Tensor) -> Tensor:
        """x quantized and dequantized."""
        self._require_range()
        return quantize(x, *self.grid(x), straight=False, dtype=product_dtype(x))

    def grid(self, x: Tensor) -> Grid:
        """The range, its lower end, and the smallest and largest integer; the same for every x."""
        bits = int(buffer_value(self.msb_clamp_bit_width_impl, "bit_width"))
        low = None if self.symmetric else self.zero_point_impl.value
        return self.scaling_impl.value, low, integer_range(bits, bool(buffer_value(self, "signed")), False)

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
                "an input quantizer: got no range yet; allowed a forward pass after calibrate_ranges, or after "
                "a calibrated state is loaded"
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


def _make_buffer(module: Any) -> None:
    """Turn the Parameter `value` of a module into a buffer."""
    value = module.value.detach()
    del module.value
    module.register_buffer("value", value)
