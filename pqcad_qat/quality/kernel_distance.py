"""Kernel distance between two sets of features: KID of Binkowski et al. 2018 (arXiv 1801.01401), with its error.

Unlike a Frechet distance it is unbiased, so that few images suffice. torchmetrics' KernelInceptionDistance averages
over random subsets that overlap, whose spread is no standard error of the mean; so the estimator is written here.

Not here: Frechet distances (fidelity.py), precision and recall (precision_recall.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = 1000
"""Factor with which kernel distances are reported, as is customary."""

SUBSETS = 10
"""Number of subsets that are left out in turn for the standard error."""


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance times SCALE, and its standard error, which is None where there are too few images for it."""

    value: float | None  # None where it was not measured
    error: float | None


def kernel_distance(a: Tensor, b: Tensor) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D) under the kernel (x.y / D + 1)^3.

    Its standard error is the jackknife's: both sets are cut into subsets of equal size, and the distance is computed
    again without the k-th subset of either, for each k. All of these need only the kernel's sums between subsets.
    Where both sets are of one distribution it comes out too large, by the square root of two. Both sets must hold at
    least two features, in random order.
    """
    count = max(1, min(SUBSETS, len(a) // 2, len(b) // 2))
    parts_a, parts_b = torch.tensor_split(a.double(), count), torch.tensor_split(b.double(), count)
    sums = _sums(parts_a, parts_a), _sums(parts_a, parts_b), _sums(parts_b, parts_b)
    sizes = torch.tensor([[len(part) for part in parts] for parts in (parts_a, parts_b)])
    value = SCALE * _discrepancy(sums, sizes, torch.ones(count, dtype=torch.bool))
    if count == 1:
        return KernelDistance(value, None)
    without = torch.tensor(
        [SCALE * _discrepancy(sums, sizes, torch.arange(count) != k) for k in range(count)], dtype=torch.float64
    )
    spread = (without - without.mean()).square().sum().item()
    return KernelDistance(value, math.sqrt((count - 1) / count * spread))


def _sums(xs: tuple[Tensor, ...], ys: tuple[Tensor, ...]) -> Tensor:
    """Sums (K, K) of the kernel between every subset of one set and every one of the other.

    A feature is not compared with itself where both sets are the same.
    """
    sums = torch.zeros(len(xs), len(ys), dtype=torch.float64)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            if xs is ys and j < i:
                sums[i, j] = sums[j, i]
                continue
            kernel = (x @ y.T / x.shape[1] + 1) ** 3
            sums[i, j] = kernel.sum() - (kernel.diagonal().sum() if xs is ys and i == j else 0)
    return sums


def _discrepancy(sums: tuple[Tensor, Tensor, Tensor], sizes: Tensor, chosen: Tensor) -> float:
    """The squared discrepancy of the chosen subsets of both sets."""
    n, m = (sizes * chosen).sum(dim=1).tolist()
    within_a, between, within_b = (table[chosen][:, chosen].sum().item() for table in sums)
    return float(within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m))
