"""Frechet distances against Gaussians' closed form and scipy, PSNR and SSIM against scikit-image, and what is said
where they mean nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from pqcad_qat.data.images import load_images
from pqcad_qat.errors import ModelError
from pqcad_qat.quality import fidelity
from pqcad_qat.quality.feature_network import Features, load_features, with_reference
from pqcad_qat.quality.fidelity import (
    evaluate_images,
    evaluate_latents,
    fid_protocol,
    frechet_distance,
    paired_psnr,
    paired_ssim,
)
from pqcad_qat.quality.image_features import (
    FeatureStatistics,
    feature_statistics,
    image_features,
    image_statistics,
)
from pqcad_qat.quality.kernel_distance import kernel_distance
from pqcad_qat.quality.precision_recall import precision_and_recall

RNG = np.random.default_rng(0)
DIGITS = load_images("digits", size=32).images  # uint8 (1797, 1, 32, 32)


@pytest.fixture(scope="module")
def embedded() -> Features:
    return load_features("embedded:fashion-mnist")


def statistics(features: NDArray[np.float64]) -> FeatureStatistics:
    return FeatureStatistics(
        torch.from_numpy(features.sum(axis=0)), torch.from_numpy(features.T @ features), len(features)
    )


def fid_by_scipy(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017, equation 6."""
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(s_a @ s_b))
    return float(((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(s_a + s_b - 2 * root))


def noisy(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * sigma
    return (images.float() + noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_distance_is_scipys_matrix_root_on_correlated_features(scale: float) -> None:
    mix = RNG.normal(size=(16, 16))
    a, b = RNG.normal(size=(400, 16)) @ mix + 2, scale * RNG.normal(size=(300, 16))
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(fid_by_scipy(a, b), rel=1e-8)
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(fid_by_scipy(a, b), rel=1e-8)


def test_the_distance_of_two_diagonal_gaussians_is_the_closed_form() -> None:
    """Sets built so that mean and covariance are exact: |m_a - m_b|^2 + sum (s_a - s_b)^2."""
    unit = np.concatenate([np.eye(4), -np.eye(4)])  # covariance 2 / 7 I, mean 0
    unit *= math.sqrt(7 / 2)
    a, b = unit * np.array([1.0, 2, 3, 4]), unit * np.array([4.0, 3, 2, 1]) + np.array([1.0, 0, 0, 2])
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(5 + 9 + 1 + 1 + 9, rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_also_where_its_covariance_has_no_full_rank() -> None:
    few = RNG.normal(size=(5, 16))
    assert 0 <= frechet_distance(statistics(few), statistics(few)) < 1e-6


def test_statistics_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ModelError, match="got 3 and 4 features; allowed equally many"):
        frechet_distance(statistics(np.ones((5, 3))), statistics(np.ones((5, 4))))
    with pytest.raises(ModelError, match="got 1 and 5; allowed at least two on either side"):
        frechet_distance(statistics(np.ones((1, 3))), statistics(np.ones((5, 3))))


def test_fid_through_the_embedded_network_is_scipys_on_its_features(embedded: Features) -> None:
    a, b = DIGITS[:200], noisy(DIGITS[200:400], 40.0)
    with torch.no_grad():
        features = [embedded.network.features(images / 127.5 - 1).double().numpy() for images in (a, b)]
    expected = fid_by_scipy(*features)
    assert frechet_distance(
        image_statistics(embedded.network, a), image_statistics(embedded.network, b)
    ) == pytest.approx(expected, rel=1e-3)


def test_what_is_not_clothing_is_far_from_the_embedded_reference_of_clothing(embedded: Features) -> None:
    noise = torch.from_numpy(RNG.integers(0, 256, (200, 1, 32, 32), dtype=np.uint8))
    digits, static = (evaluate_images(images, None, embedded).fid_real for images in (DIGITS[:200], noise))
    assert digits is not None
    assert static is not None
    assert digits > 20  # 512 held-out photographs of clothes stand at 0.2 to 0.4
    assert static > 50


def test_the_distance_to_full_precision_grows_with_the_difference(embedded: Features) -> None:
    found = [evaluate_images(noisy(DIGITS[:128], sigma), DIGITS[:128], embedded) for sigma in (2.0, 20.0, 80.0)]
    distances = [figures.fid_fp for figures in found if figures.fid_fp is not None]
    assert distances == sorted(distances)
    assert len(set(distances)) == 3
    ratios = [figures.psnr_fp for figures in found if figures.psnr_fp is not None]
    assert ratios == sorted(ratios, reverse=True)


def test_psnr_is_scikit_images_over_the_whole_set() -> None:
    a, b = DIGITS[:300], noisy(DIGITS[:300], 12.0)  # more than one batch
    expected = peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255)  # type: ignore[no-untyped-call]
    assert paired_psnr(a, b) == pytest.approx(expected, abs=1e-3)


def test_the_psnr_of_latents_is_scikit_images_with_full_precisions_range_as_its_peak() -> None:
    full = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = full + 0.1 * torch.randn(full.shape, generator=torch.Generator().manual_seed(1))
    expected = peak_signal_noise_ratio(full.numpy(), found.numpy(), data_range=float(np.ptp(full.numpy())))
    assert evaluate_latents(found, full).psnr_fp == pytest.approx(expected, abs=1e-3)
    same = evaluate_latents(full, full)
    assert (same.psnr_fp, same.identical_to_fp) == (None, True)


def test_one_image_that_became_another_does_not_decide_how_near_images_are() -> None:
    references = torch.rand(16, 1, 4, 4) * 2 - 1
    images = references + 0.01
    turned = images.clone()
    turned[0] = -references[0]
    alone = float(fidelity.psnr_of_floats(turned[:1], references[:1], 2.0))
    nearness = fidelity.nearness_to(references, images.clamp(-1, 1), latent=False)
    assert fidelity.nearness_to(references, turned.clamp(-1, 1), latent=False) == pytest.approx(
        nearness + (alone - 46.02) / 16, abs=0.1
    )
    assert fidelity.nearness_to(references, references.clone(), latent=True) == fidelity.LARGEST_PSNR


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_mean_of_scikit_images_per_image(channels: int) -> None:
    a = DIGITS[: 300 * channels].reshape(300, channels, 32, 32)
    b = noisy(a, 25.0)
    options = {
        "data_range": 255,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "channel_axis": 0,
    }
    expected = np.mean([structural_similarity(x, y, **options) for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    assert paired_ssim(a, b) == pytest.approx(expected, abs=1e-4)


def test_identical_images_have_no_finite_psnr_and_the_figures_say_so_in_strict_json(embedded: Features) -> None:
    figures = evaluate_images(DIGITS[:100], DIGITS[:100], embedded)
    assert figures.psnr_fp is None
    assert figures.identical_to_fp
    assert figures.ssim_fp == pytest.approx(1.0, abs=1e-6)
    assert figures.fid_fp == 0
    assert json.loads(json.dumps(asdict(figures), allow_nan=False))["psnr_fp"] is None


def test_without_a_counterpart_or_a_reference_the_figures_are_none(embedded: Features) -> None:
    alone = evaluate_images(DIGITS[:100], None, embedded)
    assert (alone.fid_fp, alone.psnr_fp, alone.ssim_fp, alone.identical_to_fp) == (None, None, None, False)
    assert alone.fid_real is not None
    assert evaluate_images(DIGITS[:100], None, replace(embedded, reference=None)).fid_real is None
    paired = evaluate_images(DIGITS[:100], noisy(DIGITS[:100], 9.0), None)
    assert (paired.fid_real, paired.fid_fp) == (None, None)
    assert paired.psnr_fp is not None


@pytest.mark.parametrize(("count", "deficient"), [(64, True), (65, False)])
def test_a_covariance_of_too_few_images_is_marked(embedded: Features, count: int, deficient: bool) -> None:
    assert evaluate_images(DIGITS[:count], None, embedded).rank_deficient is deficient


def test_one_image_has_no_fid(embedded: Features) -> None:
    with pytest.raises(ModelError, match=r"got 1 and .*; allowed at least two on either side"):
        evaluate_images(DIGITS[:1], None, embedded)


def test_sets_that_do_not_pair_are_refused(embedded: Features) -> None:
    with pytest.raises(ModelError, match=r"got \(3, 1, 32, 32\) and \(2, 1, 32, 32\)"):
        evaluate_images(DIGITS[:3], DIGITS[:2], embedded)
    with pytest.raises(ModelError, match=r"got torch\.uint8 and torch\.float32; allowed torch\.uint8"):
        paired_psnr(DIGITS[:3], DIGITS[:3].float())
    with pytest.raises(ModelError, match="got 8x8 pixels; allowed at least 11x11"):
        paired_ssim(DIGITS[:2, :, :8, :8], DIGITS[:2, :, :8, :8])


def test_images_smaller_than_the_window_have_every_figure_but_ssim() -> None:
    images = DIGITS[:4, :, :10, :10]
    figures = evaluate_images(noisy(images, 9.0), images, None)
    assert figures.ssim_fp is None
    assert figures.psnr_fp == paired_psnr(noisy(images, 9.0), images)


def test_the_protocol_names_network_reference_and_a_small_number_of_images(embedded: Features) -> None:
    protocol = fid_protocol(embedded, images=512, sampler="ddim", steps=20, seed=7)
    assert (protocol.features, protocol.features_sha256) == ("embedded:fashion-mnist", embedded.sha256)
    assert protocol.reference is not None
    assert protocol.reference.startswith("fashion-mnist train 32x32, 60000 images, sha256 ")
    assert protocol.under_10000
    assert not fid_protocol(embedded, images=10_000, sampler="ddim", steps=20, seed=7).under_10000


def test_figures_of_single_images_need_the_references_features(embedded: Features) -> None:
    alone = evaluate_images(DIGITS[:60], None, embedded)
    assert (alone.kid_real, alone.kid_real_error, alone.precision, alone.recall) == (None, None, None, None)
    others = image_features(embedded.network, DIGITS[60:180])
    features = with_reference(embedded, others, "other digits")
    near, far = (evaluate_images(images, None, features) for images in (DIGITS[:60], noisy(DIGITS[:60], 60.0)))
    assert near.fid_real == pytest.approx(
        frechet_distance(image_statistics(embedded.network, DIGITS[:60]), feature_statistics(others))
    )
    expected = kernel_distance(image_features(embedded.network, DIGITS[:60]), others)
    assert (near.kid_real, near.kid_real_error) == (expected.value, expected.error)
    assert near.kid_real is not None
    assert far.kid_real is not None
    assert far.kid_real > near.kid_real + 3 * (far.kid_real_error or 0)
    assert (near.precision, near.recall) == precision_and_recall(
        image_features(embedded.network, DIGITS[:60]), others[:60]
    )


def test_features_of_full_precision_that_are_known_change_no_figure(embedded: Features) -> None:
    images, full = noisy(DIGITS[:40], 20.0), DIGITS[:40]
    known = image_features(embedded.network, full)
    assert evaluate_images(images, full, embedded, known) == evaluate_images(images, full, embedded)


@pytest.mark.parametrize(("images", "counts"), [(500, (60, 61)), (40, (40, 61))])
def test_the_floor_is_the_distance_of_one_half_of_the_reference_to_the_other(
    embedded: Features, images: int, counts: tuple[int, int]
) -> None:
    others = image_features(embedded.network, DIGITS[:121])
    floor = fid_protocol(with_reference(embedded, others, "digits"), images, "ddim", 20, seed=0).floor
    assert floor is not None
    assert floor.images == counts
    halves = others[: counts[0]], others[60:]
    assert floor.distance == frechet_distance(*map(feature_statistics, halves))
    expected = kernel_distance(*halves)
    assert (floor.kid, floor.kid_error) == (expected.value, expected.error)
    assert fid_protocol(embedded, images, "ddim", 20, seed=0).floor is None


def test_images_of_the_customary_number_have_no_kernel_distance(
    embedded: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "MANY_IMAGES", 30)
    features = with_reference(embedded, image_features(embedded.network, DIGITS[60:180]), "other digits")
    assert evaluate_images(DIGITS[:30], None, features).kid_real is None
    assert evaluate_images(DIGITS[:29], None, features).kid_real is not None
