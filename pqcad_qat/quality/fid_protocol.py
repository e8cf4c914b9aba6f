"""Everything that determines a Frechet distance apart from the images themselves, and what it is called.

Not here: how it is computed (fidelity.py). This file does not import torch, so that reports can be read without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pqcad_qat.policy.evaluation import EFFICIENTNET_LITE0

MANY_IMAGES = 10_000
"""Customary number of images. With fewer, a Frechet distance is too large by an amount that depends on their number."""

ReferenceKind = Literal["real", "full-precision"]
"""Whether the images of a reference are real, or full precision's own of other seeds."""

FD, FID, FD_EFFNET_LITE0 = "FD", "FID", "FD-EffNetLite0"
"""Names of Frechet distances by their feature network; FD stands for one that this package trained."""

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the Inception weights through which alone a Frechet distance is called FID (inception.py)."""


@dataclass(frozen=True)
class Floor:
    """Distances between images of the reference's own kind: differences as small as these mean nothing.

    They are those of one half of a real reference to its other half, or of full precision's images to its other images.
    """

    images: tuple[int, int]  # numbers of images of both sets; of the first one at most those of a variant
    distance: float  # Frechet distance
    kid: float | None  # kernel distance times 1,000
    kid_error: float | None  # its standard error


@dataclass(frozen=True)
class FidProtocol:
    """Everything that must be equal for two distances to be comparable, and what they are without any difference."""

    images: int
    features: str  # name of the feature network
    features_sha256: str
    reference: str | None  # description of the images behind the statistics
    sampler: str
    steps: int  # number of sampling steps of full precision
    seed: int
    reference_kind: ReferenceKind = "real"
    floor: Floor | None = None  # None where only statistics of the reference are known

    @property
    def under_10000(self) -> bool:
        """Whether distances can only be compared for equally many images, because there are too few."""
        return self.images < MANY_IMAGES

    @property
    def distance(self) -> str:
        """Name of the Frechet distance, which is FID only through the standard Inception weights."""
        if self.features_sha256 == INCEPTION_SHA256:
            return FID
        return FD_EFFNET_LITE0 if self.features == EFFICIENTNET_LITE0 else FD

    @property
    def against(self) -> str:
        """Short word for what the images are compared with."""
        return "real" if self.reference_kind == "real" else "reference"

    @property
    def floor_text(self) -> str:
        """Sentences on the floor; empty where it is not known."""
        if (floor := self.floor) is None:
            return ""
        kid = "" if floor.kid is None else f" and a KID of {error_text(floor.kid, floor.kid_error)}"
        first, second = floor.images
        first_set, second_set = self.floor_sets
        return (
            f"Floor: {first:,} images {first_set} are at {self.distance} {floor.distance:.2f}{kid} from {second:,} "
            f"{second_set}. Smaller differences mean nothing."
        )

    @property
    def floor_sets(self) -> tuple[str, str]:
        """What the two sets of the floor are."""
        if self.reference_kind == "real":
            return "of one half of the reference", "of its other half"
        return "by full precision", "of the reference"


def error_text(value: float, error: float | None, digits: int = 1) -> str:
    """Text of a measure with its standard error, such as 95.2±3.1."""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f}±{error:.{digits}f}"
