"""Everything that determines an FID apart from the images themselves.

Not here: how an FID is computed (fidelity.py). This file does not import torch, so that reports can be read without it.
"""

from __future__ import annotations

from dataclasses import dataclass

MANY_IMAGES = 10_000
"""Customary number of images. With fewer, an FID is biased upwards by an amount that depends on their number."""


@dataclass(frozen=True)
class FidProtocol:
    """Everything that must be equal for two FIDs to be comparable."""

    images: int
    features: str  # name of the feature network
    features_sha256: str
    reference: str | None  # description of the real images behind the statistics
    sampler: str
    steps: int  # number of sampling steps of full precision
    seed: int

    @property
    def under_10000(self) -> bool:
        """Whether the FID can only be compared with FIDs of equally many images, because there are too few."""
        return self.images < MANY_IMAGES
