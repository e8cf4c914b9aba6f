"""The quantizer of fake_quantization.py on a GPU: an autograd function that launches the kernels of gpu_kernels.py.

The forward pass is one launch, and the backward pass at most two. A launch runs many programs of a kernel at once, each
over its blocks of a row; gpu_kernels.py says what these are.

Not here: the kernels (gpu_kernels.py), what the values and gradients are (fake_quantization.py, which this file
reproduces), nor when a kernel is used (`quantize` there).
"""
# Triton ships no types:
# mypy: disable-error-code="no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from pqcad_qat.quantization import gpu_kernels

BLOCK = 1024
"""Elements that a program handles at a time."""
PROGRAMS = 1024
"""Largest number of programs that share a tensor's sums.

It gives every multiprocessor of a GPU some, and one program can still add up all partial sums in one block.
"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of x that the kernels read; they compute in float32."""
ALONE = 4 * BLOCK
"""Largest number of elements that one program sums by itself; up to it that is faster than a second launch."""
LARGEST = 2**30
"""Largest number of elements of a tensor, so that every index in a kernel fits into 32 bits."""


def applies(x: Tensor, span: Tensor, low: Tensor | None) -> bool:
    """Whether the kernels can take these arguments of fake_quantization.quantize.

    They need one range for all of x, or one for each index of its first axis, and tensors on the current device.
    """
    rows = span.numel()
    one_range = rows == 1 and span.dim() <= x.dim()
    return (
        (one_range or (span.dim() == x.dim() and rows == span.shape[0] == x.shape[0]))
        and 0 < x.numel() <= LARGEST
        and x.dtype in DTYPES
        and _stored_like(span, span, x)
        and (low is None or _stored_like(low, span, x))
        and (not x.is_cuda or x.get_device() == torch.cuda.current_device())
    )


def _stored_like(end: Tensor, span: Tensor, x: Tensor) -> bool:
    """Whether one end of a range is a contiguous float32 tensor of span's shape on x's device."""
    return end.dtype == torch.float32 and end.shape == span.shape and end.is_contiguous() and end.device == x.device


def quantize(
    x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int], straight: bool, dtype: torch.dtype
) -> Tensor:
    """As fake_quantization.quantize: the same values to the last bit, and the same gradients up to the order of sums.

    That order is the same in every run. Of the tensors of x's size, only x itself is kept for the backward pass, in
    its own dtype.
    """
    if torch.is_grad_enabled() and (x.requires_grad or span.requires_grad or (low is not None and low.requires_grad)):
        y: Tensor = _Quantize.apply(x, span, low, bounds, straight, dtype)
        return y
    return _forward(x, span, low, bounds, dtype)[1]


class _Quantize(torch.autograd.Function):
    """The kernels as an autograd function.

    Only x and its range are kept. The backward kernels compute the integers again, so no other tensor of x's size is
    held.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        span: Tensor,
        low: Tensor | None,
        bounds: tuple[int, int],
        straight: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        dense, y = _forward(x, span, low, bounds, dtype)
        ctx.bounds, ctx.straight = bounds, straight
        ctx.learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(*((dense, span, low) if ctx.learns or not straight else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        saved = ctx.saved_tensors  # read once only: under activation checkpointing each read may compute them again
        if not saved:
            return gradient, None, None, None, None, None
        x, span, low = saved
        # The kernels use one index for all tensors, so the gradient must lie in memory as x does.
        if gradient.stride() != x.stride():
            gradient = torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)
        reaching = torch.empty_like(x) if ctx.needs_input_grad[0] and not ctx.straight else None
        rows, size = _rows(x, span)
        if not ctx.learns:
            gpu_kernels.pass_inside[(rows * triton.cdiv(size, BLOCK),)](
                gradient, x, span, low, reaching, size, *ctx.bounds, BLOCK
            )
            return reaching, None, None, None, None, None
        span_gradient = torch.empty_like(span)
        low_gradient = None if low is None or ctx.straight else torch.empty_like(low)
        # With a straight clamp the zero point cancels out of y everywhere, so low has no gradient. A single long row is
        # shared by several programs; many rows occupy the GPU with one program each.
        programs = min(triton.cdiv(size, BLOCK), PROGRAMS) if rows == 1 and size > ALONE else 1
        sums = span_gradient.new_empty(2 * programs) if programs > 1 else None
        arguments = (span, low, span_gradient, low_gradient)
        gpu_kernels.range_gradients[(rows * programs,)](
            gradient, x, *arguments, reaching, sums, size, programs, *ctx.bounds, ctx.straight, BLOCK
        )
        if sums is not None:
            gpu_kernels.add_up[(1,)](sums, *arguments, programs, *ctx.bounds, PROGRAMS)
        return (gradient if ctx.straight else reaching), span_gradient, low_gradient, None, None, None


def _forward(
    x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x in memory without gaps, row after row, and its quantized values in the same order.

    x is copied where it has gaps or its rows are not in order.
    """
    y = torch.empty_like(x, dtype=dtype)
    rows, size = _rows(x, span)
    # The kernels index memory as one sequence. empty_like makes a tensor without gaps, so other strides show gaps in x;
    # rows must also lie one after another, which the stride of the first axis shows.
    if y.stride() != x.stride() or (rows > 1 and x.stride(0) != size):
        x = x.contiguous()
        y = torch.empty_like(x, dtype=dtype)
    gpu_kernels.quantize_block[(rows * triton.cdiv(size, BLOCK),)](x, span, low, y, size, *bounds, BLOCK)
    return x, y


def _rows(x: Tensor, span: Tensor) -> tuple[int, int]:
    """Number of rows that have a range of their own, and of the elements in each."""
    rows = span.numel()
    return rows, x.numel() // rows
