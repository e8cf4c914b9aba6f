"""The kernels that quantize on a GPU and pass gradients back, written in Triton.

The method. x is seen as rows: one row for each range, so a single row where the whole tensor shares one. A program is
one instance of a kernel and handles blocks of elements.

- Forward, every program quantizes one block of one row (`quantize_block`).
- Backward, where the range does not learn, every program cuts the gradient of one block at the grid's ends
  (`pass_inside`). With a straight clamp no kernel runs, since the gradient passes unchanged.
- Backward, where the range learns, programs also sum the two quantities from which the range's gradients follow
  (`range_gradients`). If one program has a row to itself, it writes these gradients at once. If several share the only
  row, each stores its two partial sums, and a second launch of one program adds them up (`add_up`).

The order of the sums is fixed: no atomic additions are used, so results are the same in every run.

Constants have lower-case names here; lowest and highest are the grid's bounds.

Not here: how the kernels are launched (gpu_fake_quantization.py), and what the values and gradients are
(fake_quantization.py).
"""
# Triton ships no types, and its kernels are Python in syntax alone, so mypy cannot check them:
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_block(x, span, low, y, size, lowest: tl.constexpr, highest: tl.constexpr, block: tl.constexpr):
    """Quantize one block of one row; `tl.program_id` counts the blocks of all rows, row after row."""
    blocks = tl.cdiv(size, block)
    row = tl.program_id(0) // blocks
    scale, zero_point = _scale_and_zero_point(span, low, row, lowest, highest)
    column = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    offsets, within = row * size + column, column < size
    value = tl.load(x + offsets, mask=within, other=0.0).to(tl.float32)
    tl.store(
        y + offsets,
        _dequantized(_integer(value, scale, zero_point, lowest, highest), scale, zero_point, lowest, highest),
        mask=within,
    )


@triton.jit
def pass_inside(
    gradient, x, span, low, reaching, size, lowest: tl.constexpr, highest: tl.constexpr, block: tl.constexpr
):
    """Write the gradient of one block to `reaching`, with 0 where x is clamped."""
    blocks = tl.cdiv(size, block)
    row = tl.program_id(0) // blocks
    scale, zero_point = _scale_and_zero_point(span, low, row, lowest, highest)
    column = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    offsets, within = row * size + column, column < size
    integer = _integer(tl.load(x + offsets, mask=within, other=0.0).to(tl.float32), scale, zero_point, lowest, highest)
    tl.store(
        reaching + offsets,
        _inside(tl.load(gradient + offsets, mask=within, other=0.0), integer, lowest, highest),
        mask=within,
    )


@triton.jit
def range_gradients(
    gradient,
    x,
    span,
    low,
    span_gradient,
    low_gradient,
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
    it leaves two partial sums to `add_up`, all of along_scale first, then all of clamped.
    """
    row, share = tl.program_id(0) // programs, tl.program_id(0) % programs
    scale, zero_point = _scale_and_zero_point(span, low, row, lowest, highest)
    along_scale = tl.zeros((block,), tl.float32)
    clamped = tl.zeros((block,), tl.float32)
    first = share * block
    while first < size:  # some versions of Triton's interpreter refuse a `range` whose ends are known only at run time
        column = first + tl.arange(0, block)
        offsets, within = row * size + column, column < size
        value = tl.load(x + offsets, mask=within, other=0.0).to(tl.float32)
        slope = tl.load(gradient + offsets, mask=within, other=0.0).to(tl.float32)
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
                tl.store(reaching + offsets, reaches, mask=within)
        first += programs * block
    along_scale, clamped = tl.sum(along_scale, axis=0), tl.sum(clamped, axis=0)
    if sums is None:
        _store_gradients(along_scale, clamped, span, low, span_gradient, low_gradient, row, lowest, highest)
    else:
        tl.store(sums + share, along_scale)
        tl.store(sums + programs + share, clamped)


@triton.jit
def add_up(
    sums,
    span,
    low,
    span_gradient,
    low_gradient,
    programs,
    lowest: tl.constexpr,
    highest: tl.constexpr,
    block: tl.constexpr,
):
    """Add up the partial sums of all programs of the only row, in a fixed order, and write the range's gradients."""
    share = tl.arange(0, block)
    along_scale = tl.sum(tl.load(sums + share, mask=share < programs, other=0.0), axis=0)
    clamped = tl.sum(tl.load(sums + programs + share, mask=share < programs, other=0.0), axis=0)
    _store_gradients(along_scale, clamped, span, low, span_gradient, low_gradient, 0, lowest, highest)


@triton.jit
def _store_gradients(
    along_scale,
    clamped,
    span,
    low,
    span_gradient,
    low_gradient,
    row,
    lowest: tl.constexpr,
    highest: tl.constexpr,
):
    """Write the gradients of one row's span and low from its two sums, as fake_quantization.learned_gradients does.

    along_scale is the sum of (dy / dscale) * scale * gradient; clamped is the sum of the gradient over clamped values.
    """
    scale, _ = _scale_and_zero_point(span, low, row, lowest, highest)
    scale_gradient = along_scale / scale
    if low_gradient is not None:
        end = tl.load(low + row)
        # The zero point's gradient is -scale * clamped, cut where the zero point itself is clamped. Divided by the
        # scale, it is what |low| receives; the scale receives -ratio times as much.
        ratio = tl.div_rn(tl.abs(end), scale)
        reaches = _inside(-scale * clamped, _rounded(ratio, lowest, highest), lowest, highest) / scale
        tl.store(low_gradient + row, tl.where(end < 0.0, -reaches, reaches))
        scale_gradient -= reaches * ratio
    span_slope = scale_gradient / _levels(lowest, highest)
    tl.store(span_gradient + row, tl.where(tl.load(span + row) < 0.0, -span_slope, span_slope))


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
