"""The images that a run's variants are compared with: a folder of pictures, or full precision's own of other seeds.

Their features are kept beside the runs, for all runs that compare with the same images. Not here: distances (quality/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from pqcad_qat.data.images import load_pictures, pictures_digest
from pqcad_qat.machine.content_store import parts_folder, shared_folder
from pqcad_qat.machine.progress import counting, working
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import REFERENCE
from pqcad_qat.quality.feature_network import Features, made_by_others, with_reference
from pqcad_qat.quality.image_features import image_features
from pqcad_qat.stages.kept_images import images_or_latents, pictures_of
from pqcad_qat.stages.prepared import SHARED, Prepared
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.samplers import pytorch_variant, sample_rows
from pqcad_qat.stages.stage_dependencies import sampling

_FILE, _FEATURES = "reference-features.safetensors", "features"


def compared(policy: Policy, prepared: Prepared, run: RunFolder, features: Features, *, console: Console) -> Features:
    """Return the feature network with the reference that the policy asks for.

    That is a folder of pictures. Without one it is what the network brings along. A network of others brings
    nothing, so it compares with as many samples of full precision from the seed after evaluation.seed.
    """
    store, shape = run.path.parent / SHARED, prepared.picture_shape
    if policy.evaluation.reference is not None:
        return with_pictures(features, Path(policy.evaluation.reference), shape, console, store=store)
    if not made_by_others(features.source):
        return features
    count, seed = policy.evaluation.images, policy.evaluation.seed + 1
    decides = {**run.decides(sampling(REFERENCE)), "reference": "samples", "seed": seed, "features": features.sha256}
    folder = shared_folder(store, decides, partial(_sampled_features, policy, prepared, features, console=console))
    name = f"full precision's own samples, {count} images of seed {seed}, {policy.sampler.steps} steps"
    return with_reference(features, _read(folder), name, "full-precision")


def with_pictures(
    features: Features, pictures: Path, shape: tuple[int, int, int], console: Console, *, store: Path | None = None
) -> Features:
    """Return the feature network with a folder of pictures as its reference, cropped and resized to (C, H, W).

    Their features are computed once for each store.
    """
    digest = pictures_digest(pictures)
    decides: Mapping[str, object] = {
        "reference": digest,
        "shape": list(shape),
        "features": features.sha256,
        "versions": {package: version(package) for package in ("torch", "pillow")},
    }
    if store is None:
        computed = _picture_features(features, pictures, shape, console)
    else:

        def make(folder: Path) -> None:
            _save(_picture_features(features, pictures, shape, console), folder)

        computed = _read(shared_folder(store, decides, make))
    height, width = shape[1:]
    return with_reference(
        features, computed, f"{pictures.name} {height}x{width}, {len(computed)} images, sha256 {digest}"
    )


def _picture_features(features: Features, pictures: Path, shape: tuple[int, int, int], console: Console) -> Tensor:
    """Compute the features of a folder's pictures, in a random order that is always the same.

    Files are often sorted by what they show, and halves of the reference are to be alike.
    """
    channels, height, width = shape
    with working(console, f"evaluation: {pictures.name} as the reference"):
        images = load_pictures(pictures, (height, width), channels).images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return image_features(features.network, images[order])


def _sampled_features(
    policy: Policy, prepared: Prepared, features: Features, folder: Path, *, console: Console
) -> None:
    """Sample with full precision from the seed after evaluation.seed, and save the features of the images."""
    schedule, steps = prepared.sampled_by(policy, REFERENCE), policy.sampling_steps(REFERENCE)
    sampler = replace(
        pytorch_variant(REFERENCE, prepared.model.denoiser, schedule, steps, sample_shape=prepared.model.sample_shape),
        conditions=prepared.conditions,
        guidance_scale=policy.guidance_scale(REFERENCE),
    )
    section = policy.evaluation
    with counting(console, "sample the reference", section.images * steps) as advance:
        rows = sample_rows(
            sampler,
            section.images,
            section.seed + 1,
            section.batch_size,
            kept=images_or_latents(prepared.model, decoded=True),
            advance=advance,
            batch_folder=parts_folder(folder),
        )
    pictures = pictures_of(rows)
    assert pictures is not None  # a model of latents without a decoder has no feature network
    with working(console, "evaluation: features of the reference"):
        _save(image_features(features.network, pictures), folder)


def _save(computed: Tensor, folder: Path) -> None:
    save_tensors({_FEATURES: computed}, folder / _FILE)


def _read(folder: Path) -> Tensor:
    tensor: Tensor = load_file(folder / _FILE)[_FEATURES]
    return tensor
