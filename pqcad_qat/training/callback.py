"""The interface between the training loop and its callbacks: the shared state, and the moments of a training step.

Not here: the loop (trainer.py), nor any callback. A callback never imports the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_qat.models.conditions import CONDITION
from pqcad_qat.training.stage_end import Ending

Batch = Mapping[str, Tensor]
"""The tensors of a batch by name; the first axis counts its states."""

BatchSource = Callable[[int], Batch]
"""A function from the training step to that step's whole batch, over all processes.

It is pure, so that resuming needs no position in the data.
"""


def with_condition(batch: Batch, condition: Mapping[str, Tensor]) -> Batch:
    """The batch with tensors (B, ...) added on which its states are conditioned."""
    return {**batch, **{CONDITION + name: value for name, value in condition.items()}}


def condition_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors (B, ...) on which the states of a batch are conditioned, by name."""
    return {name.removeprefix(CONDITION): value for name, value in batch.items() if name.startswith(CONDITION)}


@dataclass
class TrainState:
    """Everything that training changes; `step` is its only clock.

    Attributes:
        model: module whose Parameters are trained in place.
        optimizer: the optimizer of every trained Parameter.
        network: module that a loss term calls: the model, wrapped for the processes that share the work.
        step: number of finished training steps.
        ema: moving averages of the trained Parameters by name, None without averaging.
        ema_since: training step at which averaging began or last began anew.
        setbacks: number of divergences overcome so far; each has halved the learning rate.
        held_until: training step before which no transition may begin, after a divergence.
        ending: when and why the stage ends, once that is decided; None while the loop's number of steps holds.
        scaler: scales the loss of fp16 so that its gradients are neither 0 nor infinite; None in other precisions.
        frozen: names of the Parameters that this training has frozen (quantization/trained_part.py).
        parameters: the trained Parameters by name, listed once, since they stay the same to the last step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    network: nn.Module
    step: int = 0
    ema: dict[str, Tensor] | None = None
    ema_since: int = 0
    setbacks: int = 0
    held_until: int = 0
    ending: Ending | None = None
    scaler: torch.amp.GradScaler | None = None
    frozen: frozenset[str] = frozenset()
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        named = self.model.named_parameters()
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}

    def restart_ema(self) -> None:
        """Begin averaging anew from the present weights, as after a change of width, which makes another function."""
        if self.ema is not None:
            self.ema = {name: value.detach().clone() for name, value in self.parameters.items()}
            self.ema_since = self.step


@contextmanager
def averaged_weights(state: TrainState) -> Iterator[nn.Module]:
    """The model with its averaged Parameters inside the block, and with its own ones again after it."""
    named = state.parameters
    own = {name: named[name].detach().clone() for name in state.ema or {}}
    with torch.no_grad():
        for name, value in (state.ema or {}).items():
            named[name].copy_(value)
    try:
        yield state.model
    finally:
        with torch.no_grad():
            for name, value in own.items():
                named[name].copy_(value)


@dataclass(frozen=True)
class StepReport:
    """Results of one optimizer step; means are over the whole batch.

    Attributes:
        loss: sum of the terms.
        terms: weighted loss terms by name.
        gradient_norm: norm of the gradients before clipping.
        learning_rate: learning rate of this step.
        samples: number of states in the whole batch.
    """

    loss: float
    terms: dict[str, float]
    gradient_norm: float
    learning_rate: float
    samples: int


@dataclass
class Callback:
    """The moments of a training step at which a callback acts; the defaults do nothing.

    A step consists of `before_step`, the sum of all callbacks' `loss_terms`, the backward pass and optimizer step, and
    `after_step`. A callback that keeps state across steps returns it from `state_dict` as JSON values, and restores it
    in `load_state_dict`.
    """

    name: str = field(default="callback", init=False)

    def before_step(self, state: TrainState) -> None:
        """Act before a step; state.step is the step about to be made.

        The model may be changed in place (widths, blends).
        """

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        """Weighted scalar terms of the loss, by name."""
        return {}

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Act after a step, without changing the model; state.step already counts the step."""

    def explain(self, state: TrainState) -> Sequence[str]:
        """Causes that this callback sees for a loss or gradient that is not finite.

        The loop asks for them before it raises its error.
        """
        return ()

    def scalars(self) -> Mapping[str, float]:
        """Values to log with the loss after a step, by name."""
        return {}

    def images(self) -> Mapping[str, Tensor]:
        """Images to show after a step, by name, uint8 (N, C, H, W); usually none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State to keep in a checkpoint, as JSON values."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
