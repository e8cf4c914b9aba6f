"""Training of the feature network: a classifier of real images, trained in minutes on one core, and its provenance.

Not here: the network itself and its files (quality/feature_network.py), the denoiser's training
(training/pretraining.py).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from pqcad_qat.data.images import ImageSet, image_set, to_float
from pqcad_qat.errors import ModelError
from pqcad_qat.quality.feature_network import FeatureConfig, FeatureNetwork, Features, save_features


@dataclass(frozen=True)
class FeatureRecipe:
    """Training settings: AdamW, a linear warm-up over the first twentieth of the steps, then a cosine decay to zero."""

    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    shift: int = 2  # largest random translation of a batch, in pixels
    flip: bool = True  # whether each image is mirrored with probability one half
    seed: int = 0


RECIPES: Mapping[str, FeatureRecipe] = {
    # The images are few, touch the border, and become other digits when mirrored.
    "digits": FeatureRecipe(epochs=40, shift=0, flip=False),
    "noto-emoji": FeatureRecipe(epochs=20),
}
"""Recipes of the data sets for which the default is unsuitable."""

HELD_OUT = 5
"""Distance between held-out images: without a test split, every `HELD_OUT`-th image is held out for testing."""


LEAST_STEPS = 300
"""Smallest number of training steps of `make_features`; few images are seen in more epochs than the recipe names."""


def train_feature_network(
    images: ImageSet, recipe: FeatureRecipe = FeatureRecipe(), progress: Callable[[int, int, float], None] | None = None
) -> FeatureNetwork:
    """Train a classifier of `images` by cross-entropy; equal images, recipe and number of threads give equal weights.

    `progress` is called after every step with (step, steps, loss).

    Raises:
        ModelError: the images have no labels.
    """
    labels = _labels(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        _, channels, size, _ = images.images.shape
        config = FeatureConfig(channels=channels, size=size, classes=int(labels.max()) + 1)
        network = FeatureNetwork(config)
        convert_conv2d_weight_memory_format(network, torch.channels_last)
        steps = recipe.epochs * (len(images) // min(recipe.batch_size, len(images)))
        optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
        for step, index in enumerate(_batches(len(images), recipe)):
            loss = nn.functional.cross_entropy(network(_augment(to_float(images.images[index]), recipe)), labels[index])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            scheduler.step()
            if progress is not None:
                progress(step + 1, steps, loss.item())
    network.eval().requires_grad_(False)
    return network


def make_features(
    folder: Path,
    images: ImageSet,
    test: ImageSet | None = None,
    recipe: FeatureRecipe = FeatureRecipe(),
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> Features:
    """Train a feature network, measure its accuracy, and write it with its provenance and statistics of `images`.

    Args:
        folder: where it is written.
        images: labelled images to train on.
        test: labelled images for the accuracy; without them, some of `images` are held out.
        recipe: settings of the training; few images get more epochs (`long_enough`).
        progress: called after every step with (step, steps, loss).

    Raises:
        ModelError: the images have no labels, are too few, or the network does no better than guessing; nothing is
            written then.
    """
    train, test = hold_out(images) if test is None else (images, test)
    recipe = long_enough(recipe, len(train))
    network = train_feature_network(train, recipe, progress)
    share = accuracy(network, test)
    _refuse_guesses(share, test)
    provenance: dict[str, Any] = {
        "recipe": asdict(recipe),
        "trained_on": _record(train),
        "tested_on": _record(test),
        "accuracy": share,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    return save_features(folder, network, images, provenance)


def hold_out(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Split images into training images and test images; every `HELD_OUT`-th one is a test image."""
    if len(images) < HELD_OUT:
        raise ModelError(f"{images.name}: got {len(images)} images; allowed at least {HELD_OUT} for a feature network")
    labels, every = _labels(images), torch.arange(len(images))
    indices = {"train": every[every % HELD_OUT > 0], "held-out": every[::HELD_OUT]}
    train, test = (
        image_set(images.images[i].numpy(), labels[i].numpy(), f"{images.name} {name}") for name, i in indices.items()
    )
    return train, test


def long_enough(recipe: FeatureRecipe, count: int) -> FeatureRecipe:
    """The recipe for `count` images: with as many epochs as give `LEAST_STEPS` steps, where its own give fewer."""
    batches = count // min(recipe.batch_size, count)
    return replace(recipe, epochs=max(recipe.epochs, math.ceil(LEAST_STEPS / batches)))


def _refuse_guesses(share: float, test: ImageSet) -> None:
    """Refuse an accuracy that guessing the most frequent class reaches, within three standard deviations.

    The features of such a network say nothing of the images, and every Frechet distance through it is near zero.
    """
    counts = torch.bincount(_labels(test)).double()
    chance = (counts.max() / counts.sum()).item()
    if share <= chance + 3 * math.sqrt(chance * (1 - chance) / len(test)):
        raise ModelError(
            f"{test.name}: got an accuracy of {share:.0%} on {len(test)} images, where guessing gives {chance:.0%}; "
            "allowed images whose classes a small network can learn: more images, or other labels"
        )


def accuracy(network: FeatureNetwork, images: ImageSet, batch_size: int = 500) -> float:
    """Share of `images` that the network classifies correctly, from 0 to 1."""
    labels = _labels(images)
    with torch.no_grad():
        guesses = torch.cat(
            [network(to_float(batch)).argmax(dim=1) for batch in torch.split(images.images, batch_size)]
        )
    return (guesses == labels).double().mean().item()


def _record(images: ImageSet) -> dict[str, Any]:
    """Return what identifies a data set in the provenance."""
    return {"name": images.name, "images": len(images), "sha256": images.digest}


def _labels(images: ImageSet) -> Tensor:
    """Return the labels, or refuse images without any."""
    if images.labels is None:
        raise ModelError(
            f"{images.name}: got images without labels; allowed labelled ones, since a feature network learns classes"
        )
    return images.labels


def _learning_rate_factor(step: int, steps: int) -> float:
    """Return the learning rate at a step as a share of the recipe's, as FeatureRecipe describes it."""
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _batches(count: int, recipe: FeatureRecipe) -> Iterator[Tensor]:
    """Indices of every training batch, shuffled in each epoch; an incomplete last batch is left out."""
    size = min(recipe.batch_size, count)
    for _ in range(recipe.epochs):
        order = torch.randperm(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def _augment(images: Tensor, recipe: FeatureRecipe) -> Tensor:
    """Mirror random images of (N, C, H, W), and roll all of them by one random translation."""
    if recipe.flip:
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    down, right = torch.randint(-recipe.shift, recipe.shift + 1, (2,)).tolist()
    return images.roll((down, right), dims=(2, 3))
