"""All that decides an FID number beside the images themselves.

Not here: how an FID is computed (fidelity.py). Without torch, which a report is read without.
"""

from __future__ import annotations

from dataclasses import dataclass

MANY_IMAGES = 10_000
"""The customary number of images: with fewer, an FID is biased upwards by an amount that depends on their number."""


@dataclass(frozen=True)
class FidProtocol:
    """Everything that has to be equal before two FIDs may be compared."""

    images: int
    features: str  # name of the feature network
    features_sha256: str
    reference: str | None  # what the real statistics are of
    sampler: str
    steps: int  # of the full-precision sampler
    seed: int

    @property
    def under_10000(self) -> bool:
        """Whether the images are too few for the FID to compare with any but those of as many."""
        return self.images < MANY_IMAGES
