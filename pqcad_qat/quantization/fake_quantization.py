"""Uniform quantization of a tensor as one autograd function, equal to Brevitas's in values and gradients.

It makes a third of Brevitas's passes over memory and a tenth of its calls.

The method. A range, called span, gives the scale: scale = |span| / levels. An asymmetric range also has a lower end,
low, which gives the zero point. The forward pass divides by the scale, adds the zero point, rounds, clamps to the
grid's integers, and goes back to real values.

Rounding has a derivative of zero almost everywhere, so the backward pass treats it as the identity (the
straight-through estimator; Bengio et al. 2013, arXiv 1308.3432). The gradients then follow by the chain rule. For a
symmetric range they are those of learned step size quantization (Esser et al. 2020, arXiv 1902.08153), unscaled.

- x receives the gradient of y where its integer lies within the grid's ends. Beyond them it receives 0, or, with a
  straight clamp, the gradient too.
- The scale receives (y - x) / scale times the gradient for each value within the ends, which is the rounding error in
  units of the scale. It receives y / scale times the gradient for each clamped value. With a straight clamp every
  value counts as within the ends.
- The zero point receives -scale times the gradient of each clamped value. Within the ends its two uses, added and
  subtracted, cancel.
- span receives the scale's gradient divided by the levels. low receives the zero point's, divided by the scale.

Not here: modules with their state (brevitas_quantizers.py), where ranges and widths come from (layer_state.py), and the
kernels for GPUs (gpu_fake_quantization.py).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST_RANGE = 1e-10
"""Smallest magnitude of a range, in units of the tensor, so that a channel of zeros keeps a positive scale."""

Grid = tuple[Tensor, Tensor | None, tuple[int, int]]
"""The range arguments of `quantize`: span, low (None for a zero point of 0), and the smallest and largest integer."""

Scale = Tensor | float
"""A scale or a zero point: a number where one holds for a whole tensor on the CPU, otherwise a tensor."""


def integer_range(bits: int, signed: bool, narrow: bool) -> tuple[int, int]:
    """The smallest and largest integer of a grid.

    ``narrow`` drops the smallest signed integer, so that the grid is symmetric.
    """
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
    """Quantize x and dequantize it: y = (clamp(round(x / scale + zero_point)) - zero_point) * scale.

    Rounding is straight-through. The gradients of span and low are those of Brevitas's ParameterScaling and
    ParameterZeroPoint.

    Args:
        x: tensor of any shape, computed in float32.
        span: the range, broadcastable to x. scale = |span| / levels, where levels is -bounds[0] for signed integers
            and bounds[1] for unsigned ones.
        low: the magnitude of the range's lower end, in span's shape, or None for a zero point of 0. zero_point =
            clamp(round(|low| / scale)) is an integer, so zero is always on the grid.
        bounds: the smallest and largest integer of the grid.
        straight: whether the gradient of x also passes where x is clamped (Brevitas's TensorClampSte). If False it is
            0 there (TensorClamp).
        dtype: the dtype to which y is rounded at the end.
    """
    if x.is_cuda and (kernels := _kernels()) is not None and kernels.applies(x, span, low):
        fused: Tensor = kernels.quantize(x, span, low, bounds, straight=straight, dtype=dtype)
        return fused
    x = x.float()  # bfloat16 activations under autocast have too few bits to tell 256 levels apart
    if torch.is_grad_enabled() and (x.requires_grad or span.requires_grad):
        y: Tensor = _Quantize.apply(x, span, low, bounds, straight)  # type: ignore[no-untyped-call]
        return y.to(dtype)
    scale, zero_point = scale_and_zero_point(span, low, bounds)
    return dequantized(integers_of(x, scale, zero_point).clamp_(*bounds), scale, zero_point).to(dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which layers multiply: autocast's where it is enabled, otherwise float32.

    A quantizer rounds its result to this dtype at once, so autocast need not do it in a pass of its own.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


@cache
def _kernels() -> Any:
    """The module gpu_fake_quantization.py, or None where Triton is not installed.

    Triton comes with torch's builds for GPUs. Importing it takes a second, which a run on the CPU need not spend.
    """
    return None if find_spec("triton") is None else import_module("pqcad_qat.quantization.gpu_fake_quantization")


def unclamped(x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int]) -> tuple[Tensor, Scale | None]:
    """Integers of x before they are clamped to ``bounds``, in x's shape, and the zero point.

    Arguments are those of `quantize`.
    """
    scale, zero_point = scale_and_zero_point(span, low, bounds)
    return integers_of(x.float(), scale, zero_point), zero_point


class _Quantize(torch.autograd.Function):
    """The quantizer as an autograd function; the module's docstring derives its gradients.

    What is kept for the backward pass depends on what needs a gradient:

    - Where the range learns, x and y are kept, and the scale is computed again from the range.
    - Where only x needs a gradient and the clamp cuts it, the unclamped integers are kept: they show which values were
      clamped.
    - Where only x needs a gradient and the clamp is straight, nothing is kept, since the gradient passes unchanged.
    """

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
        else:  # only x needs a gradient, and the unclamped integers show where it is cut
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
    """The gradient where the unclamped integers, in the gradient's shape, lie within the bounds, and 0 elsewhere."""
    # The derivative of hardtanh is exactly this mask and one vectorised pass on every device. Comparisons that make
    # boolean masks cost ten times as much on CPUs. Integers lie half a unit or more from these limits.
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
    """The gradients of x, span and low, from the gradient of y = quantize(x, span, low, bounds).

    ``integers`` are those of x, not clamped yet, or None where the clamp is straight. Two sums over the tensor are
    needed:

    - along_scale, the sum of (dy / dscale) * scale * gradient. Its term is y - x within the bounds and y where x is
      clamped. Both are y minus `inside(x)`, which is x within the bounds and 0 elsewhere.
    - clamped, the sum of the gradient over the clamped values, from which the zero point's gradient follows.
    """
    if integers is None:
        return gradient, *_range_gradients(
            _total((y - x).mul_(gradient), span), None, span, low, scale=scale, bounds=bounds
        )
    work = inside(x, integers, bounds)
    # Subtract before multiplying by the gradient and summing. y and x are nearly equal, so two separate sums would be
    # large and nearly equal, and their difference would be lost to rounding.
    torch.sub(y, work, out=work)
    along_scale = _total(work.mul_(gradient), span)
    reaching = inside(gradient, integers, bounds, out=work)
    clamped = None if low is None else _total(gradient - reaching, span)  # again the difference before the sum
    return reaching, *_range_gradients(along_scale, clamped, span, low, scale=scale, bounds=bounds)


def _range_gradients(
    along_scale: Tensor,
    clamped: Tensor | None,
    span: Tensor,
    low: Tensor | None,
    *,
    scale: Scale,
    bounds: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of span and low from the two sums of `learned_gradients`.

    Where the scale is a number, the arithmetic is done on numbers too, since operations on tensors of one element are
    slow.
    """
    if not isinstance(scale, float):
        return _through_range(along_scale, clamped, span, low, scale=scale, bounds=bounds)
    numbers = [None if value is None else value.item() for value in (along_scale, clamped, span, low)]
    span_gradient, low_gradient = _through_range(
        numbers[0], numbers[1], numbers[2], numbers[3], scale=scale, bounds=bounds
    )
    return span.new_tensor(span_gradient), None if low_gradient is None else span.new_tensor(low_gradient)


def _through_range(
    along_scale: Any, clamped: Any, span: Any, low: Any, *, scale: Any, bounds: tuple[int, int]
) -> tuple[Any, Any]:
    """The gradients of span and low, for numbers and tensors alike.

    along_scale / scale is the gradient of the scale if the zero point stood still. The zero point, clamp(round(|low| /
    scale)), depends on the scale and on low, so it passes its own gradient, -scale * clamped, to both: -clamped to
    |low|, and clamped * |low| / scale to the scale. Both are cut where the zero point itself is clamped.
    """
    slope, low_gradient = along_scale / scale, None
    if clamped is not None:
        ratio = abs(low) / scale
        reaching = clamped * ((ratio >= bounds[0] - 0.5) & (ratio <= bounds[1] + 0.5))
        slope = slope + reaching * ratio
        low_gradient = -_signed(reaching, low)
    return _signed(slope / _levels(bounds), span), low_gradient


def _signed(value: Any, by: Any) -> Any:
    """The value, with its sign changed where ``by`` is negative: the derivative of the absolute value."""
    if isinstance(by, Tensor):
        return torch.where(by < 0, -value, value)
    return -value if by < 0 else value


def _levels(bounds: tuple[int, int]) -> int:
    """The number by which the range is divided to give the scale."""
    return -bounds[0] if bounds[0] else bounds[1]


def scale_and_zero_point(span: Tensor, low: Tensor | None, bounds: tuple[int, int]) -> tuple[Scale, Scale | None]:
    """The scale and the zero point (None without low) that `quantize` uses.

    Both are numbers where the range is a single number on the CPU, since tensors cost three times as long there.
    Otherwise they have span's shape.
    """
    levels = _levels(bounds)
    if span.is_cpu and span.dim() == 0:
        # Python's max and min return their first argument if it is NaN, so a range of NaN stays NaN.
        scale_number = np.float32(max(abs(span.item()), SMALLEST_RANGE)) / np.float32(levels)
        zero = None if low is None else float(np.rint(np.float32(abs(low.item())) / scale_number))
        return float(scale_number), None if zero is None else min(max(zero, bounds[0]), bounds[1])
    scale = span.abs().clamp_(min=SMALLEST_RANGE)
    # Divided by a Python number, a GPU multiplies by its reciprocal, which rounds differently: it gets a tensor.
    scale.div_(levels if scale.is_cpu else scale.new_full((), levels))
    return scale, None if low is None else low.abs().div_(scale).round_().clamp_(*bounds)


def integers_of(x: Tensor, scale: Scale, zero_point: Scale | None) -> Tensor:
    """The integers of x before they are clamped, as floating-point numbers in a tensor of their own."""
    y = x / scale  # multiplying by the reciprocal would be faster, but not equal to Brevitas's values to the last bit
    if zero_point is not None:
        y.add_(zero_point)
    return y.round_()


def dequantized(integers: Tensor, scale: Scale, zero_point: Scale | None) -> Tensor:
    """The real values of the integers, written over them in place."""
    if zero_point is not None:
        integers.sub_(zero_point)
    return integers.mul_(scale)


def _total(work: Tensor, span: Tensor) -> Tensor:
    """The sum over all values that share a range, in span's shape and always in a tensor of its own.

    Where no two values share one, sum_to_size would return `work` itself, which is overwritten later.
    """
    return work.clone() if work.shape == span.shape else work.sum_to_size(span.shape)
