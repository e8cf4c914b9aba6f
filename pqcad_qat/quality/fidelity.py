"""Figures of image quality: distances to a reference and to full precision, and paired PSNR and SSIM.

torchmetrics is imported where it is used, since that takes two seconds and every command imports this file.

Not here: where images come from (data/), feature networks (feature_network.py), the estimators of KID, precision and
recall (kernel_distance.py, precision_recall.py), speed and size (timing/latency.py).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.quality.feature_network import Features
from pqcad_qat.quality.fid_protocol import MANY_IMAGES, FidProtocol, Floor
from pqcad_qat.quality.image_features import FeatureStatistics, ReadyFeatures, feature_statistics, image_features
from pqcad_qat.quality.kernel_distance import KernelDistance, kernel_distance
from pqcad_qat.quality.precision_recall import NEIGHBOURS, precision_and_recall

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # size and standard deviation in pixels of the Gaussian window of Wang et al. 2004
LARGEST_PSNR = 100.0
"""Largest PSNR in dB of one image in a mean; equal images have an infinite one."""

_BATCH = 256


@dataclass(frozen=True)
class FidelityFigures:
    """Figures of one variant's images against real data, and against full precision on the same seeds.

    Every field is valid in strict JSON. `psnr_fp` is pooled over all pixels of all images (one mean squared error), in
    dB. It is None if there is nothing to compare with, or if the images are identical and PSNR is infinite: then
    `identical_to_fp` is true and `ssim_fp` is 1. `ssim_fp` is also None for images smaller than its window. The fields
    from `kid_real` on are None where the features of the reference's single images are not known.
    """

    images: int
    fid_real: float | None
    fid_fp: float | None
    psnr_fp: float | None
    ssim_fp: float | None
    identical_to_fp: bool
    # whether there are at most as many images as features, so that their covariance lacks full rank
    rank_deficient: bool
    kid_real: float | None = None  # kernel distance to the reference, times 1,000; for few images only
    kid_real_error: float | None = None  # its standard error
    precision: float | None = None  # of Kynkaanniemi et al. 2019, from 0 to 1
    recall: float | None = None
    clip_score: float | None = None  # of images and their prompts, from 0 to 100; not computed in this file
    clip_score_error: float | None = None  # its standard error


def fid_protocol(features: Features, images: int, sampler: str, steps: int, *, seed: int) -> FidProtocol:
    """Protocol of the Frechet distance of `images` generated images with the feature network `features`.

    Its floor is that of a reference of real images. Where full precision's own images are the reference, its images of
    evaluation.seed are at the floor.
    """
    known = features.reference_features if features.reference_kind == "real" else None
    return FidProtocol(
        images,
        features.source,
        features.sha256,
        features.reference_name,
        sampler,
        steps,
        seed,
        features.reference_kind,
        None if known is None else floor(known, images),
    )


def floor(reference: Tensor, images: int) -> Floor:
    """Distances of features of a reference (N, D), in random order, to one another: first half to second half.

    Only as many of the first half are taken as a variant has images, because distances depend on their number.
    """
    half = len(reference) // 2
    first, second = reference[: min(half, images)], reference[half:]
    kernel = _kernel_distance(first, second)
    distance = frechet_distance(feature_statistics(first), feature_statistics(second))
    return Floor((len(first), len(second)), distance, kernel.value, kernel.error)


def own_floor(full: FidelityFigures) -> Floor | None:
    """Distances of full precision's images to a reference that holds as many of its other images."""
    if full.fid_real is None:
        return None
    return Floor((full.images, full.images), full.fid_real, full.kid_real, full.kid_real_error)


def evaluate_images(
    images: Tensor, fp_images: Tensor | None, features: Features | None, fp_features: Tensor | None = None
) -> FidelityFigures:
    """Compute the figures of uint8 images (N, C, H, W).

    `fp_images` are the full-precision model's images of the same seeds, in the same order. Without `features` there are
    no distances, and without their reference no `fid_real`. Images smaller than SSIM's window have no SSIM.
    `fp_features` are the features of `fp_images`, for a caller that has them.

    Raises:
        ModelError: there are fewer than two images, the feature network does not accept them, or the sets do not pair.
    """
    if fp_images is not None:
        _check_pair(images, fp_images)
    distances = _Distances() if features is None else _distances(images, fp_images, features, fp_features)
    return FidelityFigures(
        images=len(images),
        **asdict(distances),
        psnr_fp=None if fp_images is None else paired_psnr(images, fp_images),
        ssim_fp=None if fp_images is None or not has_ssim(images) else paired_ssim(images, fp_images),
        identical_to_fp=fp_images is not None and torch.equal(images, fp_images),
        rank_deficient=features is not None and len(images) <= features.network.num_features,
    )


def evaluate_latents(states: Tensor, fp_states: Tensor) -> FidelityFigures:
    """Compute the figures of float latents (N, C, H, W) against full precision's of the same seeds: PSNR alone.

    The peak of the PSNR is the range of the full-precision latents.

    Raises:
        ModelError: the sets do not pair.
    """
    if states.shape != fp_states.shape or states.ndim != 4 or not len(states):
        raise ModelError(
            f"latents to compare: got {tuple(states.shape)} and {tuple(fp_states.shape)}; allowed two of one shape "
            "(N, C, H, W), N > 0"
        )
    psnr = psnr_of_floats(states, fp_states, float(fp_states.max() - fp_states.min()))
    identical, figure = psnr == math.inf, psnr if math.isfinite(psnr) else None
    return FidelityFigures(len(states), None, None, figure, None, identical_to_fp=identical, rank_deficient=False)


def psnr_of_floats(states: Tensor, references: Tensor, peak: float) -> float:
    """PSNR in dB of two tensors of one shape, from one mean squared error; infinite where they are equal."""
    error = float((states.double() - references.double()).square().mean())
    if not error:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak else -math.inf


def nearness_to(references: Tensor, images: Tensor, *, latent: bool) -> float:
    """Mean of the images' own PSNR in dB to their references (N, C, H, W), each at most `LARGEST_PSNR`.

    Pictures are compared within [-1, 1], latents with the range of all references as the peak. It is not the PSNR of
    all images together: one image of sixteen that became another picture would decide that figure, and such turns come
    and go by chance.
    """
    if latent:
        peak = float(references.max() - references.min())
    else:
        images, references, peak = images.clamp(-1, 1), references.clamp(-1, 1), 2.0
    psnrs = [psnr_of_floats(own, wanted, peak) for own, wanted in zip(images, references, strict=True)]
    return sum(min(psnr, LARGEST_PSNR) for psnr in psnrs) / len(psnrs)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Frechet distance between two sets of features (Heusel et al. 2017), computed by torchmetrics in float64.

    It is symmetric; a value that rounding made negative becomes 0.
    """
    # torchmetrics computes the distance from its accumulated states, so the stored statistics are merged into an empty
    # metric as its real and generated side.
    dimensions = len(a.features_sum)
    if a.features_sum.shape != b.features_sum.shape:
        raise ModelError(
            f"statistics to compare: got {dimensions} and {len(b.features_sum)} features; allowed equally many"
        )
    if min(a.num_samples, b.num_samples) < 2:
        raise ModelError(
            f"images of a distance: got {a.num_samples} and {b.num_samples}; allowed at least two on either side"
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    # only one process evaluates, so there is nothing to synchronize
    metric = FrechetInceptionDistance(feature=ReadyFeatures(dimensions), sync_on_compute=False)
    # an empty update tells the metric that features are float64
    metric.update(torch.empty(0, dimensions, dtype=torch.float64), real=False)
    metric.merge_state({**_state(a, "real"), **_state(b, "fake")})
    return max(0.0, float(metric.compute()))


def paired_psnr(images: Tensor, references: Tensor) -> float | None:
    """PSNR in dB of uint8 images (N, C, H, W), range 0..255, or None if it is infinite.

    It is computed from one mean squared error over the whole set.
    """
    from torchmetrics.image import PeakSignalNoiseRatio

    _check_pair(images, references)
    metric = PeakSignalNoiseRatio(data_range=1.0, sync_on_compute=False)
    for batch, reference in _unit_batches(images, references):
        metric.update(batch, reference)
    decibels = float(metric.compute())
    return decibels if math.isfinite(decibels) else None


def has_ssim(images: Tensor) -> bool:
    """Tell whether SSIM's window fits into images (N, C, H, W)."""
    return min(images.shape[2:]) >= SSIM_WINDOW


def paired_ssim(images: Tensor, references: Tensor) -> float:
    """Mean SSIM of uint8 images (N, C, H, W), range 0..255, with a Gaussian window of 11 pixels (Wang et al. 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(images, references)
    if not has_ssim(images):
        raise ModelError(
            f"images for SSIM: got {images.shape[2]}x{images.shape[3]} pixels; allowed at least "
            f"{SSIM_WINDOW}x{SSIM_WINDOW}"
        )
    edge = SSIM_WINDOW // 2  # count only windows inside the image, as the paper and scikit-image do
    total = torch.zeros((), dtype=torch.float64)
    for batch, reference in _unit_batches(images, references):
        # (n, C, H, W)
        _, values = structural_similarity_index_measure(
            batch, reference, data_range=1.0, sigma=SSIM_SIGMA, return_full_image=True
        )
        total += values[:, :, edge:-edge, edge:-edge].double().mean(dim=(1, 2, 3)).sum()
    return total.item() / len(images)


@dataclass(frozen=True)
class _Distances:
    """The figures that are computed from features."""

    fid_real: float | None = None
    fid_fp: float | None = None
    kid_real: float | None = None
    kid_real_error: float | None = None
    precision: float | None = None
    recall: float | None = None


def _distances(images: Tensor, fp_images: Tensor | None, features: Features, fp_features: Tensor | None) -> _Distances:
    """Compare the features of images with those of the reference and of full precision."""
    same = fp_images is not None and torch.equal(images, fp_images)
    computed = fp_features if same and fp_features is not None else image_features(features.network, images)
    statistics = feature_statistics(computed)
    fid_real = None if features.reference is None else frechet_distance(statistics, features.reference)
    fid_fp = None
    if fp_images is not None:
        # full precision itself: exactly 0, without rounding errors
        fid_fp = 0.0 if same else _distance_to(statistics, features, fp_images, fp_features)
    reference = features.reference_features
    if reference is None:
        return _Distances(fid_real, fid_fp)
    kernel = _kernel_distance(computed, reference) if len(images) < MANY_IMAGES else KernelDistance(None, None)
    count = min(len(computed), len(reference), MANY_IMAGES)
    both = (None, None) if count <= NEIGHBOURS else precision_and_recall(computed[:count], reference[:count])
    return _Distances(fid_real, fid_fp, kernel.value, kernel.error, *both)


def _distance_to(
    statistics: FeatureStatistics, features: Features, fp_images: Tensor, fp_features: Tensor | None
) -> float:
    """Frechet distance to full precision's images."""
    known = image_features(features.network, fp_images) if fp_features is None else fp_features
    return frechet_distance(statistics, feature_statistics(known))


def _kernel_distance(features: Tensor, reference: Tensor) -> KernelDistance:
    """Kernel distance to at most MANY_IMAGES of the reference, which is in random order: it takes N^2 steps."""
    return kernel_distance(features[:MANY_IMAGES], reference[:MANY_IMAGES])


def _state(statistics: FeatureStatistics, side: str) -> dict[str, Tensor]:
    """Return statistics as the state of one side, real or fake, of torchmetrics' metric."""
    return {
        f"{side}_features_sum": statistics.features_sum,
        f"{side}_features_cov_sum": statistics.features_cov_sum,
        f"{side}_features_num_samples": torch.tensor(statistics.num_samples),
    }


def _check_pair(images: Tensor, references: Tensor) -> None:
    """Refuse images that are not uint8 or not of one shape."""
    if images.dtype != torch.uint8 or references.dtype != torch.uint8:
        raise ModelError(f"images to compare: got {images.dtype} and {references.dtype}; allowed torch.uint8 for both")
    if images.ndim != 4 or images.shape != references.shape or len(images) == 0:
        raise ModelError(
            f"images to compare: got {tuple(images.shape)} and {tuple(references.shape)}; allowed two of one shape "
            "(N, C, H, W), N > 0"
        )


def _unit_batches(images: Tensor, references: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of batches, as float32 in [0, 1]."""
    batches = zip(torch.split(images, _BATCH), torch.split(references, _BATCH), strict=True)
    return [(a.to(torch.float32) / 255, b.to(torch.float32) / 255) for a, b in batches]
