"""Improved precision and recall of generated images (Kynkaanniemi et al. 2019, arXiv 1904.06991), from their features.

Not here: distances between distributions (fidelity.py, kernel_distance.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
"""The k of the paper: a feature's ball reaches to its k-th nearest neighbour in its own set."""

_ROWS = 1000


def precision_and_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of generated features (N, D) in the reference's balls, and of the reference's in the generated ones' balls.

    Precision falls where images look unlike those of the reference, recall where some kinds of them are missing. Both
    depend on the numbers of images, so both sets should have equally many: more than NEIGHBOURS.
    """
    a, b = generated.double(), reference.double()
    return _covered(a, b), _covered(b, a)


def _covered(points: Tensor, centres: Tensor) -> float:
    """Share of points (N, D) that lie in the ball of at least one centre (M, D)."""
    # the nearest feature in its own set is the feature itself
    radii = torch.cat(
        [torch.cdist(rows, centres).kthvalue(NEIGHBOURS + 1).values for rows in torch.split(centres, _ROWS)]
    )
    inside = torch.cat([(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in torch.split(points, _ROWS)])
    return inside.double().mean().item()
