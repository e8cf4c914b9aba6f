"""The kernel distance against a double loop over its definition, and its error against repeated draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pqcad_qat.quality.kernel_distance import kernel_distance

RNG = np.random.default_rng(0)


def by_definition(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Binkowski et al. 2018, equation 4, pair by pair."""
    n, m, dimensions = len(a), len(b), a.shape[1]

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return float((x @ y / dimensions + 1) ** 3)

    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(x, y) for x in a for y in b) / (n * m)
    return 1000 * (within_a + within_b - 2 * between)


def drawn(count: int, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=(count, 8)) + shift)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (23, 23), (31, 40), (4, 57)])
def test_the_distance_is_the_double_loop_over_all_pairs(n: int, m: int) -> None:
    a, b = drawn(n), drawn(m, 0.5)
    assert kernel_distance(a, b).value == pytest.approx(by_definition(a.numpy(), b.numpy()), rel=1e-9, abs=1e-9)


def test_the_error_is_that_of_the_distance_without_each_tenth_in_turn() -> None:
    a, b = drawn(40), drawn(50, 0.3)
    without = [
        by_definition(np.delete(a, slice(4 * k, 4 * k + 4), axis=0), np.delete(b, slice(5 * k, 5 * k + 5), axis=0))
        for k in range(10)
    ]
    expected = np.sqrt(9 / 10 * ((without - np.mean(without)) ** 2).sum())
    assert kernel_distance(a, b).error == pytest.approx(expected, rel=1e-9)


def test_the_error_tells_how_far_the_distance_of_other_draws_lies() -> None:
    found = [kernel_distance(drawn(200), drawn(200, 0.5)) for _ in range(60)]
    spread = np.std([each.value for each in found if each.value is not None])
    assert np.mean([each.error for each in found if each.error is not None]) == pytest.approx(spread, rel=0.35)


def test_two_draws_of_one_distribution_are_at_no_distance_whatever_their_number() -> None:
    found = [kernel_distance(drawn(20), drawn(20)).value or 0.0 for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_too_few_features_have_a_distance_without_an_error() -> None:
    assert kernel_distance(drawn(3), drawn(50)).error is None
