"""Where a quantizer starts to clamp, against PyTorch's own arithmetic on the numbers next to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pqcad_qat.quantization.clamp_edges import clamp_edges
from pqcad_qat.quantization.fake_quantization import integers_of

BOUNDS = [(0, 255), (-128, 127), (-127, 127), (0, 15), (-8, 7), (-7, 7), (0, 3), (-1, 1)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_edges_are_the_last_numbers_that_are_clamped(bounds: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    zero_points = [0.0, *bounds, *random.integers(bounds[0], bounds[1] + 1, 197)]
    for scale, zero_point in zip(
        np.float32(10 ** random.uniform(-8, 6, len(zero_points))).tolist(), zero_points, strict=True
    ):
        below, above = np.float32(clamp_edges(scale, float(zero_point), bounds))
        next_to = [below, np.nextafter(below, np.float32(np.inf)), np.nextafter(above, np.float32(-np.inf)), above]
        integers = integers_of(
            torch.tensor(np.array(next_to)), torch.tensor(scale), torch.tensor(float(zero_point))
        ).tolist()
        assert integers[0] < bounds[0] <= integers[1], (scale, zero_point)
        assert integers[2] <= bounds[1] < integers[3], (scale, zero_point)


@pytest.mark.parametrize(("scale", "zero_point"), [(math.nan, 0.0), (math.inf, 0.0), (3e38, 0.0), (0.1, math.nan)])
def test_a_grid_beyond_all_numbers_clamps_none(scale: float, zero_point: float) -> None:
    assert clamp_edges(scale, zero_point, (0, 255)) == (-math.inf, math.inf)
