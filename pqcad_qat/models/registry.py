"""Plain torch modules of the user's own: told to us by a program before it runs a policy, and found by name.

Not here: diffusers' classes (families/). A policy file only names what a program registered; no file makes us
import anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pqcad_qat.errors import ModelError, PqcadError
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.own_modules import one_line, plain_module
from pqcad_qat.sampling.schedulers import DDIM_SCHEDULER

REGISTERED = "registered:"


@dataclass(frozen=True)
class RegisteredDenoiser:
    """What `register_denoiser` was told."""

    build: Callable[[], nn.Module]
    sample_shape: tuple[int, int, int]
    scheduler_config: Mapping[str, Any]
    conditions: tuple[ConditionInput, ...]


_KNOWN: dict[str, RegisteredDenoiser] = {}


def register_denoiser(
    name: str,
    build: Callable[[], nn.Module],
    sample_shape: tuple[int, int, int],
    scheduler_config: Mapping[str, Any],
    *,
    conditions: tuple[ConditionInput, ...] = (),
) -> None:
    """Make `registered:NAME` a source of models in this process.

    Args:
        name: a later registration of the same name takes its place.
        build: makes the module with its trained weights. It is called as `module(x_t, t, **condition)`, x_t (B, C, H,
            W) float32, t (B,) int64, or float32 of flow matching, and returns the prediction (B, C, H, W); or a tuple
            or list that begins with it, or what has it as `sample`, a dictionary's key or an attribute.
        sample_shape: (C, H, W) of x_t.
        scheduler_config: in diffusers' names: num_train_timesteps, beta_schedule, prediction_type, ...; of a
            DDIMScheduler, unless its _class_name says another.
        conditions: what it takes beside x_t and t, by the names of its keyword arguments.
    """
    scheduler = {"_class_name": DDIM_SCHEDULER, **scheduler_config}
    _KNOWN[name] = RegisteredDenoiser(build, sample_shape, scheduler, conditions)


def registered(source: str) -> tuple[RegisteredDenoiser, nn.Module]:
    """What was told of `registered:NAME`, and its module, newly built, as `plain_module` has it.

    Raises:
        ModelError: nothing was registered by that name in this process, what was builds no module, or its shapes are
            none.
    """
    found = _KNOWN.get(source.removeprefix(REGISTERED))
    if found is None:
        known = ", ".join(REGISTERED + name for name in _KNOWN) or "none so far"
        raise ModelError(
            f"model.source: got {source!r}; registered in this process: {known} (register_denoiser, before the run)"
        )
    _check_shapes(source, found)
    try:
        module = found.build()
    except PqcadError:
        raise
    except Exception as error:  # whatever code of the user's own raises
        raise ModelError(f"{source}: its build function failed: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{source}: its build function returned {type(module).__name__}; allowed a torch.nn.Module")
    module = plain_module(module, source)
    module.registered_as = source  # type: ignore[assignment]
    return found, module


def _check_shapes(source: str, told: RegisteredDenoiser) -> None:
    shape = told.sample_shape
    if not isinstance(shape, tuple | list) or len(shape) != 3 or not all(_size(size) for size in shape):
        raise ModelError(f"{source}: sample_shape: got {shape!r}; allowed (C, H, W), three whole numbers above 0")
    for wanted in told.conditions:
        if not isinstance(wanted, ConditionInput):
            raise ModelError(f"{source}: conditions: got {wanted!r}; allowed ConditionInput(name, shape, dtype)")
        if not all(size is None or _size(size) for size in wanted.shape):
            raise ModelError(
                f"{source}: conditions: {wanted.name}: got shape {wanted.shape}; allowed whole numbers above 0, or None"
            )


def _size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def registered_as(module: nn.Module) -> str:
    """The source of a module that `registered` built."""
    return str(getattr(module, "registered_as", f"{REGISTERED}{type(module).__name__}"))
