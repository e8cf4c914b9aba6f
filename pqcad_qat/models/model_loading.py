"""Full-precision models from their folders and configs, and back into a folder in diffusers' layout.

Not here: calling a denoiser (denoiser.py), what an index names (model_folder.py), and weights (weight_files.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import no_init_weights
from safetensors.torch import save_file
from torch import nn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import write_json
from pqcad_qat.machine.json_files import read_json
from pqcad_qat.models.config_values import bounded_build, class_of, silent
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.models.denoiser_config import SampleSize, checked_config, known_family
from pqcad_qat.models.families.family import PIPELINE_ROOT
from pqcad_qat.models.families.plain_module import OWN_MODULE
from pqcad_qat.models.families.table import family_of
from pqcad_qat.models.model_folder import (
    CONFIG,
    DECODERS,
    INDEX,
    LAYOUT,
    NO_CONFIG,
    SCHEDULER_CONFIG,
    STEM,
    WEIGHTS,
    check_index,
    check_no_single_file,
    denoiser_folder,
    downloaded_pipeline,
    embedded_folder,
    local,
    part_class,
    read_index,
    scheduler_file,
)
from pqcad_qat.models.own_model import OWN, OwnModel, built
from pqcad_qat.models.trial_calls import try_call
from pqcad_qat.models.weight_files import fitting, has_weights, load_weights, stored_tensors, weight_files
from pqcad_qat.policy.evaluation import EMBEDDED
from pqcad_qat.sampling.schedulers import DDIM_KEYS, DDIM_SCHEDULER, FLOW_SCHEDULER, scheduler_class
from pqcad_qat.sampling.trajectory import noise_schedule

DEFAULT_SCHEDULER: dict[str, Any] = {"_class_name": DDIM_SCHEDULER, **DDIM_KEYS}
"""Scheduler config of an architecture without one."""


def load_model(source: str, sample_size: SampleSize | None = None, own: OwnModel | None = None) -> DiffusionModel:
    """Load a full-precision model, with weights from safetensors alone.

    Args:
        source: `embedded:NAME`, a local folder in diffusers' layout, a hub id, or `module:NAME`.
        sample_size: height and width of x_t; None for the model's own.
        own: the module of the user's own that `module:NAME` names.

    Raises:
        ModelError: there is no such model, it is damaged, its denoiser's class is not supported, or it does not take
            this size.
    """
    if source.startswith(OWN):
        if own is None:
            raise ModelError(
                f"model.source: got {source!r}, a module of the user's own; allowed with --module FILE.py:FUNCTION, or "
                "with run(policy, model=...) from Python"
            )
        if sample_size is not None:
            raise ModelError(f"model.sample_size: got {sample_size}; allowed null: {source} has its own")
        return _load_own(own)
    if source.startswith(EMBEDDED):
        with embedded_folder(source) as folder:
            return _load_folder(folder, source, sample_size)
    if (path := local(source)) is None:
        note = f" (the hub's {source} has none, or its local copy is incomplete)"
        return _load_folder(downloaded_pipeline(source), source, sample_size, note)
    if path.is_file():
        check_no_single_file(path)
        raise ModelError(
            f"{path}: got a file, which holds no weights; allowed a folder in diffusers' layout, or a hub id"
        )
    return _load_folder(path, source, sample_size)


def folder_shapes(folder: Path, source: str, sample_size: SampleSize | None = None) -> DiffusionModel:
    """Return the model of a folder in diffusers' layout with shapes in place of weights, which are not read.

    Raises:
        ModelError: a config is missing or cannot be used, or the pipeline has parts or inputs that are not supported.
    """
    check_no_single_file(folder)
    index, part = read_index(folder), denoiser_folder(folder)
    where = part / CONFIG
    config, beside = read_json(where, NO_CONFIG), scheduler_file(folder)
    alone = not index and not beside.exists() and not has_weights(part, STEM)
    # A local config without weights and index is an architecture, which needs no scheduler. For a hub id, no weights
    # are downloaded yet.
    alone = alone and local(source) is not None
    scheduler = DEFAULT_SCHEDULER if alone else read_json(beside, LAYOUT)
    check_index(folder, index, known_family(config, str(where)).name)
    shapes = shapes_of_configs(config, scheduler, source, sample_size, where=str(where), beside=str(beside))
    return replace(shapes, folder=folder, decoder=any(part_class(index, name) for name in DECODERS))


def shapes_of_configs(
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    source: str,
    sample_size: SampleSize | None = None,
    *,
    where: str | None = None,
    beside: str = "scheduler config",
) -> DiffusionModel:
    """Return the model that configs describe, with a denoiser of shapes alone, on torch's meta device.

    The denoiser is called, to see that it works, unless one of the same config was called in this process.

    Args:
        config: config of the denoiser.
        scheduler: config of its scheduler.
        source: the value of `model.source` that names the model.
        sample_size: as for `load_model`.
        where: place of the denoiser's config, for messages; by default the source.
        beside: place of the scheduler's config, for messages.

    Raises:
        ModelError: a class is not supported, or diffusers cannot build a working denoiser from the config.
    """
    where = where or source
    scheduler_class(scheduler, beside)  # first, since an unsupported kind of model is best recognized by its scheduler
    with bounded_build(where), silent("diffusers"):
        denoiser = untrained_denoiser(config, where, sample_size)
    denoiser.to("meta")  # Buffers made with numpy are still on the CPU.
    if (family := family_of(denoiser)) is not OWN_MODULE:
        scheduler = family.scheduler(scheduler, family.sample_shape(cast(Any, denoiser).config)[1:], beside)
    noise_schedule(scheduler, beside)
    model = DiffusionModel(denoiser, dict(scheduler), source, "")
    try:
        try_call(lambda: predict(denoiser, *model.example), config, sample_size)
    except Exception as error:  # diffusers and torch raise many kinds of exceptions on sizes that do not fit together
        raise ModelError(
            f"{where}: got a config whose {type(denoiser).__name__} fails when it is called ({str(error)[:1000]}); "
            "allowed the config of a working one"
        ) from error
    return model


def untrained_denoiser(config: Mapping[str, Any], where: str, sample_size: SampleSize | None = None) -> nn.Module:
    """Build the denoiser of a config, before its weights are loaded.

    Raises:
        ModelError: its class is not supported, diffusers refuses the config, or the denoiser does not take this size.
    """
    family = known_family(config, where)
    full = checked_config(family, config, where, sample_size)
    size = full["sample_size"]
    written = {key: value for key, value in config.items() if key != "_use_default_values"}
    if isinstance(size, list) and "pos_embed_max_size" in full:  # its table of position embeddings is a square
        written["sample_size"] = max(size)
    try:
        denoiser: Any = class_of(family.name).from_config(written)
    except ModelError:
        raise
    except Exception as error:  # diffusers raises many kinds of exceptions on a config that it cannot use
        raise ModelError(
            f"{where}: got a config that diffusers cannot build ({str(error)[:1000]}); allowed that of a {family.name}"
        ) from error
    if (
        sample_size is not None
        or config.get("sample_size") is None
        or written.get("sample_size") != config["sample_size"]
    ):
        denoiser.register_to_config(sample_size=size)
    return _without_label_dropout(denoiser).eval()


def _load_folder(folder: Path, source: str, sample_size: SampleSize | None, note: str = "") -> DiffusionModel:
    """Load the model of a folder; `note` ends the message where there are no weights."""
    shapes, part = folder_shapes(folder, source, sample_size), denoiser_folder(folder)
    stored = fitting(stored_tensors(weight_files(part, STEM, note)), shapes.denoiser)
    with no_init_weights():
        denoiser = untrained_denoiser(read_json(part / CONFIG), str(part / CONFIG), sample_size)
    load_weights(denoiser, stored)
    return replace(_model(denoiser, shapes.scheduler_config, source), folder=folder, decoder=shapes.decoder)


def _without_label_dropout(denoiser: nn.Module) -> nn.Module:
    """Keep class labels from being dropped at random in training, since targets were recorded with their labels."""
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return denoiser


def _load_own(own: OwnModel) -> DiffusionModel:
    denoiser = built(own)
    noise_schedule(own.scheduler, f"{own.source}: scheduler_config")
    return _model(denoiser, own.scheduler, own.source, own)


def _model(denoiser: Any, scheduler: dict[str, Any], source: str, own: OwnModel | None = None) -> DiffusionModel:
    denoiser = denoiser.float().eval()
    described = (
        {"sample_shape": own.sample_shape, "conditions": [str(wanted) for wanted in own.conditions]}
        if own
        else denoiser.config
    )
    configs = [
        {key: value for key, value in part.items() if not key.startswith("_")} for part in (described, scheduler)
    ]
    if scheduler["_class_name"] not in (DDIM_SCHEDULER, FLOW_SCHEDULER):
        configs.append({"scheduler": scheduler["_class_name"]})  # the class decides the defaults of missing keys
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())  # without paths and versions
    for name, value in sorted(denoiser.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return DiffusionModel(denoiser, scheduler, source, digest.hexdigest(), own)


def save_model(denoiser: nn.Module, scheduler_config: Mapping[str, Any], folder: Path) -> None:
    """Write a denoiser and its scheduler as a pipeline folder in diffusers' layout: model_index.json, unet/ or
    transformer/, and scheduler/.
    """
    family = family_of(denoiser)
    part = folder / family.part
    if family is not OWN_MODULE:
        cast(Any, denoiser).save_pretrained(part, safe_serialization=True)
        config = read_json(part / CONFIG)
        config.pop("_name_or_path", None)  # the path that it was once loaded from
    else:
        config = {"_class_name": f"{OWN}{type(denoiser).__name__}"}
        part.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().clone().contiguous() for name, value in denoiser.state_dict().items()}, part / WEIGHTS
        )
    write_json(part / CONFIG, config)
    write_json(folder / SCHEDULER_CONFIG, scheduler_config)
    write_json(folder / INDEX, model_index(denoiser, scheduler_config))


def model_index(denoiser: nn.Module, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return diffusers' index of a pipeline, which names the class of each part.

    A denoiser and a scheduler are a whole pipeline only where the denoiser takes no conditions.
    """
    family = family_of(denoiser)
    known = family is not OWN_MODULE
    conditional = known and family.conditions(cast(Any, denoiser).config)
    return {
        "_class_name": PIPELINE_ROOT if conditional else family.alone,
        "scheduler": ["diffusers", scheduler_config["_class_name"]],
        family.part: ["diffusers", family.name] if known else [None, None],
    }
