"""Uniform quantization as one autograd function: Brevitas's IntQuant value for value, in a third of its passes over memory.

No Brevitas, no modules and no state here: where scales, zero points and widths come from is quantizers.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Quantize(torch.autograd.Function):
    """y = (clamp(round(x / scale + zero_point), low, high) - zero_point) * scale, rounding straight through.

    The division, not a multiplication by the reciprocal, is what makes the values equal to Brevitas's to the last bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, straight: bool) -> Tensor:
        rounded = _rounded(x, scale, zero_point)
        ctx.low, ctx.high, ctx.straight = low, high, straight
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if learns or straight or not ctx.needs_input_grad[0]:
            y = _dequantized(rounded.clamp_(low, high), scale, zero_point)
            ctx.save_for_backward(*((x, y, scale, zero_point) if learns else ()))
        else:  # only the gradient of x is wanted: its mask is read off the unclamped integers
            y = _dequantized(rounded.clamp(low, high), scale, zero_point)
            ctx.save_for_backward(rounded)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        saved = ctx.saved_tensors
        if len(saved) < 4:
            return (_inside(gradient, saved[0], ctx.low, ctx.high) if saved else gradient, None, None, None, None, None)
        x, y, scale, zero_point = saved
        inside = gradient if ctx.straight else _inside(gradient, _rounded(x, scale, zero_point), ctx.low, ctx.high)
        outside = None if ctx.straight else gradient - inside
        return (inside, _scale_gradient(inside, outside, x, y, scale), _zero_point_gradient(outside, scale, zero_point), None, None, None)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, straight: bool) -> Tensor:
    """Quantize and dequantize x onto the grid {(q - zero_point) * scale : low <= q <= high}.

    x: any shape; scale and zero_point: broadcastable to it, float32; zero_point None means 0. ``straight`` lets the gradient of x
    through where x is clamped too (Brevitas's TensorClampSte); otherwise it is 0 there (TensorClamp). Gradients of scale and
    zero_point are those of Brevitas: for the scale, (q - zero_point) - x / scale inside the clamp and q - zero_point outside.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        y: Tensor = _Quantize.apply(x, scale, zero_point, low, high, straight)  # type: ignore[no-untyped-call]
        return y
    return _dequantized(_rounded(x, scale, zero_point).clamp_(low, high), scale, zero_point)


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    y = x / scale
    if zero_point is not None:
        y.add_(zero_point)
    return y.round_()


def _dequantized(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if zero_point is not None:
        integers.sub_(zero_point)
    return integers.mul_(scale)


def _inside(gradient: Tensor, rounded: Tensor, low: int, high: int) -> Tensor:
    # hardtanh's derivative is one vectorised pass on every device; comparisons that make boolean masks cost ten times as much on CPUs
    return torch.ops.aten.hardtanh_backward(gradient, rounded, low - 0.5, high + 0.5)  # type: ignore[no-any-return]


def _scale_gradient(inside: Tensor, outside: Tensor | None, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    # y - x before the product: both are nearly equal, and two long sums would cancel
    total = _product_sum(inside, y - x, scale)
    if outside is not None:
        total = total + _product_sum(outside, y, scale)
    return total / scale


def _zero_point_gradient(outside: Tensor | None, scale: Tensor, zero_point: Tensor | None) -> Tensor | None:
    if outside is None or zero_point is None:
        return None
    return -(outside * scale).sum_to_size(zero_point.shape)


def _product_sum(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    if scale.numel() == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1)).reshape(scale.shape)
    return (a * b).sum_to_size(scale.shape)
