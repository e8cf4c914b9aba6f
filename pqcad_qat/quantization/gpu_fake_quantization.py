"""The quantizer of fake_quantization.py as Triton kernels, for GPUs: one launch forward, and one or two backward,
whatever is learned.

Not here: what the values and gradients are (fake_quantization.py: these are the same), nor when a kernel is taken
(`quantize` there).
"""
# Triton ships no types, and what it compiles is Python by its syntax alone:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024
"""Elements that a program takes at a time."""
PROGRAMS = 1024
"""At most so many programs share a tensor's sums: some for every multiprocessor, and few enough for one block to add up
what they found.
"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALONE = 4 * BLOCK
"""Up to so many elements one program is faster than a second launch."""
LARGEST = 2**30
"""Elements of a tensor, so that no index in a kernel leaves 32 bits."""


def applies(x: Tensor, span: Tensor, low: Tensor | None) -> bool:
    """Whether the kernels take these arguments of rounding.quantize: one range for all of x, or one for each index of
    its first axis.
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
    return part.dtype == torch.float32 and part.shape == span.shape and part.is_contiguous() and part.device == x.device


def quantize(
    x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int], straight: bool, dtype: torch.dtype
) -> Tensor:
    """As rounding.quantize: its values to the last bit, and its gradients but for the order of sums, which is always
    the same.

    x is kept for the backward pass, in its own dtype, and nothing else of its size.
    """
    if torch.is_grad_enabled() and (x.requires_grad or span.requires_grad or (low is not None and low.requires_grad)):
        y: Tensor = _Quantize.apply(x, span, low, bounds, straight, dtype)
        return y
    return _forward(x, span, low, bounds, dtype)[1]


class _Quantize(torch.autograd.Function):
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
        saved = ctx.saved_tensors  # once: activation checkpointing computes them anew
        if not saved:
            return gradient, None, None, None, None, None
        x, span, low = saved
        if gradient.stride() != x.stride():
            gradient = torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)
        reaching = torch.empty_like(x) if ctx.needs_input_grad[0] and not ctx.straight else None
        rows, size = _rows(x, span)
        if not ctx.learns:
            _pass_inside[(rows * triton.cdiv(size, BLOCK),)](gradient, x, span, low, reaching, size, *ctx.bounds, BLOCK)
            return reaching, None, None, None, None, None
        of_span = torch.empty_like(span)
        of_low = None if low is None or ctx.straight else torch.empty_like(low)
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
    """x in memory without gaps, row after row (a copy where it is not so), and its quantized values in the same
    order.
    """
    y = torch.empty_like(x, dtype=dtype)
    rows, size = _rows(x, span)
    if y.stride() != x.stride() or (rows > 1 and x.stride(0) != size):  # empty_like leaves out gaps
        x = x.contiguous()
        y = torch.empty_like(x, dtype=dtype)
    _quantize[(rows * triton.cdiv(size, BLOCK),)](x, span, low, y, size, *bounds, BLOCK)
    return x, y


def _rows(x: Tensor, span: Tensor) -> tuple[int, int]:
    """How many rows have a range of their own, and the elements of each."""
    rows = span.numel()
    return rows, x.numel() // rows


# ---- on the GPU: names of constants are lower case too; lowest and highest are the bounds
# ----------------------------------------


@triton.jit
def _quantize(x, span, low, y, size, lowest: tl.constexpr, highest: tl.constexpr, block: tl.constexpr):
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
    """Each program walks over a share of a row. Alone with it, it finds the range's gradients; else it leaves two sums
    to `_add_up`.
    """
    row, share = tl.program_id(0) // programs, tl.program_id(0) % programs
    scale, zero_point = _scale_and_zero_point(span, low, row, lowest, highest)
    along_scale = tl.zeros((block,), tl.float32)
    clamped = tl.zeros((block,), tl.float32)
    first = share * block
    while first < size:  # a range with such ends is more than the interpreter of some versions takes
        column = first + tl.arange(0, block)
        here, within = row * size + column, column < size
        value = tl.load(x + here, mask=within, other=0.0).to(tl.float32)
        slope = tl.load(gradient + here, mask=within, other=0.0).to(tl.float32)
        integer = _integer(value, scale, zero_point, lowest, highest)
        y = _dequantized(integer, scale, zero_point, lowest, highest)
        if straight:
            along_scale += (y - value) * slope
        else:
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
    """What rounding.learned_gradients makes of its two sums: (dy / dscale) * scale, and the gradient of what was
    clamped.
    """
    scale, _ = _scale_and_zero_point(span, low, row, lowest, highest)
    of_scale = along_scale / scale
    if of_low is not None:
        end = tl.load(low + row)
        ratio = tl.div_rn(tl.abs(end), scale)
        reaches = _inside(-scale * clamped, _rounded(ratio, lowest, highest), lowest, highest) / scale
        tl.store(of_low + row, tl.where(end < 0.0, -reaches, reaches))
        of_scale -= reaches * ratio
    of_range = of_scale / _levels(lowest, highest)
    tl.store(of_span + row, tl.where(tl.load(span + row) < 0.0, -of_range, of_range))


@triton.jit
def _scale_and_zero_point(span, low, row, lowest: tl.constexpr, highest: tl.constexpr):
    wide = tl.abs(tl.load(span + row))
    # rounding.SMALLEST_RANGE; NaN stays NaN
    scale = tl.div_rn(tl.where(wide < 1e-10, 1e-10, wide), _levels(lowest, highest))
    zero_point = 0.0
    if low is not None:
        zero_point = _clamped(_rounded(tl.div_rn(tl.abs(tl.load(low + row)), scale), lowest, highest), lowest, highest)
    return scale, zero_point


@triton.jit
def _levels(lowest: tl.constexpr, highest: tl.constexpr):
    return (-lowest if lowest else highest) * 1.0


@triton.jit
def _integer(x, scale, zero_point, lowest: tl.constexpr, highest: tl.constexpr):
    """As rounding.integers_of, but never further than 1 from the bounds."""
    return _rounded(tl.div_rn(x, scale) + zero_point, lowest, highest)


@triton.jit
def _dequantized(integer, scale, zero_point, lowest: tl.constexpr, highest: tl.constexpr):
    return (_clamped(integer, lowest, highest) - zero_point) * scale


@triton.jit
def _rounded(x, lowest: tl.constexpr, highest: tl.constexpr):
    """x to the nearest integer, halves to the even one, from lowest - 1 to highest + 1; NaN stays NaN."""
    x = tl.where(x < lowest - 1.0, lowest - 1.0, x)
    x = tl.where(x > highest + 1.0, highest + 1.0, x)
    nearest = (
        x + 12582912.0
    ) - 12582912.0  # 1.5 * 2^23: float32 has no fractions there; rint is not in the interpreter of the tests
    return tl.where(nearest == 0.0, x * 0.0, nearest)  # -0.0 too


@triton.jit
def _clamped(integer, lowest: tl.constexpr, highest: tl.constexpr):
    integer = tl.where(integer < lowest, lowest * 1.0, integer)
    return tl.where(integer > highest, highest * 1.0, integer)


@triton.jit
def _inside(gradient, integer, lowest: tl.constexpr, highest: tl.constexpr):
    return tl.where((integer < lowest) | (integer > highest), 0.0, gradient)
