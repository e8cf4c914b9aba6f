"""A denoiser that is a plain torch module of the user's own: what a program says of it, or a function in a file of
theirs.

Not here: diffusers' classes (families/). No policy names a file of code: it is given to `run` from Python, or on
the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from torch import nn

from pqcad_qat.errors import ModelError, PqcadError, UsageError, shortened
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.own_modules import one_line, plain_module
from pqcad_qat.sampling.schedulers import DDIM_SCHEDULER

OWN = "module:"
"""What `model.source` begins with where the model is a module of the user's own."""


@dataclass(frozen=True)
class OwnModel:
    """A module of the user's own, and what diffusers' configs say of others.

    Attributes:
        name: the run's `model.source` is `module:NAME`.
        build: makes the module with its trained weights. It is called as `module(x_t, t, **condition)`, x_t (B, C, H,
            W) float32, t (B,) int64, or float32 of flow matching, and returns the prediction (B, C, H, W); or a tuple
            or list that begins with it, or what has it as `sample`, a dictionary's key or an attribute.
        sample_shape: (C, H, W) of x_t.
        scheduler_config: in diffusers' names: num_train_timesteps, beta_schedule, prediction_type, ...; of a
            DDIMScheduler, unless its _class_name says another.
        conditions: what it takes beside x_t and t, by the names of its keyword arguments.
    """

    name: str
    build: Callable[[], nn.Module]
    sample_shape: tuple[int, int, int]
    scheduler_config: Mapping[str, Any]
    conditions: tuple[ConditionInput, ...] = field(default=(), kw_only=True)

    @property
    def source(self) -> str:
        return f"{OWN}{self.name}"

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config with its class."""
        return {"_class_name": DDIM_SCHEDULER, **self.scheduler_config}


def built(own: OwnModel) -> nn.Module:
    """The module, newly built, as `plain_module` has it.

    Raises:
        ModelError: it cannot be built, what was built is no module, or its shapes are none.
    """
    _check_shapes(own)
    try:
        module = own.build()
    except PqcadError:
        raise
    except Exception as error:  # whatever code of the user's own raises
        raise ModelError(f"{own.source}: its build function failed: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{own.source}: its build function returned {type(module).__name__}; allowed a torch.nn.Module"
        )
    return plain_module(module, own.source)


def own_model_of(text: str, flag: str = "--module") -> OwnModel:
    """What the function returns that FILE.py:FUNCTION names; the file is run, with its folder on Python's path.

    Raises:
        UsageError: another form, no such file or function, a file or function that fails, or that returns something
            else.
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
    sys.path.insert(0, str(path.resolve().parent))  # as of a script, which imports what lies beside it
    sys.modules[spec.name] = file  # where dataclasses and pickle look for what it defines
    try:
        spec.loader.exec_module(file)
        own = getattr(file, function)()
    except PqcadError:
        raise
    except Exception as error:  # whatever code of the user's own raises
        raise UsageError(f"{flag}: {shortened(text)} failed: {one_line(error)}") from error
    if not isinstance(own, OwnModel):
        raise UsageError(f"{flag}: {shortened(text)} returned {type(own).__name__}; allowed an OwnModel")
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


def _size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0
