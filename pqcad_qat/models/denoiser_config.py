"""Checks of a denoiser's diffusers config before the denoiser is built: its family, its values, and the size of x_t.

Not here: facts about each family (families/), loading a denoiser (model_loading.py), or calling it (denoiser.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import shown
from pqcad_qat.models.config_values import check_values, with_defaults
from pqcad_qat.models.families.config_faults import channels, sides_of
from pqcad_qat.models.families.family import Family
from pqcad_qat.models.families.table import configured_family, families

Config = Mapping[str, Any]

SampleSize = int | tuple[int, ...]
"""Height and width of x_t, or one number where the two are equal."""


def known_family(config: Config, where: str) -> Family:
    """Return the family of a diffusers config; `where` names the config's file in messages.

    Raises:
        ModelError: the class, or this kind of it, is not supported.
    """
    family = configured_family(config)
    if family is None:
        raise ModelError(
            f"{where}: _class_name: got {shown(config.get('_class_name'))}; allowed {', '.join(families())}"
        )
    return family


def checked_config(family: Family, config: Config, where: str, sample_size: SampleSize | None = None) -> dict[str, Any]:
    """Return a diffusers config with its class's defaults filled in, and with the height and width of x_t.

    The height and width are those asked for, or else the config's own.

    Raises:
        ModelError: a value does not fit the class or asks for an unsupported feature, or the size does not fit the
            class.
    """
    check_values(family.name, config, where)
    if sample_size is not None and not family.resizable:
        raise ModelError(f"model.sample_size: got {shown(sample_size)}; allowed null: {family.name} keeps its own")
    full = with_defaults(family.name, config)
    sides = sides_of({"sample_size": sample_size or full.get("sample_size") or family.default_size})
    if sides is None:
        raise ModelError(
            f"{where}: sample_size: got null; allowed the height and width of x_t, for which the model is exported"
        )
    full["sample_size"] = sides[0] if sides[0] == sides[1] else list(sides)
    if (fault := next(chain(family.faults(full), channels(full)), None)) is not None:
        of_policy = sample_size is not None and fault.startswith("sample_size")
        message = f"model.{fault}" if of_policy else f"{where}: {fault} ({family.name})"
        raise ModelError(message)
    return full
