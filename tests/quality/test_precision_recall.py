"""Precision and recall against a double loop over their definition, and where one of the two is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pqcad_qat.quality import precision_recall
from pqcad_qat.quality.precision_recall import precision_and_recall

RNG = np.random.default_rng(0)


def covered(points: NDArray[np.float64], centres: NDArray[np.float64]) -> float:
    """Kynkaanniemi et al. 2019, equation 1, point by point."""
    radii = [sorted(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
    inside = [
        any(np.linalg.norm(point - centre) <= radius for centre, radius in zip(centres, radii, strict=True))
        for point in points
    ]
    return float(np.mean(inside))


@pytest.mark.parametrize("rows", [7, 1000])
def test_both_are_the_double_loop_over_all_pairs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_recall, "_ROWS", rows)
    a, b = RNG.normal(size=(40, 5)), RNG.normal(size=(40, 5)) * 1.5
    found = precision_and_recall(torch.from_numpy(a), torch.from_numpy(b))
    assert found == (covered(a, b), covered(b, a))
    assert 0 < found[1] < 1


def test_a_set_covers_itself() -> None:
    features = torch.from_numpy(RNG.normal(size=(30, 5)))
    assert precision_and_recall(features, features) == (1.0, 1.0)


def test_a_missing_half_lowers_recall_alone_and_an_alien_half_lowers_precision_alone() -> None:
    left, right = RNG.normal(size=(2, 300, 3)) + np.array([0.0, 50.0]).reshape(2, 1, 1)
    both, only_left = torch.from_numpy(np.concatenate([left, right])), torch.from_numpy(left)
    precision, recall = precision_and_recall(only_left, both)
    assert precision > 0.95
    assert recall == pytest.approx(0.5, abs=0.03)
    precision, recall = precision_and_recall(both, only_left)
    assert precision == pytest.approx(0.5, abs=0.03)
    assert recall > 0.95
