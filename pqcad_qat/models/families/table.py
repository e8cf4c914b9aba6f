"""The table of model families: every file of this folder that has a FAMILY, found by the names of diffusers' classes.

Not here: what is known of a family (its own file), or whether a config of it is sound (denoiser_config.py).
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
from pqcad_qat.models.families.own_module import OWN_MODULE
from pqcad_qat.models.families.prompt_layouts import PromptLayout

FORMER_CLASS = "Transformer2DModel"
"""The older class of which DiT and PixArt were kinds: configs on the hub still name it."""

OF_PICTURES = re.compile("Control|Adapter|Kontext|Pix2Pix|Upscal|Depth|Redux|Refiner")
"""What the names of pipelines have whose denoisers read a picture beside the noisy sample: these are not taken."""


@cache
def families() -> Mapping[str, Family]:
    """diffusers' class of a denoiser -> its family; UNets first, and families of fewer pipelines first."""
    modules = (import_module(f"{folder.__name__}.{entry.name}") for entry in pkgutil.iter_modules(folder.__path__))
    known = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    order = sorted(known, key=lambda family: (DENOISER_FOLDERS.index(family.part), len(family.pipelines)))
    return {family.name: family for family in order}


def family_named(name: str) -> Family:
    """The family of diffusers' class of that name; OWN_MODULE for any other class."""
    return families().get(name, OWN_MODULE)


def family_of(denoiser: Any) -> Family:
    """The family of a denoiser, also of one that is wrapped for several processes; OWN_MODULE for a plain module."""
    wrapped = type(denoiser).__name__ == "DistributedDataParallel"
    return family_named(type(denoiser.module if wrapped else denoiser).__name__)


def configured_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a diffusers config; None where its class is not known."""
    if config.get("_class_name") == FORMER_CLASS:
        norm = str(config.get("norm_type"))
        return next((family for family in families().values() if family.former == norm), None)
    return families().get(str(config.get("_class_name")))


def pipelines() -> Mapping[str, Pipeline]:
    """diffusers' class of a pipeline -> what is known of it."""
    return {pipeline.name: pipeline for family in families().values() for pipeline in family.pipelines}


def prompt_layouts() -> Mapping[str, PromptLayout]:
    """diffusers' class of a pipeline that takes prompts -> what it makes of them."""
    return {name: pipeline.prompts for name, pipeline in pipelines().items() if pipeline.prompts is not None}
