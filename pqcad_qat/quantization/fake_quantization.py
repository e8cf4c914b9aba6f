"""Uniform quantization as one autograd function: Brevitas's values and gradients in a third of its passes and a tenth
of its calls.

No Brevitas, no modules and no state here: where ranges and widths come from is quantized_layer.py. Nor the kernels of
GPUs: gpu_fake_quantization.py.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST_RANGE = 1e-10  # a channel of zeros keeps a positive scale

Grid = tuple[Tensor, Tensor | None, tuple[int, int]]
"""What `quantize` needs: span, low, and the smallest and largest integer."""

Scale = Tensor | float
"""A scale or a zero point: a number where one holds for all of a tensor."""


def integer_range(bits: int, signed: bool, narrow: bool) -> tuple[int, int]:
    """The smallest and largest integer; ``narrow`` drops the smallest signed one, so that the range is symmetric."""
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def quantize(
    x: Tensor,
    span: Tensor,
    low: Tensor | None,
    bounds: tuple[int, int],
    *,
    straight: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Quantize x to the integers of ``bounds`` and dequantize: y = (clamp(round(x / scale + zero_point)) - zero_point)
    * scale.

    x: any shape, computed in float32. span: the range, broadcastable to x; scale = |span| / levels, where the levels
    are -bounds[0] for signed and bounds[1] for unsigned integers. low: the magnitude of the range's lower end, in
    span's shape, or None for a zero point of 0; zero_point = clamp(round(low / scale)), so zero is always on the grid.
    ``straight``: the gradient of x passes where x is clamped too (Brevitas's TensorClampSte); otherwise it is 0 there
    (TensorClamp). Rounding is straight through; the gradients of span and low are those of Brevitas's ParameterScaling
    and ParameterZeroPoint. ``dtype``: what y is rounded to in the end.
    """
    if x.is_cuda and (kernels := _kernels()) is not None and kernels.applies(x, span, low):
        fused: Tensor = kernels.quantize(x, span, low, bounds, straight=straight, dtype=dtype)
        return fused
    x = x.float()  # bfloat16 activations of autocast cannot tell 256 levels apart
    if torch.is_grad_enabled() and (x.requires_grad or span.requires_grad):
        y: Tensor = _Quantize.apply(x, span, low, bounds, straight)  # type: ignore[no-untyped-call]
        return y.to(dtype)
    scale, zero_point = scale_and_zero_point(span, low, bounds)
    return dequantized(integers_of(x, scale, zero_point).clamp_(*bounds), scale, zero_point).to(dtype)


@cache
def _kernels() -> Any:
    """gpu_fake_quantization.py; None without Triton, which comes with torch's builds for GPUs. Importing it takes CPUs
    a second in vain.
    """
    return None if find_spec("triton") is None else import_module("pqcad_qat.quantization.gpu_fake_quantization")


def unclamped(x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int]) -> tuple[Tensor, Scale | None]:
    """The integers of x before they are clamped to ``bounds``, in x's shape, and the zero point; arguments as for
    `quantize`.
    """
    scale, zero_point = scale_and_zero_point(span, low, bounds)
    return integers_of(x.float(), scale, zero_point), zero_point


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int], straight: bool
    ) -> Tensor:
        scale, zero_point = scale_and_zero_point(span, low, bounds)
        rounded = integers_of(x, scale, zero_point)
        ctx.bounds, ctx.straight = bounds, straight
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        if learns or straight:
            y = dequantized(rounded.clamp_(*bounds), scale, zero_point)
            ctx.save_for_backward(*((x, y, span, low) if learns else ()))
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
        x, y, span, low = saved
        scale, zero_point = scale_and_zero_point(span, low, ctx.bounds)
        integers = None if ctx.straight else integers_of(x, scale, zero_point)
        return (
            *learned_gradients(gradient, x, y, integers, span=span, low=low, scale=scale, bounds=ctx.bounds),
            None,
            None,
        )


def inside(gradient: Tensor, integers: Tensor, bounds: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """The gradient where the integers, not clamped yet and in its shape, lie within the bounds, and 0 elsewhere."""
    # hardtanh's derivative is one vectorised pass on every device; comparisons that make boolean masks cost ten
    # times as much on CPUs
    low, high = bounds[0] - 0.5, bounds[1] + 0.5
    if out is None:
        passed: Tensor = torch.ops.aten.hardtanh_backward(gradient, integers, low, high)
    else:
        passed = torch.ops.aten.hardtanh_backward.grad_input(gradient, integers, low, high, grad_input=out)
    return passed


def learned_gradients(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    integers: Tensor | None,
    *,
    span: Tensor,
    low: Tensor | None,
    scale: Scale,
    bounds: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the gradient of y = quantize(x, span, low, bounds) gives to x, span and low; ``integers``: of x, not
    clamped yet, or None where the gradient passes straight.
    """
    if integers is None:
        return gradient, *_range_gradients(
            _total((y - x).mul_(gradient), span), None, span, low, scale=scale, bounds=bounds
        )
    work = inside(x, integers, bounds)
    torch.sub(y, work, out=work)  # before the product: y and x are nearly equal, and two long sums would cancel
    of_scale = _total(work.mul_(gradient), span)
    reaching = inside(gradient, integers, bounds, out=work)
    clamped = None if low is None else _total(gradient - reaching, span)  # not of each by itself: see above
    return reaching, *_range_gradients(of_scale, clamped, span, low, scale=scale, bounds=bounds)


def _range_gradients(
    of_scale: Tensor, clamped: Tensor | None, span: Tensor, low: Tensor | None, *, scale: Scale, bounds: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """What span and low get of (dy / dscale) * scale and of the gradient that met a clamp."""
    if not isinstance(scale, float):
        return _through_range(of_scale, clamped, span, low, scale=scale, bounds=bounds)
    numbers = [None if value is None else value.item() for value in (of_scale, clamped, span, low)]
    of_span, of_low = _through_range(numbers[0], numbers[1], numbers[2], numbers[3], scale=scale, bounds=bounds)
    return span.new_tensor(of_span), None if of_low is None else span.new_tensor(of_low)


def _through_range(
    of_scale: Any, clamped: Any, span: Any, low: Any, *, scale: Any, bounds: tuple[int, int]
) -> tuple[Any, Any]:
    """Of numbers, or of tensors. The zero point, clamp(round(|low| / scale)), has a gradient too."""
    slope, of_low = of_scale / scale, None
    if clamped is not None:
        ratio = abs(low) / scale
        reaching = clamped * ((ratio >= bounds[0] - 0.5) & (ratio <= bounds[1] + 0.5))
        slope = slope + reaching * ratio
        of_low = -_signed(reaching, low)
    return _signed(slope / _levels(bounds), span), of_low


def _signed(value: Any, by: Any) -> Any:
    """Minus the value where ``by`` is negative."""
    if isinstance(by, Tensor):
        return torch.where(by < 0, -value, value)
    return -value if by < 0 else value


def _levels(bounds: tuple[int, int]) -> int:
    return -bounds[0] if bounds[0] else bounds[1]


def scale_and_zero_point(span: Tensor, low: Tensor | None, bounds: tuple[int, int]) -> tuple[Scale, Scale | None]:
    """As `quantize` has them: numbers of a range that is one on the CPU (tensors cost thrice as long), otherwise in
    span's shape.
    """
    levels = _levels(bounds)
    if span.is_cpu and span.dim() == 0:
        # max and min keep the NaN that comes first
        number = np.float32(max(abs(span.item()), SMALLEST_RANGE)) / np.float32(levels)
        zero = None if low is None else float(np.rint(np.float32(abs(low.item())) / number))
        return float(number), None if zero is None else min(max(zero, bounds[0]), bounds[1])
    scale = span.abs().clamp_(min=SMALLEST_RANGE)
    # by a number of the host GPUs multiply its reciprocal
    scale.div_(levels if scale.is_cpu else scale.new_full((), levels))
    return scale, None if low is None else low.abs().div_(scale).round_().clamp_(*bounds)


def integers_of(x: Tensor, scale: Scale, zero_point: Scale | None) -> Tensor:
    """The integers of x before they are clamped, as floating-point numbers in a tensor of their own."""
    y = x / scale  # not times the reciprocal: this is what makes the values equal to Brevitas's to the last bit
    if zero_point is not None:
        y.add_(zero_point)
    return y.round_()


def dequantized(integers: Tensor, scale: Scale, zero_point: Scale | None) -> Tensor:
    """The values of the integers, written over them."""
    if zero_point is not None:
        integers.sub_(zero_point)
    return integers.mul_(scale)


def _total(work: Tensor, span: Tensor) -> Tensor:
    """The sum over everything that shares a range, in a tensor of its own: where nothing does, sum_to_size would give
    back `work`.
    """
    return work.clone() if work.shape == span.shape else work.sum_to_size(span.shape)
