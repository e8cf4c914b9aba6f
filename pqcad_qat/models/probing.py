"""Probe calls of a user's module on noise: whether it predicts as a denoiser must, and which of its layers read
constants.

Not here: what is repaired when the module is built (module_preparation.py), or whether it can be deployed
(export/trial_export.py).
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pqcad_qat.errors import ModelError, PqcadError
from pqcad_qat.models.denoiser import DenoiserInput, DiffusionModel, predict
from pqcad_qat.models.module_preparation import one_line
from pqcad_qat.models.untrained import noise_inputs
from pqcad_qat.models.watched_layers import watched_inputs
from pqcad_qat.sampling.trajectory import noise_schedule

PROBES = 6
"""Number of noise states on which the module is called one by one; their timesteps are spread over the whole schedule.
"""

SAME = 1e-3
"""Largest difference allowed between two calls, as a fraction of the prediction's largest value. Sums may be added in
another order.
"""

DECISIONS = tuple(
    getattr(Tensor, name)
    for name in ("__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "numpy")
)
"""Tensor methods that turn values into Python numbers. A traced graph keeps the numbers of the traced call."""


def probe_states(model: DiffusionModel, count: int = PROBES) -> DenoiserInput:
    """Return noise inputs whose timesteps have the dtype of the model's schedule."""
    x, t, condition = noise_inputs(model, count)
    return x, t.to(getattr(torch, noise_schedule(model.scheduler_config).timestep_dtype)), condition


def check_predictions(model: DiffusionModel) -> None:
    """Call a user's module on noise as a run will, and check its predictions.

    Raises:
        ModelError: the module raises, returns no valid prediction, predicts differently at a second call or beside
            other states, overwrites its inputs, or branches on tensor values, which no graph does.
    """
    states = probe_states(model)
    denoiser, source, count = model.denoiser, model.source, len(states[0])
    # The first checks call the module on all states at once: shape and dtype, inputs left as they were, and the same
    # result twice.
    inputs = _copied(states)
    whole = _called(denoiser, inputs, source)
    _check_output(whole, states[0], source)
    for name, before, after in zip(("x_t", "t", *states[2]), _tensors(states), _tensors(inputs), strict=True):
        if not torch.equal(before, after):
            raise ModelError(
                f"{source}: {name}: got other values after a call, which wrote over them; allowed calls that leave "
                "their inputs as they are"
            )
    if _differ(whole, _called(denoiser, _copied(states), source)):
        raise ModelError(
            f"{source}: got another prediction when it was called again; allowed one prediction of one state, "
            "without randomness"
        )
    # The module is then called on one state at a time. A branch that depends on tensor values shows as a different
    # record of values converted to Python. States that mix within a batch show as predictions that differ from those
    # above.
    decisions = [_Decisions() for _ in range(count)]
    alone = []
    for place, watch in enumerate(decisions):
        with watch:
            alone.append(_called(denoiser, one_state(states, place), source))
    for first, *later in zip_longest(*(watch.seen for watch in decisions)):
        if any(decision != first for decision in later):
            where = next(decision[0] for decision in (first, *later) if decision)
            raise ModelError(
                f"{source}: got a decision by a value of its inputs ({where}), which no graph can make; allowed tensor "
                "operations, such as torch.where"
            )
    if _differ(whole, torch.cat(alone)):
        raise ModelError(
            f"{source}: got a prediction that depends on the other states of its batch; allowed states that do not mix"
        )


def constant_readers(network: nn.Module, layers: Mapping[str, nn.Module], states: DenoiserInput) -> tuple[str, ...]:
    """Return the layers whose input is the same for every network input, so that their output is a constant of the
    graph.

    The network is called on one state at a time, and digests of each layer's inputs are compared between the calls.

    Args:
        network: the network, as `predict` calls it.
        layers: the layers to look at, by path.
        states: states on which the network is called one by one.
    """
    read: dict[str, list[list[str]]] = {name: [] for name in layers}

    def note(name: str, tensor: Tensor) -> None:
        read[name][-1].append(_digest(tensor))

    with watched_inputs((layer, partial(note, name)) for name, layer in layers.items()), torch.no_grad():
        for place in range(len(states[0])):
            for calls in read.values():
                calls.append([])
            predict(network, *one_state(states, place))
    return tuple(name for name, (first, *later) in read.items() if first and all(calls == first for calls in later))


def one_state(states: DenoiserInput, place: int) -> DenoiserInput:
    """Return a batch that holds only the state at `place`."""
    x, t, condition = states
    return (
        x[place : place + 1],
        t[place : place + 1],
        {name: value[place : place + 1] for name, value in condition.items()},
    )


def _digest(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()}"


def _differ(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() > SAME * first.abs().max())


def _copied(states: DenoiserInput) -> DenoiserInput:
    x, t, condition = states
    return x.clone(), t.clone(), {name: value.clone() for name, value in condition.items()}


def _tensors(states: DenoiserInput) -> Iterable[Tensor]:
    return states[0], states[1], *states[2].values()


def _called(denoiser: nn.Module, states: DenoiserInput, source: str) -> Tensor:
    try:
        with torch.no_grad():
            return predict(denoiser, *states).clone()
    except PqcadError as error:
        raise ModelError(f"{source}: {error}") from error
    except Exception as error:  # the user's code may raise anything
        x, t, condition = states
        named = {"x_t": x, "t": t, **condition}
        words = ", ".join(
            f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for name, value in named.items()
        )
        raise ModelError(f"{source}: got {one_line(error)} from a call with {words}; allowed a prediction") from error


def _check_output(prediction: Tensor, x: Tensor, source: str) -> None:
    got, allowed = tuple(prediction.shape), tuple(x.shape)
    if got != allowed:
        raise ModelError(
            f"{source}: got a tensor {got} for x_t {allowed}; allowed {allowed}, or more channels, which are cut off"
        )
    if prediction.dtype != torch.float32:
        raise ModelError(f"{source}: got a tensor of {prediction.dtype}; allowed torch.float32, as x_t")
    if not bool(prediction.isfinite().all()):
        raise ModelError(f"{source}: got NaN or infinity for noise; allowed finite numbers")


class _Decisions(TorchFunctionMode):
    """Record every tensor value that is converted to Python, with the line of code that converts it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in DECISIONS:
            self.seen.append((_place(), repr(result)))
        return result


def _place() -> str:
    """Return the line being run, leaving out frames of torch and of this file."""
    torchs = Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename != __file__ and torchs not in Path(frame.filename).parents
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
