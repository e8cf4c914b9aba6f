"""Plain torch modules of the user's own: told to us by a program before it runs a policy, and found by name.

Not here: diffusers' classes (architectures.py). A policy file only names what a program registered; no file makes us import anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pqcad_qat.diffusion.architectures import ConditionInput
from pqcad_qat.errors import ModelError

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
    conditions: tuple[ConditionInput, ...] = (),
) -> None:
    """Make `registered:NAME` a source of models in this process.

    Args:
        name: a later registration of the same name takes its place.
        build: makes the module with its trained weights. It is called as `module(x_t, t, **condition)`, x_t (B, C, H, W) float32,
            t (B,) int64, and returns the prediction (B, C, H, W), or a tuple that begins with it.
        sample_shape: (C, H, W) of x_t.
        scheduler_config: in diffusers' names: num_train_timesteps, beta_schedule, prediction_type, ...
        conditions: what it takes beside x_t and t, by the names of its keyword arguments.
    """
    _KNOWN[name] = RegisteredDenoiser(build, sample_shape, dict(scheduler_config), conditions)


def registered(source: str) -> tuple[RegisteredDenoiser, nn.Module]:
    """What was told of `registered:NAME`, and its module, newly built.

    Raises:
        ModelError: nothing was registered by that name in this process, or what was builds no module.
    """
    found = _KNOWN.get(source.removeprefix(REGISTERED))
    if found is None:
        known = ", ".join(REGISTERED + name for name in _KNOWN) or "none so far"
        raise ModelError(f"model.source: got {source!r}; registered in this process: {known} (register_denoiser, before the run)")
    module = found.build()
    if not isinstance(module, nn.Module):
        raise ModelError(f"{source}: its build function returned {type(module).__name__}; allowed a torch.nn.Module")
    module.registered_as = source  # type: ignore[assignment]
    return found, module


def registered_as(module: nn.Module) -> str:
    """The source of a module that `registered` built."""
    return str(getattr(module, "registered_as", f"{REGISTERED}{type(module).__name__}"))
