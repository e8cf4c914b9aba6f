"""The diffusers config of a denoiser, checked before anything is built of it: its family, its values, its size.

Not here: what is known of each family (families/), loading a denoiser, or calling it (denoiser.py).
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
"""Height and width of x_t; one number where they are alike."""


def known_family(config: Config, where: str) -> Family:
    """The family of a diffusers config; `where` is its file.

    Raises:
        ModelError: a class, or a variant of it, that cannot be taken.
    """
    family = configured_family(config)
    if family is None:
        raise ModelError(
            f"{where}: _class_name: got {shown(config.get('_class_name'))}; allowed {', '.join(families())}"
        )
    return family


def checked_config(family: Family, config: Config, where: str, sample_size: SampleSize | None = None) -> dict[str, Any]:
    """A diffusers config with every default of its class, and the height and width of x_t: those asked for, or its own.

    Raises:
        ModelError: a value that the class cannot be built with, or that asks for what we do not give; a size that it
            does not take.
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
        raise ModelError(f"model.{fault}" if of_policy else f"{where}: {fault} ({family.name})")
    return full
