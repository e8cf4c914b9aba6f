"""The table of model families: the FAMILY of every file in this folder, found by the names of diffusers' classes.

Not here: facts about a family (its own file), or checks of its configs (models/denoiser_config.py).
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from pqcad_qat.models import families as folder
from pqcad_qat.models.families.family import DENOISER_FOLDERS, Family, Pipeline
from pqcad_qat.models.families.plain_module import OWN_MODULE
from pqcad_qat.models.families.prompt_layouts import PromptLayout

FORMER_CLASS = "Transformer2DModel"
"""Older class that once held DiT and PixArt; configs on the hub still name it."""

OF_PICTURES = re.compile("Control|Adapter|Kontext|Pix2Pix|Upscal|Depth|Redux|Refiner")
"""Pattern in the names of pipelines whose denoisers read an image beside the noisy sample. They are not supported."""


@cache
def families() -> Mapping[str, Family]:
    """Return the families by diffusers' class of the denoiser.

    UNets come first, and within each kind, families with fewer pipelines come first.
    """
    modules = (import_module(f"{folder.__name__}.{entry.name}") for entry in pkgutil.iter_modules(folder.__path__))
    known = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    order = sorted(known, key=lambda family: (DENOISER_FOLDERS.index(family.part), len(family.pipelines)))
    return {family.name: family for family in order}


def family_named(name: str) -> Family:
    """Return the family of a diffusers class; OWN_MODULE for any other name."""
    return families().get(name, OWN_MODULE)


def family_of(denoiser: Any) -> Family:
    """Return the family of a denoiser, also through a data-parallel wrapper; OWN_MODULE for a plain module."""
    wrapped = type(denoiser).__name__ == "DistributedDataParallel"
    return family_named(type(denoiser.module if wrapped else denoiser).__name__)


def configured_family(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a diffusers config; None where its class is not known."""
    if config.get("_class_name") == FORMER_CLASS:
        norm = str(config.get("norm_type"))
        return next((family for family in families().values() if family.former == norm), None)
    return families().get(str(config.get("_class_name")))


def pipelines() -> Mapping[str, Pipeline]:
    """Return the supported pipelines by diffusers' class."""
    return {pipeline.name: pipeline for family in families().values() for pipeline in family.pipelines}


def prompt_layouts() -> Mapping[str, PromptLayout]:
    """Return the prompt layouts by diffusers' class, for pipelines that take prompts."""
    return {name: pipeline.prompts for name, pipeline in pipelines().items() if pipeline.prompts is not None}
