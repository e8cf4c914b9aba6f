"""Convolutions of training in INT8: on a CPU with VNNI, oneDNN multiplies the integers that quantized layers compute with.

Not here: what the quantizers are (rounding.py, injectors.py), and the deployed graph, whose integers OpenVINO multiplies (deployment/).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pqcad_qat.quantization.rounding import dequantized, inside, integers_of, learned_gradients, scale_and_zero_point

Grid = tuple[Tensor, Tensor | None, tuple[int, int]]
"""What `rounding.quantize` needs: span, low, and the smallest and largest integer."""

LARGEST_SUM = 2**31 - 1
CACHE_LINE = 64
ENOUGH = 256
"""Products for each number of the input from which on INT8 gains more than the way to it and back costs (measured: Zen 5)."""


class Geometry(NamedTuple):
    """Of a convolution without groups, padded with zeros: (h, w) each."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]


def pays(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is large enough to be faster in INT8, and small enough that its sums of products stay exact.

    weight: (O, I, kh, kw).
    """
    outputs, inputs, height, width = weight.shape
    strides = geometry.stride[0] * geometry.stride[1]
    return outputs * height * width >= ENOUGH * strides and inputs * height * width * 255 * 127 <= LARGEST_SUM


def recorded_in_float32_on_vnni(x: Tensor) -> bool:
    """Whether x is what these convolutions take: float32 activations on a CPU that multiplies integers, in a pass that has a backward."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and torch.is_grad_enabled() and multiplies_integers()


def convolve(x: Tensor, grid: Grid, weight: Tensor, weight_grid: Grid, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """conv2d(quantize(x, *grid), weight, bias): the same values and gradients to rounding, and a fourth of the memory for quantized x.

    x (B, I, H, W); weight (O, I, kh, kw), on the points of weight_grid, which is symmetric; -> (B, O, H', W'), in x's layout.
    Integers of x have 8 bits at most, as those of the weight. Sums of products are exact; the backward pass is in floating point.
    """
    y: Tensor = _Convolution.apply(x, *grid, weight, weight_grid, bias, geometry)  # type: ignore[no-untyped-call]
    return y


@cache
def multiplies_integers() -> bool:
    """Whether this CPU has VNNI, and oneDNN uses it: without, pairs of products saturate at 16 bits (or ONEDNN_MAX_CPU_ISA caps it)."""
    found = torch.cpu.get_capabilities()
    if not (torch.backends.mkldnn.is_available() and (found.get("avx512_vnni") or found.get("avx_vnni"))):
        return False
    largest = torch.full((1, 16, 4, 4), 255, dtype=torch.uint8), torch.full((16, 16, 1, 1), 127.0)
    product = _product(largest[0], 1.0, 0, largest[1], torch.ones(1), None, Geometry([1, 1], [0, 0], [1, 1]))
    return bool((product == 16 * 255 * 127).all())


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        span: Tensor,
        low: Tensor | None,
        bounds: tuple[int, int],
        weight: Tensor,
        weight_grid: Grid,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        scale, zero_point = scale_and_zero_point(span, low, bounds)
        integers = integers_of(x, scale, zero_point).clamp_(*bounds)
        zero = 0 if zero_point is None else int(zero_point)
        if bounds[0]:  # signed: counted from the smallest
            integers, zero = integers.sub_(bounds[0]), zero - bounds[0]
        integers = _bytes(integers)
        weight_scale = scale_and_zero_point(*weight_grid)[0]
        y = _product(integers, float(scale), zero, weight / weight_scale, weight_scale.reshape(-1), bias, geometry)
        ctx.save_for_backward(x, span, low, scale, zero_point, weight)
        ctx.bounds, ctx.geometry = bounds, geometry
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, span, low, scale, zero_point, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        integers = integers_of(x, scale, zero_point)
        y = dequantized(integers.clamp(*ctx.bounds), scale, zero_point)
        gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradients[0], y, weight, weight.shape[:1], *ctx.geometry, False, [0, 0], 1, (wanted[0] or wanted[1], wanted[4], wanted[6])
        )
        found: tuple[Tensor | None, ...] = (None, None, None)
        if wanted[1] or wanted[2]:
            found = learned_gradients(gradient, x, y, integers, span, low, scale, zero_point, ctx.bounds)
        elif wanted[0]:
            found = inside(gradient, integers, ctx.bounds), None, None
        return *found, None, weight_gradient, None, bias_gradient, None


def _bytes(integers: Tensor) -> Tensor:
    """Integers (B, I, H, W) as uint8, in their own layout or with a gap after each plane: planes a power of two apart share few cache lines."""
    if integers.is_contiguous(memory_format=torch.channels_last):
        return integers.to(torch.uint8)
    planes, height, width = integers.shape[1:]
    apart = height * width + CACHE_LINE
    return integers.new_empty_strided(integers.shape, (planes * apart, apart, width, 1), dtype=torch.uint8).copy_(integers)


def _product(
    integers: Tensor,
    scale: float,
    zero: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """(B, O, H', W') in channels_last, of uint8 integers (B, I, H, W) and a weight (O, I, kh, kw) in units of its scale (O,) or (1,)."""
    packed = torch.ops.onednn.qconv_prepack(
        weight.round().to(torch.int8), weight_scale, scale, zero, *geometry, 1, integers.shape
    )
    zeros = torch.zeros_like(weight_scale, dtype=torch.int64)
    planes = integers.contiguous(memory_format=torch.channels_last)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(
        planes, scale, zero, packed, weight_scale, zeros, bias, *geometry, 1, 1.0, 0, torch.float32, "none", [], ""
    )
    return y
