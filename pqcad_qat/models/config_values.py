"""Checks of single values in a diffusers config before a module is built: types from the class's signature, and numeric
bounds.

Not here: rules on how the values of one class fit together (families/).
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import diffusers
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import shown

Config = Mapping[str, Any]

LARGEST_SIDE = 2048
"""Largest height or width of x_t, in pixels or latents."""

MOST_LAYERS = 64
"""Largest number of layers of one kind in one block, and largest length of a list in a config."""

WHOLE, REAL = (1, 2**20), (-1e6, 1e6)
"""Default bounds, lowest and highest, of whole and of real numbers whose key is not in BOUNDS."""

BOUNDS: Mapping[str, tuple[float, float]] = {
    "sample_size": (1, LARGEST_SIDE),
    "pos_embed_max_size": (1, LARGEST_SIDE),
    "patch_size": (1, 64),
    "conv_in_kernel": (1, 63),
    "conv_out_kernel": (1, 63),
    "downsample_padding": (0, 16),
    "freq_shift": (0, 1000),
    "dual_attention_layers": (0, 1000),
    "num_layers": (1, 200),
    "num_single_layers": (0, 200),
    "norm_eps": (0, 1),
    "dropout": (0, 1),
    **dict.fromkeys(
        ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"), (1, MOST_LAYERS)
    ),
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor", "interpolation_scale"), (1e-3, 1e3)),
    **dict.fromkeys(("scaling_factor", "latents_std"), (1e-6, 1e6)),
}
"""Lowest and highest allowed value by key, both included."""

KINDS: Mapping[str, Any] = {
    "freq_shift": float,
    "interpolation_scale": float | None,
    "transformer_layers_per_block": int | tuple,
}
"""Types of keys whose annotation in diffusers is narrower than, or different from, the values that the class takes."""

WITHOUT_EFFECT = (
    "downsample_type",
    "upsample_type",
    "resnet_out_scale_factor",
    "addition_embed_type_num_heads",
    "norm_num_groups",
)
"""Keys that may also be null, either in every class or in classes that do not read them."""

MOST_PARAMETERS, MOST_MODULES = 10**11, 30_000
"""Largest numbers of parameters and of modules of a model. 100 billion parameters are eight times Flux's."""


def class_of(name: str) -> Any:
    """Return the class of diffusers with this name."""
    return getattr(diffusers, name)


def with_defaults(name: str, config: Config) -> dict[str, Any]:
    """Return a config with the class's defaults filled in for missing keys."""
    return {key: default for key, (_, default) in _signature(name).items()} | dict(config)


def check_values(name: str, config: Config, where: str) -> None:
    """Raise ModelError for values that diffusers' class of this name cannot be built with; the message names up to
    eight.

    Keys that the class does not know are ignored, as diffusers ignores them.
    """
    faults = []
    kinds = {key: kind for key, (kind, _) in _signature(name).items()}
    # Only a class that annotates `sample_size` as int, and keeps no larger table of positions, takes one side alone.
    if kinds.get("sample_size") is not int or "pos_embed_max_size" in kinds:
        kinds["sample_size"] = SIZE
    for key, kind in kinds.items():
        if key in config and not (fits(config[key], kind, key) or (config[key] is None and key in WITHOUT_EFFECT)):
            faults.append(f"{key}: got {shown(config[key])}; allowed {_described(kind, key)}")
    if config.get("quantization_config") is not None:
        faults.append(
            "quantization_config: got weights that are quantized already; allowed null: full precision "
            "is what is quantized here"
        )
    if faults:
        raise ModelError("\n".join(f"{where}: {fault}" for fault in faults[:8]))


SIZE = int | tuple[int, int] | None
"""Type of `sample_size`, the size of x_t: one side, a pair of height and width, or null for the class's own default."""


def fits(value: Any, kind: Any, key: str) -> bool:
    """Return whether a value matches a type annotation and its numbers lie within the bounds of its key."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, part, key) for part in get_args(kind))
    if kind is NoneType:
        return value is None
    if kind is bool:
        return value is None or isinstance(value, bool)  # diffusers treats null as false
    if kind in (int, float):
        low, high = BOUNDS.get(key, WHOLE if kind is int else REAL)
        numeric = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return numeric and low <= value <= high  # the comparison is false for NaN
    if kind is tuple or get_origin(kind) is tuple:
        return _fits_list(value, get_args(kind), key)
    return isinstance(value, kind)


def _fits_list(value: Any, entry_kinds: tuple[Any, ...], key: str) -> bool:
    """Return whether a value is a list whose entries all fit, with two entries for `sample_size`."""
    if not isinstance(value, list | tuple) or len(value) > MOST_LAYERS:
        return False
    if key == "sample_size" and len(value) != 2:
        return False
    kind = entry_kinds[0] if entry_kinds else int | tuple[int, ...]
    return all(fits(entry, kind, key) for entry in value)


def _described(kind: Any, key: str) -> str:
    """Return a type with its key's bounds in words, for messages."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_described(part, key) for part in get_args(kind))
    if kind is tuple or get_origin(kind) is tuple:
        if key == "sample_size":
            return "[height, width]"
        return f"a list of which each is {_described(get_args(kind)[0] if get_args(kind) else int, key)}"
    if kind in (int, float):
        low, high = BOUNDS.get(key, WHOLE if kind is int else REAL)
        least, most = (f"{bound:.0f}" if bound == int(bound) else f"{bound:g}" for bound in (low, high))
        return f"a {'whole ' if kind is int else ''}number from {least} to {most}"
    return {NoneType: "null", bool: "true or false", str: "text"}.get(kind, str(kind))


@cache
def _signature(name: str) -> dict[str, tuple[Any, Any]]:
    """Return key -> (type, default) for every argument of the class's constructor."""
    build = inspect.unwrap(class_of(name).__init__)
    hints = get_type_hints(build)
    parameters = {key: known for key, known in inspect.signature(build).parameters.items() if key != "self"}
    return {
        key: (KINDS.get(key, hints.get(key, type(known.default))), known.default) for key, known in parameters.items()
    }


@contextmanager
def bounded_build(where: str) -> Iterator[None]:
    """Build modules on torch's meta device within this context, where they take no memory, and stop a build that grows
    too large.

    Hooks count parameters and modules as they are registered, so an oversized build stops before it ends.

    Raises:
        ModelError: there are more parameters or modules than MOST_PARAMETERS and MOST_MODULES.
    """
    counts: dict[Literal["parameters", "modules"], int] = {"parameters": 0, "modules": 0}

    def count(kind: Literal["parameters", "modules"], more: int, most: int) -> None:
        counts[kind] += more
        if counts[kind] > most:
            raise ModelError(
                f"{where}: got a config of more than {most:,} {kind}; allowed fewer: are its widths and "
                "numbers of layers right?"
            )

    def parameter(_module: nn.Module, _name: str, value: nn.Parameter | None) -> None:
        count("parameters", 0 if value is None else math.prod(value.shape), MOST_PARAMETERS)

    def module(_module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        count("modules", 1, MOST_MODULES)

    # These hooks are global to torch and see every module under construction, so they are removed at the end.
    hooks = register_module_parameter_registration_hook(parameter), register_module_module_registration_hook(module)
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def silent(library: str) -> Iterator[None]:
    """Let a library log only errors within this context.

    Without it, diffusers repeats its warnings about unknown keys when weights are loaded.
    """
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
