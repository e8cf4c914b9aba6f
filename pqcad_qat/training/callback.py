"""What the training loop and its callbacks say to each other: the state, and the moments at which a callback is asked.

Not here: the loop (trainer.py), nor any callback; a callback never imports the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_qat.models.conditions import CONDITION

Batch = Mapping[str, Tensor]

BatchSource = Callable[[int], Batch]
"""Step -> the whole batch of that step, over all processes; a pure function, so that resuming needs no data
position.
"""


def with_condition(batch: Batch, condition: Mapping[str, Tensor]) -> Batch:
    """The batch, its states conditioned on tensors (B, ...)."""
    return {**batch, **{CONDITION + name: value for name, value in condition.items()}}


def condition_of(batch: Batch) -> dict[str, Tensor]:
    """What the states of a batch are conditioned on, by name, each (B, ...)."""
    return {name.removeprefix(CONDITION): value for name, value in batch.items() if name.startswith(CONDITION)}


@dataclass
class TrainState:
    """Everything that training changes. `step` is the one clock: the number of finished steps.

    Attributes:
        model: the module whose Parameters are trained, in place.
        optimizer: holds every trained Parameter.
        network: what to call in a loss term: the model, wrapped for the processes that share the work.
        step: finished steps.
        ema: moving averages of the trained Parameters by name, None where there is no averaging.
        ema_since: the step at which averaging (re)started.
        setbacks: divergences overcome so far; each has halved the learning rate.
        held_until: the step before which no bit transition may begin, after a divergence.
        scaler: scales the loss of fp16 so that its gradients are neither 0 nor infinite; None in other precisions.
        parameters: of the model, by name: the same ones from the first step to the last, so its modules are walked over
            once.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    network: nn.Module
    step: int = 0
    ema: dict[str, Tensor] | None = None
    ema_since: int = 0
    setbacks: int = 0
    held_until: int = 0
    scaler: torch.amp.GradScaler | None = None
    parameters: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = dict(self.model.named_parameters())

    def restart_ema(self) -> None:
        """Forget averages of another function: called when the bit-widths have changed."""
        if self.ema is not None:
            self.ema = {name: value.detach().clone() for name, value in self.parameters.items()}
            self.ema_since = self.step


@contextmanager
def averaged_weights(state: TrainState) -> Iterator[nn.Module]:
    """The model with its averaged Parameters inside the block, and with its own after it."""
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
    """What one optimizer step did; means over the whole batch.

    Attributes:
        loss: sum of the terms.
        terms: each weighted loss term by name.
        gradient_norm: before clipping.
        learning_rate: of this step.
        samples: states of the whole batch.
    """

    loss: float
    terms: dict[str, float]
    gradient_norm: float
    learning_rate: float
    samples: int


@dataclass
class Callback:
    """The moments of a training step; the defaults do nothing.

    A step is: `before_step` -> `loss_terms` of all callbacks, summed -> backward, optimizer -> `after_step`.
    A callback that keeps state across steps gives it in `state_dict` as JSON values, and takes it back.
    """

    name: str = field(default="callback", init=False)

    def before_step(self, state: TrainState) -> None:
        """May change the model in place (bit-widths, blends); state.step is the step about to be made."""

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        """Weighted scalar terms of the loss, by name."""
        return {}

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Watches; state.step already counts the step that was made."""

    def explain(self, state: TrainState) -> Sequence[str]:
        """Asked where the loss or a gradient is not finite, before the error is raised: what this callback sees to be
        the cause.
        """
        return ()

    def scalars(self) -> Mapping[str, float]:
        """What to log beside the loss after a step, by name."""
        return {}

    def images(self) -> Mapping[str, Tensor]:
        """What to show after a step, by name: uint8 (N, C, H, W); usually nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
