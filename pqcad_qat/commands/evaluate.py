"""The command `evaluate`: the Frechet distance of a folder's images to real ones, with its protocol.

Not here: how distances are computed (quality/), and how a folder is opened (open_folder.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from pqcad_qat.commands.open_folder import opened_folder, policy_of
from pqcad_qat.errors import ModelError, UsageError
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.quality.feature_network import check_shape, embedded_features, load_features
from pqcad_qat.quality.fid_protocol import FidProtocol
from pqcad_qat.quality.fidelity import evaluate_images, fid_protocol
from pqcad_qat.stages.samplers import sample_images

BATCH = 64
"""Number of images sampled together."""


@dataclass(frozen=True)
class Evaluation:
    """A Frechet distance to real images, and the protocol that makes it comparable."""

    fid_real: float | None
    fid_protocol: FidProtocol


def evaluate(
    folder: str,
    *,
    images: int,
    seed: int,
    steps: int | None,
    features: str | None,
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

    Raises:
        UsageError: the model makes latents, or the feature network does not accept what the model makes.
        ModelError, PolicyError: as for `opened.opened_folder`.
    """
    variant = opened_folder(folder, steps, conditions, guidance)
    if variant.latent:
        raise UsageError(
            f"{folder}: got a model of latents with {variant.sample_shape[0]} channels; allowed a model of images"
        )
    source = features or _features_of(folder)
    try:
        check_shape(source, variant.sample_shape)
    except ModelError as error:
        raise UsageError(f"--features: {error}") from error
    network = load_features(source)
    with progress_bar(console) as bar:
        task = bar.add_task("sample", total=images * variant.steps, note=variant.runtime)
        sampled = sample_images(variant, images, seed, BATCH, advance=lambda done: bar.update(task, advance=done))
    figures = evaluate_images(sampled, None, network)
    return Evaluation(
        figures.fid_real, fid_protocol(network, images, variant.schedule.sampler, variant.steps, seed=seed)
    )


def _features_of(folder: str) -> str:
    """Feature network that belongs to the images of a run or of an embedded model."""
    policy = policy_of(folder)
    if folder in embedded_features():
        return folder
    if policy is None or policy.features is None:
        raise UsageError(
            f"--features: got none, and {folder} has none of its own; allowed "
            f"{', '.join(embedded_features())}, or a folder"
        )
    return policy.features
