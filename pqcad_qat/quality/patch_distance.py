"""Distance between the patches of two sets of images: the sliced Wasserstein distance of Karras et al. 2018
(arXiv 1710.10196), which needs no feature network.

Not here: distances between features (fidelity.py, kernel_distance.py), and paired figures (fidelity.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

PATCH = 7
"""Height and width of a patch in pixels."""

PATCHES = 128
"""Largest number of patches of an image at each level."""

DIRECTIONS = 256
"""Number of random directions onto which patches are projected."""


def patch_distance(images: Tensor, references: Tensor) -> float:
    """Sliced Wasserstein distance between patches of images and of as many references (N, C, H, W); 0 for equal sets.

    Both sets become Laplacian pyramids. At each level patches are taken at random places, the same ones of all images,
    and scaled by the mean and standard deviation of each channel of the references. Unlike Karras et al., who scale
    each set by its own, this sees colours that have become dull. The patches are projected onto random directions; the
    mean difference of the sorted projections is averaged over directions and levels. An image has many patches, so
    that sixteen images suffice.
    """
    assert images.shape == references.shape, f"{tuple(images.shape)} and {tuple(references.shape)}"
    dice = torch.Generator().manual_seed(0)
    levels = []
    for own, wanted in zip(_pyramid(images), _pyramid(references), strict=True):
        places = torch.randperm(_places(wanted), generator=dice)[:PATCHES]
        patches, others = _patches(own, places), _patches(wanted, places)  # (P, C, K)
        mean, spread = others.mean(dim=(0, 2), keepdim=True), others.std(dim=(0, 2), keepdim=True).clamp(min=1e-8)
        directions = torch.randn(others[0].numel(), DIRECTIONS, generator=dice)
        directions /= directions.norm(dim=0)
        sides = [((side - mean) / spread).flatten(1) @ directions for side in (patches, others)]
        levels.append((sides[0].sort(dim=0).values - sides[1].sort(dim=0).values).abs().mean())
    return float(torch.stack(levels).mean())


def _pyramid(images: Tensor) -> Iterator[Tensor]:
    """Levels of the Laplacian pyramid of images (N, C, H, W), and at the end what is left, blurred."""
    left = images.float().cpu()
    while min(left.shape[2:]) >= 2 * PATCH:
        height, width = left.shape[2:]
        smaller = functional.interpolate(left, size=(height // 2, width // 2), mode="area")
        yield left - functional.interpolate(smaller, size=(height, width), mode="bilinear")
        left = smaller
    yield left


def _side(images: Tensor) -> int:
    """Height and width of patches: smaller for images that are."""
    height, width = images.shape[2:]
    return min(PATCH, height, width)


def _places(images: Tensor) -> int:
    """Number of places in an image where a patch can lie."""
    height, width = images.shape[2:]
    return (height - _side(images) + 1) * (width - _side(images) + 1)


def _patches(images: Tensor, places: Tensor) -> Tensor:
    """Patches (N * places, C, K) at these places of images (N, C, H, W), K numbers a channel."""
    columns = functional.unfold(images, _side(images))[:, :, places]  # (N, C * K, places)
    return columns.transpose(1, 2).reshape(-1, images.shape[1], columns.shape[1] // images.shape[1])
