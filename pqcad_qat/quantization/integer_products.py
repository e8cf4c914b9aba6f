"""Convolutions of training in INT8: on a CPU with VNNI, oneDNN multiplies the integers that quantized layers compute
with.

Not here: the quantizers (fake_quantization.py, brevitas_layers.py), linear layers, whose products are too few, and the
deployed graph (export/).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pqcad_qat.quantization.fake_quantization import (
    Grid,
    dequantized,
    integers_of,
    learned_gradients,
    reach_of,
    scale_and_zero_point,
)

PER_ACTIVATION, PER_WEIGHT = 24, 1100
"""What the way to INT8 and back costs for each number read and written, in products that INT8 makes up for it with
(measured on Zen 4).
"""
_LARGEST_SUM = 2**31 - 1


Parts = Sequence[tuple[Tensor, Tensor]]
"""What a weight (O, I, kh, kw) is the sum of: integers up to 127, in floating point and its shape, times a scale, (O,
1, 1, 1) or ().
"""


class Geometry(NamedTuple):
    """Of a convolution without groups, padded with zeros: [h, w] each."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]


def applies(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution of x (B, I, H, W) with a weight (O, I, kh, kw), both of 8 bits at most, is computed in
    INT8.

    It is where a backward pass is recorded (what is sampled, exported and proven stays in floating point), in float32
    on a CPU with VNNI, if it has products enough to be faster, and not so many in a sum that it might overflow.
    """
    positions = x.numel() / (x.shape[1] * geometry.stride[0] * geometry.stride[1])
    faster = weight.numel() * (positions - PER_WEIGHT) > PER_ACTIVATION * (x.numel() + weight.shape[0] * positions)
    exact = weight[0].numel() * 255 * 127 <= _LARGEST_SUM
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return faster and exact and plain and torch.is_grad_enabled() and multiplies_integers()


@cache
def multiplies_integers() -> bool:
    """Whether this CPU has VNNI and oneDNN uses it. Without, pairs of products saturate at 16 bits; ONEDNN_MAX_CPU_ISA
    can take it away.
    """
    found = torch.cpu.get_capabilities()
    if not (torch.backends.mkldnn.is_available() and (found.get("avx512_vnni") or found.get("avx_vnni"))):  # type: ignore[no-untyped-call]
        return False
    largest = torch.full((1, 16, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    product = _product(
        largest, 1.0, 0, torch.full((16, 16, 1, 1), 127.0), torch.ones(1), None, Geometry([1, 1], [0, 0], [1, 1])
    )
    return bool((product == 16 * 255 * 127).all())


def convolve(x: Tensor, grid: Grid, weight: Tensor, parts: Parts, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """conv2d(quantize(x, *grid, straight=False), weight, bias), where `applies` says so: its values and gradients to
    rounding.

    x (B, I, H, W), quantized to 8 bits at most; weight (O, I, kh, kw), the sum of its parts; -> (B, O, H', W') in x's
    layout. Sums of products are exact. Only x is kept for the backward pass, which is in floating point.
    """
    y: Tensor = _Convolution.apply(x, *grid, weight, parts, bias, geometry)  # type: ignore[no-untyped-call]
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        span: Tensor,
        low: Tensor | None,
        bounds: tuple[int, int],
        weight: Tensor,
        parts: Parts,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        scale, zero_point = scale_and_zero_point(span, low, bounds)
        ctx.save_for_backward(x, span, low, weight)
        ctx.bounds, ctx.geometry = bounds, geometry
        zero = (0 if zero_point is None else int(zero_point)) - bounds[0]
        integers = _bytes(x / scale if zero_point is None else (x / scale).add_(zero_point), bounds)
        (first, first_scale), *others = parts
        y = _product(integers, float(scale), zero, first, first_scale, bias, geometry)
        for eights, weight_scale in others:
            y.add_(_product(integers, float(scale), zero, eights, weight_scale, None, geometry))
        return y if x.is_contiguous(memory_format=torch.channels_last) else _planar(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, span, low, weight = ctx.saved_tensors
        scale, zero_point = scale_and_zero_point(span, low, ctx.bounds)
        of_x, of_span, of_low, _, of_weight, _, of_bias, _ = ctx.needs_input_grad
        y = dequantized(integers_of(x, scale, zero_point).clamp_(*ctx.bounds), scale, zero_point)
        wanted = (of_x or of_span or of_low, of_weight, of_bias)
        gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradients[0], y, weight, weight.shape[:1], *ctx.geometry, False, [0, 0], 1, wanted
        )
        reach = reach_of(x, scale, zero_point, ctx.bounds)
        found: tuple[Tensor | None, ...] = (None, None, None)
        if of_span or of_low:
            found = learned_gradients(gradient, x, y, reach, span, low, scale, ctx.bounds)
        elif of_x:
            found = reach.inside(gradient), None, None
        return *found, None, weight_gradient, None, bias_gradient, None


def _bytes(levels: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Levels (B, I, H, W), written over, rounded and clamped to bounds, as uint8 counted from the smallest one,
    channels last.
    """
    # adding 2^23 rounds as `round` does, ties to even, and leaves the integer in the last byte; floats take thrice as
    # long to become bytes
    integers = levels.clamp_(*bounds).add_(2**23 - bounds[0]).view(torch.int32).to(torch.uint8)
    if not integers.is_contiguous():
        return integers.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = integers.shape
    return _transposed(integers.flatten(2)).view(batch, height, width, channels).permute(0, 3, 1, 2)


def _planar(y: Tensor) -> Tensor:
    """y (B, O, H, W), channels last, as planes."""
    return _transposed(y.permute(0, 2, 3, 1).flatten(1, 2)).view(y.shape)


def _transposed(matrices: Tensor) -> Tensor:
    """(B, R, C) contiguous -> (B, C, R) contiguous, as the shuffle of R groups of channels: torch has that with SIMD,
    copies without.
    """
    batch, rows, columns = matrices.shape
    numbers = rows * columns
    pixels = matrices.as_strided((1, numbers, batch, 1), (batch * numbers, 1, numbers, numbers))
    return F.channel_shuffle(pixels, rows).as_strided((batch, columns, rows), (numbers, rows, 1))


def _product(
    integers: Tensor,
    scale: float,
    zero: int,
    eights: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """(B, O, H', W'), channels last, of uint8 integers (B, I, H, W), channels last, and one part of a weight."""
    scales = weight_scale.reshape(-1)
    # packing reads its scales one by one, and makes nothing of their values
    packed = torch.ops.onednn.qconv_prepack(
        eights.to(torch.int8), scales.new_ones(()), scale, zero, *geometry, 1, integers.shape
    )
    zeros = torch.zeros_like(scales, dtype=torch.int64)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(
        integers, scale, zero, packed, scales, zeros, bias, *geometry, 1, 1.0, 0, torch.float32, "none", [], ""
    )
    return y
