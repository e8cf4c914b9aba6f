"""Tests of gpu_fake_quantization.py and its kernels against the eager computation of fake_quantization.py on the CPU;
test_gpu_fake_quantization.py runs this file.

Without a GPU the kernels run under Triton's interpreter; TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pqcad_qat.quantization import gpu_fake_quantization
from pqcad_qat.quantization.fake_quantization import integer_range, quantize, scale_and_zero_point

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {
    "asymmetric": integer_range(8, False, False),
    "asymmetric-2": integer_range(2, False, False),
    "weights-4": integer_range(4, True, True),
    "weights-2": integer_range(2, True, True),
    "signed": integer_range(8, True, False),
}
SHAPES = [(2, 3, 5, 7), (3, 2, 32, 33), (5,)]
Quantizer = Callable[..., Tensor]
Found = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ranges(x: Tensor, per_row: bool, zero_point: bool) -> tuple[Tensor, Tensor | None]:
    """Ranges as training may produce them: some of either sign, and one of zero width."""
    span = values((x.shape[0], *(1 for _ in x.shape[1:])) if per_row else (), 1).add_(1.5)
    if per_row:
        span[0], span[-1] = -span[0], 0.0
    return span, span.abs() * 0.3 if zero_point else None


def passed(
    call: Quantizer, device: str, x: Tensor, span: Tensor, low: Tensor | None, bounds: tuple[int, int], *how: Any
) -> Found:
    """Output of a quantizer, and the gradients of x, span and low, None where there is none.

    `how` holds: whether the gradient is straight-through, whether the range is learned, and optionally the dtype.
    """
    straight, learns, dtype = (*how, torch.float32)[:3]
    leaves = [None if part is None else part.detach().to(device) for part in (x, span, low)]
    for part, needs in zip(leaves, (True, learns, learns), strict=True):
        if part is not None:
            part.requires_grad_(needs)
    x_there, span_there, low_there = leaves
    assert x_there is not None
    assert span_there is not None
    y = call(x_there, span_there, low_there, bounds, straight=straight, dtype=dtype)
    y.backward(values(tuple(y.shape), 2).to(device, dtype))
    gradients = [None if part is None or part.grad is None else part.grad.cpu() for part in leaves]
    return y.detach().cpu(), gradients[0], gradients[1], gradients[2]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_row", [False, True], ids=["per-tensor", "per-row"])
@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("straight", [False, True], ids=["clamped", "straight"])
def test_values_and_gradients_are_the_eager_ones(
    bounds: tuple[int, int], shape: tuple[int, ...], per_row: bool, learns: bool, straight: bool
) -> None:
    x = values(shape)
    span, low = ranges(x, per_row, zero_point=bounds[0] == 0)
    assert gpu_fake_quantization.applies(x.to(DEVICE), span.to(DEVICE), None if low is None else low.to(DEVICE))
    expected = passed(quantize, "cpu", x, span, low, bounds, straight, learns)
    found = passed(gpu_fake_quantization.quantize, DEVICE, x, span, low, bounds, straight, learns)
    assert same_bits(found[0], expected[0])
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    if found[1] is not None and expected[1] is not None:
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_halves_ends_and_what_lies_far_outside_fall_as_in_the_eager_computation(bounds: tuple[int, int]) -> None:
    levels = -bounds[0] or bounds[1]
    ties = torch.arange(2 * bounds[0] - 3, 2 * bounds[1] + 4) / 2
    edges = [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
    x = torch.cat([ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), torch.tensor(edges)])
    span, low = torch.tensor(float(levels)), torch.tensor(levels / 4) if bounds[0] == 0 else None
    y = gpu_fake_quantization.quantize(
        x.to(DEVICE),
        span.to(DEVICE),
        None if low is None else low.to(DEVICE),
        bounds,
        straight=False,
        dtype=torch.float32,
    ).cpu()
    torch.testing.assert_close(y, quantize(x, span, low, bounds, straight=False), rtol=0, atol=0, equal_nan=True)
    expected = passed(quantize, "cpu", x[:-1], span, low, bounds, False, False)[1]
    assert expected is not None
    found = passed(gpu_fake_quantization.quantize, DEVICE, x[:-1], span, low, bounds, False, False)[1]
    assert found is not None
    assert torch.equal(found, expected)


def test_the_scale_is_divided_as_ieee_754_has_it() -> None:
    """Multiplying by a reciprocal would change the last bit for some spans."""
    x, span = torch.ones(97, 1), values((97, 1), 3).abs_()
    y = gpu_fake_quantization.quantize(
        x.to(DEVICE), span.to(DEVICE), None, (-127, 127), straight=True, dtype=torch.float32
    ).cpu()
    assert same_bits(y, quantize(x, span, None, (-127, 127), straight=True))
    on_device = scale_and_zero_point(span.to(DEVICE), None, (-127, 127))[0].cpu()
    assert same_bits(on_device, scale_and_zero_point(span, None, (-127, 127))[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
    "with gaps": lambda x: x[:, :, ::2],
    "repeated": lambda x: x[:, :1].expand(-1, 6, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_row", [False, True], ids=["per-tensor", "per-row"])
def test_any_layout_is_taken_and_a_layout_without_gaps_is_kept(layout: str, per_row: bool) -> None:
    x = LAYOUTS[layout](values((4, 3, 6, 5)))
    span, low = ranges(x, per_row, zero_point=True)
    expected = passed(quantize, "cpu", x, span, low, (0, 255), False, True)
    found = passed(gpu_fake_quantization.quantize, DEVICE, x, span, low, (0, 255), False, True)
    assert torch.equal(found[0], expected[0])
    assert found[1] is not None
    assert expected[1] is not None
    assert torch.equal(found[1], expected[1])
    for mine, theirs in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    if layout == "channels last":
        assert found[0].stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_quantized_in_float32_and_kept_as_it_came(dtype: torch.dtype) -> None:
    x = values((3, 50)).to(dtype)
    span, low = torch.tensor(3.0), torch.tensor(1.0)
    expected = passed(quantize, "cpu", x, span, low, (0, 255), False, True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = passed(gpu_fake_quantization.quantize, DEVICE, x, span, low, (0, 255), False, True)
    assert found[0].dtype == torch.float32
    assert same_bits(found[0], expected[0])
    assert found[1] is not None
    assert expected[1] is not None
    assert found[1].dtype == dtype
    rounding = 0.0 if DEVICE == "cuda" else 2**-7  # the interpreter truncates to bfloat16 instead of rounding
    torch.testing.assert_close(found[1], expected[1], rtol=rounding, atol=0.0)
    assert [tensor.dtype for tensor in kept if tensor.numel() > 1] == [dtype]


@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
def test_values_are_rounded_to_what_autocast_asks_for(learns: bool) -> None:
    x, span, low = values((3, 50)), torch.tensor(3.0), torch.tensor(1.0)
    expected = passed(quantize, "cpu", x, span, low, (0, 255), False, learns, torch.bfloat16)
    found = passed(gpu_fake_quantization.quantize, DEVICE, x, span, low, (0, 255), False, learns, torch.bfloat16)
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    rounding = 0.0 if DEVICE == "cuda" else 2**-7
    torch.testing.assert_close(found[0], expected[0], rtol=rounding, atol=0.0)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_sums_of_many_programs_are_right_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_fake_quantization, "PROGRAMS", 4)
    x, span, low = values((11, 1000)), torch.tensor(1.3), torch.tensor(0.4)
    expected = passed(quantize, "cpu", x, span, low, (0, 15), False, True)
    runs = [passed(gpu_fake_quantization.quantize, DEVICE, x, span, low, (0, 15), False, True) for _ in range(2)]
    for mine, again, theirs in zip(runs[0][2:], runs[1][2:], expected[2:], strict=True):
        assert mine is not None
        assert again is not None
        assert same_bits(mine, again)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("straight", [False, True], ids=["clamped", "straight"])
def test_what_activation_checkpointing_computes_again_has_the_same_gradients(straight: bool) -> None:
    def recomputed(*arguments: Any, **how: Any) -> Tensor:
        y: Tensor = checkpoint(gpu_fake_quantization.quantize, *arguments, use_reentrant=False, **how)
        return y

    x, span, low = values((4, 9)), torch.tensor(1.3), torch.tensor(0.4)
    for learns in (True, False):
        ways = [
            passed(call, DEVICE, x, span, low, (0, 15), straight, learns)
            for call in (gpu_fake_quantization.quantize, recomputed)
        ]
        for mine, theirs in zip(*ways, strict=True):
            assert mine is theirs is None or (mine is not None and theirs is not None and same_bits(mine, theirs))


@pytest.mark.parametrize(
    ("x", "span"),
    [
        (torch.ones(2, 3), torch.ones(1, 3)),
        (torch.ones(2, 3), torch.ones(2)),
        (torch.ones(3), torch.ones(1, 1)),
        (torch.ones(0, 3), torch.ones(())),
        (torch.ones(2, 3, dtype=torch.float64), torch.ones(())),
        (torch.ones(2, 3), torch.ones((), dtype=torch.float64)),
    ],
    ids=["by column", "unlike axes", "more axes than x", "empty", "float64", "float64 range"],
)
def test_what_the_kernels_do_not_know_is_left_to_the_eager_computation(x: Tensor, span: Tensor) -> None:
    assert not gpu_fake_quantization.applies(x.to(DEVICE), span.to(DEVICE), None)
