"""Range estimates against exhaustive search and known distributions."""

from __future__ import annotations

import pytest
import torch

from pqcad_qat.errors import ModelError
from pqcad_qat.quantization.ranges import InputRange, input_bounds, input_grid, weight_ratio


def watched(*batches: torch.Tensor) -> InputRange:
    seen = InputRange("layer")
    for batch in batches:
        seen.watch_extremes(batch)
    for batch in batches:
        seen.watch_histogram(batch)
    return seen


def test_extremes_over_batches() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    values[0] = 1000.0
    seen = watched(*values.chunk(4))
    assert (seen.low, seen.high) == (float(values.min()), 1000.0)


@pytest.mark.parametrize(("signed", "symmetric"), [(True, True), (False, False)])
def test_mse_range_is_within_a_step_of_the_best_of_a_dense_search(signed: bool, symmetric: bool) -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).exp() - 0.5

    def error(ratio: float) -> float:
        scale, zero, low, high = input_grid(seen.low * ratio, seen.high * ratio, 4, signed, symmetric=symmetric)
        return float(((((values / scale).round() + zero).clamp(low, high) - zero) * scale - values).square().mean())

    seen = watched(values)
    low, high = input_bounds(seen, "mse", 4, signed, symmetric=symmetric)
    best = min(error(i / 500) for i in range(25, 501))
    assert error(high / seen.high) < 1.02 * best
    assert error(high / seen.high) < error(1.0)
    assert low / seen.low == pytest.approx(high / seen.high)


def test_zero_is_always_inside() -> None:
    seen = watched(torch.linspace(2.0, 5.0, 100))
    assert input_bounds(seen, "min_max", 8, signed=False, symmetric=False) == (0.0, 5.0)


def test_weight_ratio_of_an_exact_grid_is_one() -> None:
    rows = torch.arange(-7, 8, dtype=torch.float32)[None] * torch.tensor([[0.1], [3.0]])
    assert weight_ratio(rows, 4, symmetric=True, method="mse").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "input of layer layer: got NaN"),
        (torch.tensor([1.0, float("inf")]), "NaN or infinite"),
        (torch.zeros(4), "input of layer layer: got zeros everywhere"),
        (None, "input of layer layer: got no values"),
    ],
)
def test_useless_data_names_the_layer(batch: torch.Tensor | None, message: str) -> None:
    def calibrate() -> None:
        seen = InputRange("layer")
        if batch is not None:
            seen.watch_extremes(batch)
        seen.check()

    with pytest.raises(ModelError, match=message):
        calibrate()
