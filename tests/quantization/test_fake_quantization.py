"""The fused quantizer against closed forms and torch's own fake quantization."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pqcad_qat.quantization.fake_quantization import integer_range, quantize, scale_and_zero_point, unclamped


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "expected"),
    [(8, True, True, (-127, 127)), (8, True, False, (-128, 127)), (4, False, False, (0, 15)), (2, True, True, (-1, 1))],
)
def test_integer_ranges(bits: int, signed: bool, narrow: bool, expected: tuple[int, int]) -> None:
    assert integer_range(bits, signed, narrow) == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_per_channel_values_equal_torch_fake_quantize(bits: int) -> None:
    weight = torch.randn(16, 9, 3, 3, generator=torch.Generator().manual_seed(bits))
    span = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
    low, high = integer_range(bits, signed=True, narrow=True)
    reference = torch.fake_quantize_per_channel_affine(
        weight, (span / high).flatten(), torch.zeros(16, dtype=torch.int32), 0, low, high
    )
    assert torch.equal(quantize(weight, span, None, (low, high), straight=True), reference)


def test_asymmetric_values_equal_torch_fake_quantize_and_keep_zero() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).clamp(-1.0, 3.0)
    y = quantize(x, torch.tensor(4.0), torch.tensor(1.0), (0, 255), straight=False)
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, 4.0 / 255, 64, 0, 255))
    assert quantize(torch.zeros(3), torch.tensor(4.0), torch.tensor(1.013), (0, 255), straight=False).eq(0).all()


def test_gradient_of_the_input_is_one_inside_and_zero_where_clamped() -> None:
    x = torch.tensor([-3.0, -1.02, -0.3, 0.0, 0.7, 1.04, 5.0], requires_grad=True)  # the grid: -4..3 in steps of 1/4
    quantize(x, torch.tensor(1.0), None, integer_range(3, True, False), straight=False).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]  # 1.04 rounds to the missing level 4


def test_gradient_of_a_learned_span_is_that_of_lsq() -> None:
    """Esser et al. 2020, equation 3, for the scale; the span is the scale times the levels."""
    x = torch.linspace(-2.0, 2.0, 41)
    span = torch.tensor(1.3, requires_grad=True)
    quantize(x, span, None, (-7, 7), straight=False).sum().backward()
    v = x / (1.3 / 7)
    lsq = torch.where(v <= -7, -7.0, torch.where(v >= 7, 7.0, v.round() - v))
    assert span.grad is not None
    torch.testing.assert_close(span.grad, lsq.sum() / 7, rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_are_quantized_in_float32() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = quantize(x, torch.tensor(4.0), torch.tensor(2.0), (0, 255), straight=False)
    assert y.dtype == torch.float32
    assert torch.equal(y, quantize(x.detach().float(), torch.tensor(4.0), torch.tensor(2.0), (0, 255), straight=False))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_rows_of_one_number_have_the_gradients_of_longer_rows() -> None:
    x, span, low = (torch.randn(7, 1, generator=torch.Generator().manual_seed(seed)).abs() for seed in range(3))
    found = []
    for repeats in (1, 2):
        parts = [part.clone().requires_grad_() for part in (x.repeat(1, repeats), span, low / 3)]
        quantize(parts[0], parts[1], parts[2], (0, 3), straight=False).sum().backward()
        found.append([part.grad for part in parts[1:]])
    for one, two in zip(*found, strict=True):
        assert one is not None
        torch.testing.assert_close(2 * one, two)


@pytest.mark.parametrize(("span", "low"), [(1.7, 0.31), (0.9, 0.9), (2.55, 0.0)])
def test_a_number_next_to_the_edge_has_a_gradient_where_its_integer_is_on_the_grid(span: float, low: float) -> None:
    ranges = torch.tensor(span), torch.tensor(low)
    scale, zero_point = scale_and_zero_point(*ranges, (0, 255))
    middles = (torch.tensor([-0.5, 255.5]) - zero_point) * scale
    x = (
        (middles.view(torch.int32)[:, None] + torch.arange(-400, 401, dtype=torch.int32))
        .view(torch.float32)
        .requires_grad_()
    )
    integers, _ = unclamped(x.detach(), *ranges, (0, 255))
    quantize(x, ranges[0].requires_grad_(), ranges[1].requires_grad_(), (0, 255), straight=False).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, ((integers >= 0) & (integers <= 255)).float())
    assert x.grad.amin(dim=1).tolist() == [0.0, 0.0]
    assert x.grad.amax(dim=1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bounds", [(0, 255), (-8, 7)])
def test_a_range_for_a_tensor_has_the_gradients_of_a_range_for_its_row(bounds: tuple[int, int]) -> None:
    x = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1))
    found = []
    for shape in ((), (1, 1)):
        span, low = torch.full(shape, -1.9, requires_grad=True), torch.full(shape, 0.7, requires_grad=True)
        leaf = x.clone().requires_grad_()
        (quantize(leaf, span, low if bounds[0] == 0 else None, bounds, straight=False) * weights).sum().backward()
        found.append([leaf.grad, *(None if part.grad is None else part.grad.reshape(()) for part in (span, low))])
    for one, two in zip(*found, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)


def test_gradients_of_a_range_are_sums_of_small_numbers_and_not_differences_of_large_sums() -> None:
    random = torch.Generator().manual_seed(0)
    x, gradient = torch.rand(200_000, generator=random), 0.5 + torch.rand(200_000, generator=random)
    x[:10] = 1.6  # clamped
    span, low = torch.tensor(1.5, requires_grad=True), torch.tensor(0.25, requires_grad=True)
    quantize(x, span, low, (0, 255), straight=False).backward(gradient)
    scale, _ = scale_and_zero_point(span.detach(), low.detach(), (0, 255))
    y, ratio = quantize(x, span.detach(), low.detach(), (0, 255), straight=False).double(), low.item() / scale
    clamped = gradient[:10].double().sum()
    of_scale = ((y - torch.where(x < 1.6, x.double(), 0.0)) * gradient).sum() / scale + clamped * ratio
    assert span.grad is not None
    assert low.grad is not None
    torch.testing.assert_close(low.grad.double(), -clamped, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(span.grad.double(), of_scale / 255, rtol=1e-5, atol=0.0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "its own": lambda gradient: gradient,
    "turned": lambda gradient: gradient.t().contiguous().t(),
    "one number": lambda gradient: gradient[0, 0].expand(gradient.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_lower_end_has_no_gradient_at_all_where_nothing_is_clamped(layout: str) -> None:
    """An optimizer that divides gradients by their own size makes full steps of the least rounding."""
    random = torch.Generator().manual_seed(0)
    x, gradient = torch.rand(700, 50, generator=random).requires_grad_(), torch.randn(700, 50, generator=random)
    span, low = torch.tensor(1.5, requires_grad=True), torch.tensor(0.25, requires_grad=True)
    quantize(x, span, low, (0, 255), straight=False).backward(LAYOUTS[layout](gradient))
    assert low.grad is not None
    assert low.grad == 0
