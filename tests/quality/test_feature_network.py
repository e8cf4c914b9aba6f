"""The feature network: trained on scikit-learn's digits, saved, loaded, damaged; and the one that ships in the
package.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from pqcad_qat.data.images import ImageSet, image_set, load_images, to_float
from pqcad_qat.errors import ModelError
from pqcad_qat.quality.feature_network import embedded_features, load_features
from pqcad_qat.quality.feature_training import (
    RECIPES,
    FeatureRecipe,
    accuracy,
    hold_out,
    long_enough,
    make_features,
    train_feature_network,
)
from pqcad_qat.quality.image_features import feature_statistics, image_features, image_statistics

ASSETS = Path(str(resources.files("pqcad_qat.assets")))
RECIPE = FeatureRecipe(epochs=3, batch_size=64, shift=0, flip=False)


def part(images: ImageSet, chosen: slice) -> ImageSet:
    assert images.labels is not None
    return image_set(images.images[chosen].numpy(), images.labels[chosen].numpy(), images.name)


DIGITS = load_images("digits", size=8)
TRAIN, TEST = part(DIGITS, slice(0, 1500)), part(DIGITS, slice(1500, None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("features")
    make_features(found, TRAIN, TEST, RECIPE)
    return found


def test_training_learns_the_digits_and_its_provenance_says_how_well(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    network = load_features(str(folder)).network
    assert accuracy(network, TEST) > 0.8  # chance is 0.1
    assert config["provenance"]["accuracy"] == accuracy(network, TEST)
    assert config["provenance"]["trained_on"] == {"name": "digits 8x8", "images": 1500, "sha256": TRAIN.digest}
    assert config["provenance"]["recipe"]["seed"] == RECIPE.seed


def test_training_twice_gives_the_same_weights_bit_for_bit_and_leaves_the_global_generator_alone() -> None:
    small, recipe = part(DIGITS, slice(0, 128)), FeatureRecipe(epochs=1, batch_size=32, seed=3)
    torch.manual_seed(11)
    expected_next = torch.rand(1)
    torch.manual_seed(11)
    first, second = train_feature_network(small, recipe).state_dict(), train_feature_network(small, recipe).state_dict()
    assert torch.equal(torch.rand(1), expected_next)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train_feature_network(small, FeatureRecipe(epochs=1, batch_size=32, seed=4)).state_dict()
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_every_fifth_image_is_held_out_and_none_is_in_both_parts() -> None:
    train, test = hold_out(DIGITS)
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(test.images, DIGITS.images[::5])
    assert torch.equal(train.images[:5], DIGITS.images[[1, 2, 3, 4, 6]])
    assert train.labels is not None
    assert DIGITS.labels is not None
    assert torch.equal(train.labels[:5], DIGITS.labels[[1, 2, 3, 4, 6]])
    assert (train.name, test.name) == ("digits 8x8 train", "digits 8x8 held-out")


def test_without_a_test_split_the_network_is_measured_on_what_is_held_out_and_the_reference_is_of_all(
    tmp_path: Path,
) -> None:
    images = part(DIGITS, slice(0, 250))
    features = make_features(tmp_path, images, recipe=FeatureRecipe(shift=0, flip=False, batch_size=32))
    provenance = json.loads((tmp_path / "config.json").read_text())["provenance"]
    assert (provenance["trained_on"]["images"], provenance["tested_on"]["images"]) == (200, 50)
    assert provenance["accuracy"] > 0.5
    assert features.reference is not None
    assert features.reference.num_samples == 250


def test_a_network_that_guesses_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = image_set(noise.numpy(), torch.arange(100).numpy() % 3, "noise")
    with pytest.raises(ModelError, match=r"noise held-out: got an accuracy of \d+% on 20 images, .*; allowed images"):
        make_features(tmp_path / "guesses", images, recipe=FeatureRecipe(batch_size=16))
    assert not (tmp_path / "guesses").exists()


def test_few_images_are_seen_more_often_than_the_recipe_says() -> None:
    recipe = FeatureRecipe(epochs=2, batch_size=32)
    assert long_enough(recipe, 70).epochs == 150
    assert long_enough(recipe, 20).epochs == 300
    assert long_enough(recipe, 32 * 150) == recipe


def test_too_few_images_to_hold_some_out_are_refused() -> None:
    with pytest.raises(ModelError, match="got 4 images; allowed at least 5 for a feature network"):
        hold_out(part(DIGITS, slice(0, 4)))


@pytest.mark.parametrize("count", [64, 70], ids=["whole batches", "an incomplete last batch"])
def test_progress_hears_of_every_step(count: int) -> None:
    heard: list[tuple[int, int, float]] = []
    train_feature_network(
        part(DIGITS, slice(0, count)),
        FeatureRecipe(epochs=2, batch_size=32),
        lambda *step: heard.append(step),
    )
    assert [(step, steps) for step, steps, _ in heard] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(loss > 0 for _, _, loss in heard)


def test_images_without_labels_cannot_train_a_classifier() -> None:
    with pytest.raises(ModelError, match="got images without labels; allowed labelled ones"):
        train_feature_network(image_set(DIGITS.images[:10].numpy(), None, "unlabelled"))


def test_statistics_are_the_sums_over_the_features_in_double_precision(folder: Path) -> None:
    network = load_features(str(folder)).network
    images = DIGITS.images[:300]
    with torch.no_grad():
        features = network.features(to_float(images)).double().numpy()  # (300, 64)
    found = feature_statistics(image_features(network, images), batch_size=70)
    assert found.num_samples == 300
    assert found.features_sum.dtype == torch.float64
    np.testing.assert_allclose(found.features_sum.numpy(), features.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.features_cov_sum.numpy(), features.T @ features, rtol=1e-5)


def test_the_saved_reference_is_what_evaluation_computes_again(folder: Path) -> None:
    features = load_features(str(folder))
    again = image_statistics(features.network, TRAIN.images)
    assert features.reference is not None
    assert features.reference.num_samples == len(TRAIN)
    assert features.reference_name == f"digits 8x8, 1500 images, sha256 {TRAIN.digest}"
    assert torch.equal(features.reference.features_cov_sum, again.features_cov_sum)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 9, 9).byte(), torch.zeros(2, 3, 8, 8).byte(), torch.zeros(8, 8).byte()],
)
def test_images_of_another_kind_are_refused(folder: Path, images: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"got .*; allowed torch\.uint8 \(N, 1, 8, 8\)"):
        image_statistics(load_features(str(folder)).network, images)


def copied(folder: Path, to: Path) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_network_without_reference_loads_without_one(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    (copy / "reference.json").unlink()
    features = load_features(str(copy))
    assert features.reference is None
    assert features.reference_name is None


@pytest.mark.parametrize("name", ["model.safetensors", "reference.safetensors"])
def test_a_flipped_byte_or_a_missing_file_is_found_by_its_digest(folder: Path, tmp_path: Path, name: str) -> None:
    path = copied(folder, tmp_path) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}: got a damaged or exchanged file with SHA-256 .*; allowed"):
        load_features(str(tmp_path))
    path.unlink()
    with pytest.raises(ModelError, match=f"{name}: got no such file; allowed the one that"):
        load_features(str(tmp_path))


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_reference_of_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    rewrite(copied(folder, tmp_path) / "reference.json", features_sha256="0" * 64)
    with pytest.raises(ModelError, match="got statistics of the feature network 000"):
        load_features(str(tmp_path))


def test_a_config_that_does_not_fit_the_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    config = copied(folder, tmp_path) / "config.json"
    network = json.loads(config.read_text())["network"]
    rewrite(config, network={**network, "classes": 11})
    with pytest.raises(ModelError, match="got no feature network of this format"):
        load_features(str(tmp_path))
    rewrite(config, network={**network, "depth": 3})
    with pytest.raises(ModelError, match="depth"):
        load_features(str(tmp_path))
    rewrite(config, format="something else")
    with pytest.raises(ModelError, match="format: got"):
        load_features(str(tmp_path))
    config.write_text("{")
    with pytest.raises(ModelError, match="got text that is not JSON"):
        load_features(str(tmp_path))


def test_an_unknown_source_is_answered_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match="got 'embedded:cifar'; allowed embedded:digits, embedded:fashion-mnist, embedded:noto-emoji, "
        r"efficientnet-lite0, the file pt_inception-2015-12-05-6726825d\.pth, or a folder",
    ):
        load_features("embedded:cifar")
    with pytest.raises(ModelError, match=r"config\.json: got no such file; allowed a folder of a feature network"):
        load_features(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "images", "tested", "accuracy"), [("fashion-mnist", 60_000, 10_000, 0.91), ("digits", 1797, 360, 0.97)]
)
def test_each_embedded_network_ships_small_with_its_provenance_and_the_statistics_of_all_images(
    name: str, images: int, tested: int, accuracy: float
) -> None:
    features, folder = load_features(f"embedded:{name}"), ASSETS / f"features-{name}"
    config = json.loads((folder / "config.json").read_text())
    assert features.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert features.network.num_features == 64
    assert features.reference is not None
    assert features.reference.num_samples == images
    assert config["provenance"]["accuracy"] >= accuracy
    assert config["provenance"]["tested_on"]["images"] == tested
    assert config["provenance"]["recipe"] == asdict(RECIPES.get(name, FeatureRecipe()))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000


def test_the_embedded_networks_are_known_by_name() -> None:
    assert embedded_features() == ["embedded:digits", "embedded:fashion-mnist", "embedded:noto-emoji"]


def test_the_embedded_reference_of_the_digits_is_of_the_images_that_are_loaded() -> None:
    features = load_features("embedded:digits")
    assert features.reference_name == f"digits 16x16, 1797 images, sha256 {load_images('digits', size=16).digest}"
