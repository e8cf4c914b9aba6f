"""Convolutions of training in INT8: on a CPU with VNNI, oneDNN multiplies the integers that quantized layers compute with.

Not here: the quantizers (rounding.py, injectors.py), linear layers, whose products are too few, and the deployed graph (deployment/).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pqcad_qat.quantization.rounding import Grid, dequantized, inside, integers_of, learned_gradients, scale_and_zero_point

PER_ACTIVATION, PER_WEIGHT = 128, 1000
"""What the way to INT8 and back costs for each number read and written, in products that INT8 makes up for it with (measured on Zen 5)."""
CACHE_LINE = 64
_LARGEST_SUM = 2**31 - 1


class Geometry(NamedTuple):
    """Of a convolution without groups, padded with zeros: [h, w] each."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]


def applies(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution of x (B, I, H, W) with a weight (O, I, kh, kw), both of 8 bits at most, is computed in INT8.

    It is where a backward pass is recorded (what is sampled, exported and proven stays in floating point), in float32 on a CPU with VNNI,
    if it has products enough to be faster, and not so many in a sum that it might overflow.
    """
    positions = x.numel() / (x.shape[1] * geometry.stride[0] * geometry.stride[1])
    faster = weight.numel() * (positions - PER_WEIGHT) > PER_ACTIVATION * (x.numel() + weight.shape[0] * positions)
    exact = weight[0].numel() * 255 * 127 <= _LARGEST_SUM
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return faster and exact and plain and torch.is_grad_enabled() and multiplies_integers()


@cache
def multiplies_integers() -> bool:
    """Whether this CPU has VNNI and oneDNN uses it. Without, pairs of products saturate at 16 bits; ONEDNN_MAX_CPU_ISA can take it away."""
    found = torch.cpu.get_capabilities()
    if not (torch.backends.mkldnn.is_available() and (found.get("avx512_vnni") or found.get("avx_vnni"))):  # type: ignore[no-untyped-call]
        return False
    largest = torch.full((1, 16, 4, 4), 255, dtype=torch.uint8)
    product = _product(largest, 1.0, 0, torch.full((16, 16, 1, 1), 127.0), torch.ones(1), None, Geometry([1, 1], [0, 0], [1, 1]))
    return bool((product == 16 * 255 * 127).all())


def convolve(x: Tensor, grid: Grid, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """conv2d(quantize(x, *grid, straight=False), weight, bias), where `applies` says so: its values and gradients to rounding.

    x (B, I, H, W), quantized to 8 bits at most; weight (O, I, kh, kw), whole multiples up to 127 of weight_scale, which is broadcastable
    to it; -> (B, O, H', W') in x's layout. Sums of products are exact. Only x is kept for the backward pass, which is in floating point.
    """
    y: Tensor = _Convolution.apply(x, *grid, weight, weight_scale, bias, geometry)  # type: ignore[no-untyped-call]
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
        weight_scale: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        scale, zero_point = scale_and_zero_point(span, low, bounds)
        ctx.save_for_backward(x, span, low, scale, zero_point, weight)
        ctx.bounds, ctx.geometry = bounds, geometry
        integers = integers_of(x, scale, zero_point).clamp_(*bounds)
        zero = 0 if zero_point is None else int(zero_point)
        if bounds[0]:  # signed: counted from the smallest
            integers, zero = integers.sub_(bounds[0]), zero - bounds[0]
        y = _product(_bytes(integers), float(scale), zero, weight / weight_scale, weight_scale.reshape(-1), bias, geometry)
        return y if x.is_contiguous(memory_format=torch.channels_last) else _planar(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, span, low, scale, zero_point, weight = ctx.saved_tensors
        of_x, of_span, of_low, _, of_weight, _, of_bias, _ = ctx.needs_input_grad
        integers = integers_of(x, scale, zero_point)
        y = dequantized(integers.clamp(*ctx.bounds), scale, zero_point)
        wanted = (of_x or of_span or of_low, of_weight, of_bias)
        gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradients[0], y, weight, weight.shape[:1], *ctx.geometry, False, [0, 0], 1, wanted
        )
        found: tuple[Tensor | None, ...] = (None, None, None)
        if of_span or of_low:
            found = learned_gradients(gradient, x, y, integers, span, low, scale, zero_point, ctx.bounds)
        elif of_x:
            found = inside(gradient, integers, ctx.bounds), None, None
        return *found, None, weight_gradient, None, bias_gradient, None


def _bytes(integers: Tensor) -> Tensor:
    """Integers (B, I, H, W) as uint8 in their own layout, but with a gap after each plane.

    oneDNN wants channels last, and planes that lie a power of two apart share so few lines of the cache that reading across them is
    three times slower.
    """
    if integers.is_contiguous(memory_format=torch.channels_last):
        return integers.to(torch.uint8)
    _, planes, height, width = integers.shape
    apart = height * width + CACHE_LINE
    return integers.new_empty_strided(integers.shape, (planes * apart, apart, width, 1), dtype=torch.uint8).copy_(integers)


def _planar(y: Tensor) -> Tensor:
    """y (B, O, H, W), channels last, as planes: some rows at a time, which stay in a core's first cache."""
    planes = torch.empty_like(y, memory_format=torch.contiguous_format)
    rows = max(1, CACHE_LINE // y.shape[3])
    for there, here in zip(torch.split(planes, rows, 2), torch.split(y, rows, 2), strict=True):
        there.copy_(here)
    return planes


def _product(
    integers: Tensor, scale: float, zero: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """(B, O, H', W'), channels last, of uint8 integers (B, I, H, W) and a weight (O, I, kh, kw) in units of its scale, (O,) or (1,)."""
    eights = weight.round_().to(torch.int8)
    packed = torch.ops.onednn.qconv_prepack(eights, weight_scale, scale, zero, *geometry, 1, integers.shape)
    zeros, last = torch.zeros_like(weight_scale, dtype=torch.int64), integers.contiguous(memory_format=torch.channels_last)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(
        last, scale, zero, packed, weight_scale, zeros, bias, *geometry, 1, 1.0, 0, torch.float32, "none", [], ""
    )
    return y
