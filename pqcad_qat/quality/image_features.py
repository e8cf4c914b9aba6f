"""Features of images through any feature network, and the sums from which a Frechet distance is computed.

Not here: the networks (feature_network.py, efficientnet_lite.py), distances (fidelity.py, kernel_distance.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pqcad_qat.data.images import to_float
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.accelerators import device_of, on_accelerator


class FeatureExtractor(Protocol):
    """A network that maps images to features."""

    @property
    def num_features(self) -> int:
        """Number D of features of an image."""

    @property
    def axes(self) -> tuple[str, str, str]:
        """Channels, height and width that the network reads, in words."""

    @property
    def batch_size(self) -> int:
        """Number of images at a time."""

    def reads(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the network reads images of this shape (C, H, W)."""

    def features(self, x: Tensor) -> Tensor:
        """Map images in [-1, 1] (N, C, H, W) to features (N, D)."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over features f (N, D), named like the states of torchmetrics' FrechetInceptionDistance."""

    features_sum: Tensor  # float64 (D,)       sum of f
    features_cov_sum: Tensor  # float64 (D, D) sum of f f^T, not centred
    num_samples: int


def image_features(network: FeatureExtractor, images: Tensor) -> Tensor:
    """Compute float32 features (N, D) of uint8 images (N, C, H, W).

    Raises:
        ModelError: the network does not read such images.
    """
    check_images(network, images)
    modules = (network,) if isinstance(network, nn.Module) else ()
    with torch.no_grad(), on_accelerator(*modules):
        place = next(map(device_of, modules), None) or images.device
        batches = (to_float(batch).to(place) for batch in torch.split(images, network.batch_size))
        return torch.cat([network.features(batch).to(images.device) for batch in batches])


def feature_statistics(features: Tensor, batch_size: int = 500) -> FeatureStatistics:
    """Compute the sums of features (N, D) in float64, by the same code for reference and generated images."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # here, since that takes two seconds

    metric = FrechetInceptionDistance(feature=ReadyFeatures(features.shape[1]), normalize=False)
    for batch in torch.split(features, batch_size):
        metric.update(batch.double(), real=True)
    return FeatureStatistics(
        metric.real_features_sum, metric.real_features_cov_sum, int(metric.real_features_num_samples)
    )


def image_statistics(network: FeatureExtractor, images: Tensor) -> FeatureStatistics:
    """Compute the sums of the features of uint8 images (N, C, H, W)."""
    return feature_statistics(image_features(network, images))


class ReadyFeatures(nn.Module):
    """Stand-in for torchmetrics' feature extractor, since the features are computed already.

    In float64, the sums and the result of torchmetrics are in double precision too.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_images(network: FeatureExtractor, images: Tensor) -> None:
    """Check that `images` are uint8 (N, C, H, W) with a size and channels that the network reads.

    Raises:
        ModelError: they are not.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not network.reads(tuple(images.shape[1:])):
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ModelError(
            f"images for this feature network: got {got}; allowed torch.uint8 (N, {', '.join(network.axes)})"
        )
