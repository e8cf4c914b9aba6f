"""Denoisers that are plain torch modules written by the user: how they are described, built and loaded from a Python
file.

Not here: diffusers' classes (families/). Policies never name a code file: it is passed to `run` from Python or on the
command line.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from pqcad_qat.errors import ModelError, PqcadError, UsageError, shortened
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.module_preparation import one_line, plain_module
from pqcad_qat.policy.sections import known_keys
from pqcad_qat.sampling.schedulers import DDIM_SCHEDULER, defaults_taken

OWN = "module:"
"""Prefix of `model.source` where the model is a module of the user's own."""


@dataclass(frozen=True)
class OwnModel:
    """A module of the user's own, with the facts that diffusers' configs give about other models.

    Attributes:
        name: name of the model; the run's `model.source` is `module:NAME`.
        build: function that makes the module with its trained weights. The module is called as `module(x_t, t,
            **condition)`, with x_t (B, C, H, W) float32 and t (B,) int64, or float32 for flow matching. It returns the
            prediction (B, C, H, W), a tuple or list that begins with it, or an object with a key or attribute `sample`.
        sample_shape: shape (C, H, W) of x_t.
        scheduler_config: values in diffusers' names, such as num_train_timesteps, beta_schedule and prediction_type.
            The class is DDIMScheduler, unless _class_name says another.
        conditions: the tensors that the module takes beside x_t and t, named as its keyword arguments.
    """

    name: str
    build: Callable[[], nn.Module]
    sample_shape: tuple[int, int, int]
    scheduler_config: Mapping[str, Any]
    conditions: tuple[ConditionInput, ...] = field(default=(), kw_only=True)

    @property
    def source(self) -> str:
        """The value of `model.source` that stands for this module."""
        return f"{OWN}{self.name}"

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config together with its class."""
        return {"_class_name": DDIM_SCHEDULER, **self.scheduler_config}


def built(own: OwnModel) -> nn.Module:
    """Build the module anew, and return it as `plain_module` prepares it.

    Raises:
        ModelError: building fails, the result is not a module, or the declared shapes are invalid.
    """
    _check_shapes(own)
    _check_schedule(own)
    try:
        module = own.build()
    except PqcadError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"{own.source}: got {one_line(error)} from its build function; allowed a torch.nn.Module"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{own.source}: got {type(module).__name__} from its build function; allowed a torch.nn.Module"
        )
    return plain_module(module, own.source)


def schedule_notes(source: str, scheduler_config: Mapping[str, Any]) -> Iterator[str]:
    """Say which keys the scheduler config of a module leaves to diffusers' defaults.

    No check can see that a schedule is not the one that the module was trained with: its images are wrong, no more.
    """
    if taken := defaults_taken(scheduler_config, source):
        values = ", ".join(f"{key} {str(value).lower()}" for key, value in taken.items())
        yield (
            f"{source}: scheduler_config leaves keys to diffusers' defaults: {values}; give the values that the "
            "module was trained with"
        )


def own_model_of(text: str, flag: str = "--module") -> OwnModel:
    """Return the OwnModel that the function named by FILE.py:FUNCTION returns.

    The file is executed, with its folder on Python's import path.

    Raises:
        UsageError: the text has another form, the file or function is missing or fails, or the function returns
            something else.
    """
    name, _, function = text.rpartition(":")
    path = Path(name)
    if not (path.suffix == ".py" and function.isidentifier()):
        raise UsageError(f"{flag}: got {shortened(text)!r}; allowed FILE.py:FUNCTION")
    if not path.is_file():
        raise UsageError(f"{flag}: got {shortened(name)!r}, where no file is; allowed a Python file")
    spec = spec_from_file_location(f"own_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    file = module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as Python does for a script, so that it can import its neighbours
    sys.modules[spec.name] = file  # dataclasses and pickle look modules up here
    try:
        spec.loader.exec_module(file)
        maker = getattr(file, function, None)
        own = maker() if callable(maker) and not isinstance(maker, nn.Module) else maker
    except PqcadError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"{flag}: got {one_line(error)} from {shortened(text)}; allowed an OwnModel") from error
    if maker is None:
        raise UsageError(f"{flag}: got {shortened(function)!r}, which {path.name} does not define; allowed a function")
    if not isinstance(own, OwnModel):
        raise UsageError(
            f"{flag}: got {type(own).__name__} from {shortened(text)}; allowed a function that returns an OwnModel"
        )
    return own


def _check_shapes(own: OwnModel) -> None:
    shape = own.sample_shape
    if not isinstance(shape, tuple | list) or len(shape) != 3 or not all(_size(size) for size in shape):
        raise ModelError(f"{own.source}: sample_shape: got {shape!r}; allowed (C, H, W), three whole numbers above 0")
    for wanted in own.conditions:
        if not isinstance(wanted, ConditionInput):
            raise ModelError(f"{own.source}: conditions: got {wanted!r}; allowed ConditionInput(name, shape, dtype)")
        if not all(size is None or _size(size) for size in wanted.shape):
            raise ModelError(
                f"{own.source}: conditions: {wanted.name}: got shape {wanted.shape}; allowed whole numbers above 0, or "
                "None"
            )


def _check_schedule(own: OwnModel) -> None:
    """Refuse a key that diffusers' scheduler would ignore, such as a misspelt one. A class that is no scheduler of
    diffusers' is refused elsewhere.
    """
    name = str(own.scheduler["_class_name"])
    if (scheduler := getattr(diffusers, name, None)) is None:
        return
    known = inspect.signature(scheduler).parameters
    for key in own.scheduler_config:
        if key not in known and not key.startswith("_"):
            allowed = known_keys(list(known), key)
            raise ModelError(
                f"{own.source}: scheduler_config: got {shortened(key)!r}; allowed keys of {name}: {allowed}"
            )


def _size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0
