"""Uniform quantization as one autograd function: Brevitas's values and gradients in a third of its passes and a tenth of its calls.

No Brevitas, no modules and no state here: where ranges and widths come from is quantizers.py. Nor the kernels of GPUs: gpu_rounding.py.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

SMALLEST_RANGE = 1e-10  # a channel of zeros keeps a positive scale

Grid = tuple[Tensor, Tensor | None, tuple[int, int]]
"""What `quantize` needs: span, low, and the smallest and largest integer."""


def integer_range(bits: int, signed: bool, narrow: bool) -> tuple[int, int]:
    """The smallest and largest integer; ``narrow`` drops the smallest signed one, so that the range is symmetric."""
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def quantize(
    x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int], straight: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Quantize x to the integers of ``bounds`` and dequantize: y = (clamp(round(x / scale + zero_point)) - zero_point) * scale.

    x: any shape, computed in float32. span: the range, broadcastable to x; scale = |span| / levels, where the levels are -bounds[0] for
    signed and bounds[1] for unsigned integers. low: the magnitude of the range's lower end, in span's shape, or None for a zero point of
    0; zero_point = clamp(round(low / scale)), so zero is always on the grid. ``straight``: the gradient of x passes where x is clamped
    too (Brevitas's TensorClampSte); otherwise it is 0 there (TensorClamp). Rounding is straight through; the gradients of span and low
    are those of Brevitas's ParameterScaling and ParameterZeroPoint. ``dtype``: what y is rounded to in the end.
    """
    if x.is_cuda and (kernels := _kernels()) is not None and kernels.applies(x, span, low):
        fused: Tensor = kernels.quantize(x, span, low, bounds, straight, dtype)
        return fused
    x = x.float()  # bfloat16 activations of autocast cannot tell 256 levels apart
    if torch.is_grad_enabled() and (x.requires_grad or span.requires_grad):
        y: Tensor = _Quantize.apply(x, span, low, bounds, straight)  # type: ignore[no-untyped-call]
        return y.to(dtype)
    scale, zero_point = scale_and_zero_point(span, low, bounds)
    return dequantized(integers_of(x, scale, zero_point).clamp_(*bounds), scale, zero_point).to(dtype)


@cache
def _kernels() -> Any:
    """gpu_rounding.py; None without Triton, which comes with torch's builds for GPUs. Importing it takes CPUs a second in vain."""
    return None if find_spec("triton") is None else import_module("pqcad_qat.quantization.gpu_rounding")


def unclamped(x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """The integers of x before they are clamped to ``bounds``, in x's shape, and the zero point; arguments as for `quantize`."""
    scale, zero_point = scale_and_zero_point(span, low, bounds)
    return integers_of(x.float(), scale, zero_point), zero_point


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int], straight: bool) -> Tensor:
        scale, zero_point = scale_and_zero_point(span, low, bounds)
        rounded = integers_of(x, scale, zero_point)
        ctx.bounds, ctx.straight = bounds, straight
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if learns or straight:
            y = dequantized(rounded.clamp_(*bounds), scale, zero_point)
            ctx.save_for_backward(*((x, y, span, low, scale, zero_point) if learns else ()))
        else:  # only the gradient of x is wanted, and its mask is read off the unclamped integers
            y = dequantized(rounded.clamp(*bounds), scale, zero_point)
            ctx.save_for_backward(rounded)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        saved = ctx.saved_tensors
        if len(saved) <= 1:
            return (inside(gradient, saved[0], ctx.bounds) if saved else gradient), None, None, None, None
        x, y, span, low, scale, zero_point = saved
        integers = None if ctx.straight else integers_of(x, scale, zero_point)
        return *learned_gradients(gradient, x, y, integers, span, low, scale, zero_point, ctx.bounds), None, None


def learned_gradients(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    integers: Tensor | None,
    span: Tensor,
    low: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bounds: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the gradient of y = quantize(x, span, low, bounds) gives to x, span and low.

    integers: of x before they were clamped, to be written over; None where the gradient passes straight.
    """
    if integers is None:
        reaching, along_scale = gradient, y - x
    else:
        along_scale = inside(x, integers, bounds)
        torch.sub(y, along_scale, out=along_scale)  # before the product: y and x are nearly equal, and two long sums would cancel
        reaching = inside(gradient, integers, bounds, out=integers)
    scale_gradient = _total(along_scale.mul_(gradient), scale).div_(scale)
    low_gradient = None
    if low is not None and zero_point is not None and integers is not None:
        zero_point_gradient = _total(torch.sub(gradient, reaching, out=along_scale), scale).mul_(scale).neg_()
        low_gradient, through_zero_point = _through_zero_point(zero_point_gradient, low, scale, bounds)
        scale_gradient.add_(through_zero_point)
    return reaching, scale_gradient.div_(_levels(bounds)).mul_(_sign(span)), low_gradient


def _levels(bounds: tuple[int, int]) -> int:
    return -bounds[0] if bounds[0] else bounds[1]


def scale_and_zero_point(span: Tensor, low: Tensor | None, bounds: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """As `quantize` has them, in span's shape."""
    scale = span.abs().clamp_(min=SMALLEST_RANGE)
    levels = _levels(bounds)
    scale.div_(levels if scale.is_cpu else scale.new_full((), levels))  # by a number of the host GPUs multiply its reciprocal
    return scale, None if low is None else low.abs().div_(scale).round_().clamp_(*bounds)


def integers_of(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The integers of x before they are clamped, as floating-point numbers in a tensor of their own."""
    y = x / scale  # not times the reciprocal: this is what makes the values equal to Brevitas's to the last bit
    if zero_point is not None:
        y.add_(zero_point)
    return y.round_()


def dequantized(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The values of the integers, written over them."""
    if zero_point is not None:
        integers.sub_(zero_point)
    return integers.mul_(scale)


def inside(gradient: Tensor, integers: Tensor, bounds: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """The gradient where the integers, not yet clamped, lie within the bounds, and 0 elsewhere; ``out`` may be the integers' own tensor."""
    # hardtanh's derivative is one vectorised pass on every device; comparisons that make boolean masks cost ten times as much on CPUs
    low, high = bounds[0] - 0.5, bounds[1] + 0.5
    if out is None:
        masked: Tensor = torch.ops.aten.hardtanh_backward(gradient, integers, low, high)
    else:
        masked = torch.ops.aten.hardtanh_backward.grad_input(gradient, integers, low, high, grad_input=out)
    return masked


def _total(work: Tensor, scale: Tensor) -> Tensor:
    """The sum over everything that shares a scale, in a tensor of its own: where nothing does, sum_to_size would give back `work`."""
    return work.clone() if work.shape == scale.shape else work.sum_to_size(scale.shape)


def _through_zero_point(gradient: Tensor, low: Tensor, scale: Tensor, bounds: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the zero point's gradient gives to low and to scale: zero_point = clamp(round(|low| / scale))."""
    ratio = low.abs() / scale
    reaches = inside(gradient, ratio.round(), bounds) / scale
    return reaches * _sign(low), -reaches * ratio


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0)
