"""The command `evaluate`: the distances of a folder's images to real ones, with their protocol.

Not here: how distances are computed (quality/), and how a folder is opened (open_folder.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pqcad_qat.commands.open_folder import opened_folder, policy_of
from pqcad_qat.errors import ModelError, UsageError
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.quality.feature_network import (
    all_features,
    check_shape,
    embedded_features,
    load_features,
    made_by_others,
)
from pqcad_qat.quality.fid_protocol import FidProtocol
from pqcad_qat.quality.fidelity import FidelityFigures, evaluate_images, fid_protocol
from pqcad_qat.stages.prepared import check_pictures
from pqcad_qat.stages.reference_set import with_pictures
from pqcad_qat.stages.samplers import sample_images

BATCH = 64
"""Number of images sampled together."""


@dataclass(frozen=True)
class Evaluation:
    """Distances to real images, and the protocol that makes them comparable."""

    figures: FidelityFigures
    fid_protocol: FidProtocol


def evaluate(
    folder: str,
    *,
    images: int,
    seed: int,
    steps: int | None,
    features: str | None,
    reference: str | None,
    conditions: str | None,
    guidance: float | None,
    console: Console,
) -> Evaluation:
    """Sample images from a folder and compare them with real ones.

    Args:
        folder, steps, conditions, guidance: same as for `opened.opened_folder`.
        images: number of images.
        seed: seed of their noise.
        features: feature network; by default the one of a run's policy, or an embedded model's own.
        reference: folder of real pictures; by default that of a run's policy, or what the feature network brings along.

    Raises:
        UsageError: the model makes latents and has no decoder, the feature network does not accept its pictures, or the
            reference cannot be used.
        ModelError, PolicyError: as for `opened.opened_folder`.
    """
    variant = opened_folder(folder, steps, conditions, guidance)
    if variant.latent and variant.decode is None:
        channels = variant.sample_shape[0]
        raise UsageError(
            f"{folder}: got a model of latents with {channels} channels and no decoder; allowed a model of images, or "
            "one with a decoder"
        )
    source, shape = features or _features_of(folder), variant.picture_shape
    try:
        check_shape(source, shape)
    except ModelError as error:
        raise UsageError(f"--features: {error}") from error
    network = load_features(source)
    pictures = reference or _reference_of(folder, source)
    if pictures is not None:
        try:
            check_pictures(Path(pictures), "--reference")
        except ModelError as error:
            raise UsageError(str(error)) from error
        network = with_pictures(network, Path(pictures), shape, console)
    with progress_bar(console) as bar:
        task = bar.add_task("sample", total=images * variant.steps, note=variant.runtime)
        sampled = sample_images(variant, images, seed, BATCH, advance=lambda done: bar.update(task, advance=done))
    figures = evaluate_images(sampled, None, network)
    return Evaluation(figures, fid_protocol(network, images, variant.schedule.sampler, variant.steps, seed=seed))


def _reference_of(folder: str, features: str) -> str | None:
    """Folder of real pictures that a run was compared with; None where the feature network brings statistics along."""
    policy = policy_of(folder)
    pictures = None if policy is None else policy.evaluation.reference
    if pictures is None and made_by_others(features):
        raise UsageError(
            f"--reference: got none, and {features} knows no real pictures; allowed a folder of pictures like those "
            f"that {folder} makes"
        )
    return pictures


def _features_of(folder: str) -> str:
    """Feature network that belongs to the images of a run or of an embedded model."""
    policy = policy_of(folder)
    if folder in embedded_features():
        return folder
    if policy is None or policy.features is None:
        raise UsageError(f"--features: got none, and {folder} has none of its own; allowed {all_features()}")
    return policy.features
