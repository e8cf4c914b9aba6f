"""The values of a diffusers config, judged before anything is built of it: kinds by the class's own signature, and
bounds on all numbers.

Not here: what the values of one class mean together (families/).
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
"""Of x_t: height or width, in pixels or latents."""

MOST_LAYERS = 64
"""Of one kind in one block."""

WHOLE, REAL = (1, 2**20), (-1e6, 1e6)
"""Bounds of a number whose key stands in no table."""

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

KINDS: Mapping[str, Any] = {
    "freq_shift": float,
    "interpolation_scale": float | None,
    "transformer_layers_per_block": int | tuple,
}
"""Where a signature says less, or other, than the class takes."""

WITHOUT_EFFECT = (
    "downsample_type",
    "upsample_type",
    "resnet_out_scale_factor",
    "addition_embed_type_num_heads",
    "norm_num_groups",
)
"""Keys of which null is taken as well, by every class or by those that do not read them."""

MOST_PARAMETERS, MOST_MODULES = 10**11, 30_000
"""Of a model: 100 billion, eight times Flux's."""


def class_of(name: str) -> Any:
    """diffusers' class of that name."""
    return getattr(diffusers, name)


def with_defaults(name: str, config: Config) -> dict[str, Any]:
    """A config of diffusers' class with every default that it leaves unsaid."""
    return {key: default for key, (_, default) in _signature(name).items()} | dict(config)


def check_values(name: str, config: Config, where: str) -> None:
    """Raise ModelError for a value that diffusers' class of that name cannot be built with; every one is named.

    Keys that the class does not know decide nothing, as in diffusers.
    """
    faults = []
    for key, (kind, _) in _signature(name).items():
        kind = SIZE if key == "sample_size" and (kind is not int or "pos_embed_max_size" in _signature(name)) else kind
        if key in config and not (fits(config[key], kind, key) or (config[key] is None and key in WITHOUT_EFFECT)):
            faults.append(f"{key}: got {shown(config[key])}; allowed {_described(kind, key)}")
    if (
        "sample_size" in config
        and "sample_size" not in _signature(name)
        and not fits(config["sample_size"], SIZE, "sample_size")
    ):
        faults.append(f"sample_size: got {shown(config['sample_size'])}; allowed {_described(SIZE, 'sample_size')}")
    if config.get("quantization_config") is not None:
        faults.append(
            "quantization_config: got weights that are quantized already; allowed null: full precision "
            "is what is quantized here"
        )
    if faults:
        raise ModelError("\n".join(f"{where}: {fault}" for fault in faults[:8]))


SIZE = int | tuple[int, int] | None
"""Of x_t: one side, height and width, or what the class has of its own."""


def fits(value: Any, kind: Any, key: str) -> bool:
    """Whether a value is of a kind as annotations say it, and its numbers within the bounds of its key."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, part, key) for part in get_args(kind))
    if kind is NoneType:
        return value is None
    if kind is bool:
        return value is None or isinstance(value, bool)  # null is false
    if kind in (int, float):
        low, high = BOUNDS.get(key, WHOLE if kind is int else REAL)
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and low <= value <= high  # NaN is not
    if kind is tuple or get_origin(kind) is tuple:
        return _fits_list(value, get_args(kind), key)
    return isinstance(value, kind)


def _fits_list(value: Any, parts: tuple[Any, ...], key: str) -> bool:
    if not isinstance(value, list | tuple) or len(value) > MOST_LAYERS:
        return False
    if key == "sample_size" and len(value) != 2:
        return False
    kind = parts[0] if parts else int | tuple[int, ...]
    return all(fits(part, kind, key) for part in value)


def _described(kind: Any, key: str) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_described(part, key) for part in get_args(kind))
    if kind is tuple or get_origin(kind) is tuple:
        if key == "sample_size":
            return "[height, width]"
        return f"a list of which each is {_described(get_args(kind)[0] if get_args(kind) else int, key)}"
    if kind in (int, float):
        low, high = BOUNDS.get(key, WHOLE if kind is int else REAL)
        return f"a {'whole ' if kind is int else ''}number from {low:g} to {int(high) if high >= 1 else high:g}"
    return {NoneType: "null", bool: "true or false", str: "text"}.get(kind, str(kind))


@cache
def _signature(name: str) -> dict[str, tuple[Any, Any]]:
    """Key -> (kind, default) of everything that the class is built with."""
    build = inspect.unwrap(class_of(name).__init__)
    hints = get_type_hints(build)
    parameters = {key: known for key, known in inspect.signature(build).parameters.items() if key != "self"}
    return {
        key: (KINDS.get(key, hints.get(key, type(known.default))), known.default) for key, known in parameters.items()
    }


@contextmanager
def bounded_build(where: str) -> Iterator[None]:
    """Inside, modules are built on torch's meta device, where they take no memory; one of absurd size is given up while
    it grows.

    Raises:
        ModelError: more parameters or modules than MOST_PARAMETERS and MOST_MODULES.
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

    hooks = register_module_parameter_registration_hook(parameter), register_module_module_registration_hook(module)
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def silent(library: str) -> Iterator[None]:
    """Inside, a library logs errors alone: of keys that a class does not know it says so again when weights are
    loaded.
    """
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
