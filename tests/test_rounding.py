"""The fused quantizer against closed forms and torch's own fake quantization."""

from __future__ import annotations

import pytest
import torch

from pqcad_qat.quantization.rounding import integer_range, quantize


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
    reference = torch.fake_quantize_per_channel_affine(weight, (span / high).flatten(), torch.zeros(16, dtype=torch.int32), 0, low, high)
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
