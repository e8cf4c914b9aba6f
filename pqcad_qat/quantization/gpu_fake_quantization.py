"""The quantizer of fake_quantization.py as Triton kernels for GPUs: one launch forward, and at most two backward.

The method. x is seen as rows: one row for each range, so a single row where the whole tensor shares one. A program is
one instance of a kernel and handles blocks of `BLOCK` elements.

- Forward, every program quantizes one block of one row (`_quantize`).
- Backward, where the range does not learn, every program cuts the gradient of one block at the grid's ends
  (`_pass_inside`). With a straight clamp no kernel runs, since the gradient passes unchanged.
- Backward, where the range learns, programs also sum the two quantities from which the range's gradients follow
  (`_gradients`). If one program has a row to itself, it writes these gradients at once. If several share the only row,
  each stores its two partial sums, and a second launch of one program adds them up (`_add_up`).

The order of the sums is fixed: no atomic additions are used, so results are the same in every run.

Not here: what the values and gradients are (fake_quantization.py, which this file reproduces), nor when a kernel is
used (`quantize` there).
"""
# Triton ships no types, and its kernels are Python in syntax alone, so mypy cannot check them:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        and _held_like(span, span, x)
        and (low is None or _held_like(low, span, x))
        and (not x.is_cuda or x.get_device() == torch.cuda.current_device())
    )


def _held_like(part: Tensor, span: Tensor, x: Tensor) -> bool:
    """Whether part of a range is a contiguous float32 tensor of span's shape on x's device."""
    return part.dtype == torch.float32 and part.shape == span.shape and part.is_contiguous() and part.device == x.device


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
            _pass_inside[(rows * triton.cdiv(size, BLOCK),)](gradient, x, span, low, reaching, size, *ctx.bounds, BLOCK)
            return reaching, None, None, None, None, None
        of_span = torch.empty_like(span)
        of_low = None if low is None or ctx.straight else torch.empty_like(low)
        # With a straight clamp the zero point cancels out of y everywhere, so low has no gradient. A single long row is
        # shared by several programs; many rows occupy the GPU with one program each.
        programs = min(triton.cdiv(size, BLOCK), PROGRAMS) if rows == 1 and size > ALONE else 1
        sums = of_span.new_empty(2 * programs) if programs > 1 else None
        arguments = (span, low, of_span, of_low)
        _gradients[(rows * programs,)](
            gradient, x, *arguments, reaching, sums, size, programs, *ctx.bounds, ctx.straight, BLOCK
        )
        if sums is not None:
            _add_up[(1,)](sums, *arguments, programs, *ctx.bounds, PROGRAMS)
        return (gradient if ctx.straight else reaching), of_span, of_low, None, None, None


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
    _quantize[(rows * triton.cdiv(size, BLOCK),)](x, span, low, y, size, *bounds, BLOCK)
    return x, y


def _rows(x: Tensor, span: Tensor) -> tuple[int, int]:
    """Number of rows that have a range of their own, and of the elements in each."""
    rows = span.numel()
    return rows, x.numel() // rows


# ---- Kernels, which run on the GPU. Constants have lower-case names here; lowest and highest are the grid's bounds.


@triton.jit
def _quantize(x, span, low, y, size, lowest: tl.constexpr, highest: tl.constexpr, block: tl.constexpr):
    """Quantize one block of one row; `tl.program_id` counts the blocks of all rows, row after row."""
    blocks = tl.cdiv(size, block)
    row = tl.program_id(0) // blocks
    scale, zero_point = _scale_and_zero_point(span, low, row, lowest, highest)
    column = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    here, within = row * size + column, column < size
    value = tl.load(x + here, mask=within, other=0.0).to(tl.float32)
    tl.store(
        y + here,
        _dequantized(_integer(value, scale, zero_point, lowest, highest), scale, zero_point, lowest, highest),
        mask=within,
    )


@triton.jit
def _pass_inside(
    gradient, x, span, low, reaching, size, lowest: tl.constexpr, highest: tl.constexpr, block: tl.constexpr
):
    """Write the gradient of one block to `reaching`, with 0 where x is clamped."""
    blocks = tl.cdiv(size, block)
    row = tl.program_id(0) // blocks
    scale, zero_point = _scale_and_zero_point(span, low, row, lowest, highest)
    column = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    here, within = row * size + column, column < size
    integer = _integer(tl.load(x + here, mask=within, other=0.0).to(tl.float32), scale, zero_point, lowest, highest)
    tl.store(
        reaching + here,
        _inside(tl.load(gradient + here, mask=within, other=0.0), integer, lowest, highest),
        mask=within,
    )


@triton.jit
def _gradients(
    gradient,
    x,
    span,
    low,
    of_span,
    of_low,
    reaching,
    sums,
    size,
    programs,
    lowest: tl.constexpr,
    highest: tl.constexpr,
    straight: tl.constexpr,
    block: tl.constexpr,
):
    """Sum over one program's share of a row what the range's gradients need, and write the gradient of x.

    The programs of a row take its blocks in turn. A program alone with its row writes the range's gradients. Otherwise
    it leaves two partial sums to `_add_up`, all of along_scale first, then all of clamped.
    """
    row, share = tl.program_id(0) // programs, tl.program_id(0) % programs
    scale, zero_point = _scale_and_zero_point(span, low, row, lowest, highest)
    along_scale = tl.zeros((block,), tl.float32)
    clamped = tl.zeros((block,), tl.float32)
    first = share * block
    while first < size:  # some versions of Triton's interpreter refuse a `range` whose ends are known only at run time
        column = first + tl.arange(0, block)
        here, within = row * size + column, column < size
        value = tl.load(x + here, mask=within, other=0.0).to(tl.float32)
        slope = tl.load(gradient + here, mask=within, other=0.0).to(tl.float32)
        integer = _integer(value, scale, zero_point, lowest, highest)
        y = _dequantized(integer, scale, zero_point, lowest, highest)
        if straight:
            along_scale += (y - value) * slope
        else:  # y - x within the bounds and y beyond them, as fake_quantization.learned_gradients explains
            reaches = _inside(slope, integer, lowest, highest)
            outside = slope - reaches
            along_scale += (y - value) * reaches + y * outside
            clamped += outside
            if reaching is not None:
                tl.store(reaching + here, reaches, mask=within)
        first += programs * block
    along_scale, clamped = tl.sum(along_scale, axis=0), tl.sum(clamped, axis=0)
    if sums is None:
        _store_gradients(along_scale, clamped, span, low, of_span, of_low, row, lowest, highest)
    else:
        tl.store(sums + share, along_scale)
        tl.store(sums + programs + share, clamped)


@triton.jit
def _add_up(
    sums,
    span,
    low,
    of_span,
    of_low,
    programs,
    lowest: tl.constexpr,
    highest: tl.constexpr,
    block: tl.constexpr,
):
    """Add up the partial sums of all programs of the only row, in a fixed order, and write the range's gradients."""
    share = tl.arange(0, block)
    along_scale = tl.sum(tl.load(sums + share, mask=share < programs, other=0.0), axis=0)
    clamped = tl.sum(tl.load(sums + programs + share, mask=share < programs, other=0.0), axis=0)
    _store_gradients(along_scale, clamped, span, low, of_span, of_low, 0, lowest, highest)


@triton.jit
def _store_gradients(
    along_scale,
    clamped,
    span,
    low,
    of_span,
    of_low,
    row,
    lowest: tl.constexpr,
    highest: tl.constexpr,
):
    """Write the gradients of one row's span and low from its two sums, as fake_quantization.learned_gradients does.

    along_scale is the sum of (dy / dscale) * scale * gradient; clamped is the sum of the gradient over clamped values.
    """
    scale, _ = _scale_and_zero_point(span, low, row, lowest, highest)
    of_scale = along_scale / scale
    if of_low is not None:
        end = tl.load(low + row)
        # The zero point's gradient is -scale * clamped, cut where the zero point itself is clamped. Divided by the
        # scale, it is what |low| receives; the scale receives -ratio times as much.
        ratio = tl.div_rn(tl.abs(end), scale)
        reaches = _inside(-scale * clamped, _rounded(ratio, lowest, highest), lowest, highest) / scale
        tl.store(of_low + row, tl.where(end < 0.0, -reaches, reaches))
        of_scale -= reaches * ratio
    of_range = of_scale / _levels(lowest, highest)
    tl.store(of_span + row, tl.where(tl.load(span + row) < 0.0, -of_range, of_range))


@triton.jit
def _scale_and_zero_point(span, low, row, lowest: tl.constexpr, highest: tl.constexpr):
    """The scale and zero point of a row, as fake_quantization.scale_and_zero_point has them."""
    wide = tl.abs(tl.load(span + row))
    # 1e-10 is fake_quantization.SMALLEST_RANGE. A comparison with NaN is false, so NaN stays NaN.
    scale = tl.div_rn(tl.where(wide < 1e-10, 1e-10, wide), _levels(lowest, highest))
    zero_point = 0.0
    if low is not None:
        zero_point = _clamped(_rounded(tl.div_rn(tl.abs(tl.load(low + row)), scale), lowest, highest), lowest, highest)
    return scale, zero_point


@triton.jit
def _levels(lowest: tl.constexpr, highest: tl.constexpr):
    """The number by which the range is divided to give the scale, as a float."""
    return (-lowest if lowest else highest) * 1.0


@triton.jit
def _integer(x, scale, zero_point, lowest: tl.constexpr, highest: tl.constexpr):
    """As fake_quantization.integers_of, but at most 1 beyond the bounds, which still shows that a value is clamped."""
    return _rounded(tl.div_rn(x, scale) + zero_point, lowest, highest)


@triton.jit
def _dequantized(integer, scale, zero_point, lowest: tl.constexpr, highest: tl.constexpr):
    """The real value of an integer, clamped to the bounds first."""
    return (_clamped(integer, lowest, highest) - zero_point) * scale


@triton.jit
def _rounded(x, lowest: tl.constexpr, highest: tl.constexpr):
    """x rounded to the nearest integer, halves to even, limited to [lowest - 1, highest + 1]; NaN stays NaN."""
    x = tl.where(x < lowest - 1.0, lowest - 1.0, x)
    x = tl.where(x > highest + 1.0, highest + 1.0, x)
    # 12582912 is 1.5 * 2^23. Between 2^23 and 2^24 float32 holds integers alone, so the addition itself rounds, halves
    # to even, and the subtraction is exact. `rint` would do the same, but the interpreter of the tests lacks it.
    nearest = (x + 12582912.0) - 12582912.0
    return tl.where(nearest == 0.0, x * 0.0, nearest)  # keeps the sign of x, since round(-0.2) is -0.0


@triton.jit
def _clamped(integer, lowest: tl.constexpr, highest: tl.constexpr):
    """The integer limited to the bounds; NaN stays NaN."""
    integer = tl.where(integer < lowest, lowest * 1.0, integer)
    return tl.where(integer > highest, highest * 1.0, integer)


@triton.jit
def _inside(gradient, integer, lowest: tl.constexpr, highest: tl.constexpr):
    """The gradient where the integer lies within the bounds, and 0 elsewhere."""
    return tl.where((integer < lowest) | (integer > highest), 0.0, gradient)
