"""Denoisers built from their configs alone: shapes without weights for plans, or random weights where trained values do
not matter.

Not here: trained weights (model_loading.py). This file never looks for weight files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pqcad_qat.machine.json_files import read_json
from pqcad_qat.models.denoiser import DenoiserInput, DiffusionModel
from pqcad_qat.models.denoiser_config import SampleSize
from pqcad_qat.models.families.family import TEXT_TOKENS, ConditionInput
from pqcad_qat.models.model_folder import (
    CONFIG,
    CONFIGS,
    check_no_single_file,
    denoiser_folder,
    downloaded,
    embedded_folder,
    local,
    scheduler_file,
)
from pqcad_qat.models.model_loading import (
    DEFAULT_SCHEDULER,
    folder_shapes,
    load_model,
    shapes_of_configs,
    untrained_denoiser,
)
from pqcad_qat.models.own_model import OWN, OwnModel
from pqcad_qat.policy.evaluation import EMBEDDED
from pqcad_qat.sampling.trajectory import noise_schedule

ARCHITECTURES = files("pqcad_qat.assets") / "architectures"
"""Folder of the denoiser configs of the architectures that ship."""

CONDITION = 0xC0
"""Last part of the random seed of conditions, which makes them independent of the noise."""


def architectures() -> list[str]:
    """Return the names of the architectures that ship with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in ARCHITECTURES.iterdir() if entry.name.endswith(".json"))


def architecture_configs(source: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the configs of a denoiser and of its scheduler; None where the source names neither.

    Where no scheduler config stands beside the denoiser's, the second is diffusers' default DDIM scheduler.

    Args:
        source: path of a denoiser's config.json, of a folder with one, or the name of an architecture that ships.

    Raises:
        ModelError: the config cannot be read.
    """
    path = local(source)
    if path is None:
        return (
            (read_json(Path(str(ARCHITECTURES / f"{source}.json"))), DEFAULT_SCHEDULER)
            if source in architectures()
            else None
        )
    if path.is_file():
        check_no_single_file(path)
        return read_json(path), DEFAULT_SCHEDULER
    if not (config := denoiser_folder(path) / CONFIG).is_file():
        check_no_single_file(path)
        return None
    beside = scheduler_file(path)
    return read_json(config), read_json(beside) if beside.is_file() else DEFAULT_SCHEDULER


def shapes_of(source: str, sample_size: SampleSize | None = None, own: OwnModel | None = None) -> DiffusionModel:
    """Return a model of any source whose denoiser has shapes but no weights, on torch's meta device.

    A module of the user's own is built with its weights.

    Args:
        source: as for `load_model` or `architecture_configs`.
        sample_size, own: as for `load_model`.

    Raises:
        ModelError: nothing is found there, or its class is not known.
    """
    if source.startswith(OWN):
        return load_model(source, sample_size, own)
    if source.startswith(EMBEDDED):
        with embedded_folder(source) as folder:
            return folder_shapes(folder, source, sample_size)
    if (path := local(source)) is None and source not in architectures():
        return folder_shapes(downloaded(source, CONFIGS), source, sample_size)
    if path is not None and path.is_dir():
        return folder_shapes(path, source, sample_size)
    configs = architecture_configs(source)
    assert configs is not None
    return shapes_of_configs(*configs, source, sample_size)


def random_denoiser(config: Mapping[str, Any], where: str, sample_size: SampleSize | None = None) -> nn.Module:
    """Build a denoiser with seeded random weights, in evaluation mode; `where` names its config in messages.

    Raises:
        ModelError: the class is not known, or diffusers cannot build a working denoiser from the config.
    """
    shapes_of_configs(config, DEFAULT_SCHEDULER, where, sample_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return untrained_denoiser(config, where, sample_size)


def untrained_model(source: str, sample_size: SampleSize | None = None) -> DiffusionModel | None:
    """Return the model of a shipped architecture or of a config.json with seeded random weights; None for any other
    source.

    Raises:
        ModelError: the config cannot be used.
    """
    if ((path := local(source)) is not None and path.is_dir()) or (configs := architecture_configs(source)) is None:
        return None
    shapes = shapes_of_configs(*configs, source, sample_size)
    return replace(shapes, denoiser=random_denoiser(configs[0], source, sample_size))


def noise_inputs(model: DiffusionModel, count: int, seed: int = 0) -> DenoiserInput:
    """Return noise inputs (x_t (B, C, H, W), t (B,), condition), with timesteps spread over the whole schedule."""
    noise = np.random.default_rng(seed).standard_normal((count, *model.sample_shape), dtype=np.float32)
    steps = torch.linspace(0, noise_schedule(model.scheduler_config).train_timesteps - 1, count).long()
    return torch.from_numpy(noise), steps, noise_condition(fixed_inputs(model.condition_inputs), count, seed)


def fixed_inputs(inputs: Sequence[ConditionInput]) -> tuple[ConditionInput, ...]:
    """Return the inputs with TEXT_TOKENS, an example's length, in place of open text lengths."""
    return tuple(replace(wanted, shape=tuple(size or TEXT_TOKENS for size in wanted.shape)) for wanted in inputs)


def noise_condition(inputs: Sequence[ConditionInput], count: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random conditions (B, ...) for inputs of known sizes: random labels, random embeddings, and masks that
    keep every token.
    """
    dice = np.random.default_rng((seed, CONDITION))
    return {wanted.name: torch.from_numpy(_noise_of(wanted, count, dice)) for wanted in inputs}


def _noise_of(wanted: ConditionInput, count: int, dice: np.random.Generator) -> npt.NDArray[Any]:
    shape = (count, *(size for size in wanted.shape if size is not None))
    if wanted.name.endswith("_mask"):
        return np.ones(shape, wanted.dtype)
    if wanted.bound is not None:
        return dice.integers(wanted.bound, size=shape, dtype=np.int64)
    return dice.standard_normal(shape, dtype=np.float32)
