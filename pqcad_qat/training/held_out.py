"""Held-out states: trajectories that are never trained on, and the callback that measures the loss on them.

A stage's last weights need not be its best: a loss can rise late, and the decay of the rate then leaves no time to come
back. So the averaged weights are kept in a file whenever their held-out loss is the lowest so far.

The loss of the held-out states is the stage's own loss, in evaluation mode and without gradients. Every process
measures the same fixed batch with the same unwrapped model, so the value depends on nothing but the weights. With
`steps: auto` it decides when the stage ends. Which weights are kept at the end is decided by whole images.

Not here: the rule of the end (stopping_rule.py), and the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_qat.machine.processes import exchanged, is_first
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.quantization.plan import evaluating
from pqcad_qat.quantization.trained_part import changing_state, load_changing
from pqcad_qat.training.callback import Batch, Callback, StepReport, TrainState, averaged_weights
from pqcad_qat.training.stage_end import Kept
from pqcad_qat.training.stopping_rule import EVERY, Budget, Progress, ending

SHARE = 8
"""One trajectory in so many is held out, the last ones of the calibration set."""

STATES = 64
"""Number of held-out states that are measured."""

AT_ONCE = 16
"""Number of states in one denoiser call of a measurement, the same whatever the batches of training are."""

WORSE = 1.1
"""Factor by which the distance of held-out images may grow during a stage; weights beyond it are passed over."""


@dataclass(frozen=True)
class ImageFigures:
    """Held-out images of a model, compared with full precision's own.

    Attributes:
        psnr: mean PSNR in dB, image by image; more is nearer.
        distance: distance between the two sets as wholes; less is nearer.
    """

    psnr: float
    distance: float


@dataclass(frozen=True)
class Choice:
    """The weights that a stage keeps, and what is known of all that it might have kept.

    Attributes:
        kept: kind of weights.
        held_out: loss of the held-out states.
        trained: loss of the trained states.
        images: figures of the held-out images; None for weights without a finite loss.
    """

    kept: Kept
    held_out: Mapping[Kept, float]
    trained: Mapping[Kept, float]
    images: Mapping[Kept, ImageFigures | None]


def divided(trajectories: int) -> tuple[slice, slice]:
    """The rows of a calibration set that are trained on, and the last ones, which are held out.

    A single trajectory cannot be divided: it is both trained on and measured.
    """
    if trajectories == 1:
        return slice(0, 1), slice(0, 1)
    first = trajectories - max(1, trajectories // SHARE)
    return slice(0, first), slice(first, trajectories)


def fixed_states(trajectories: int, steps: int) -> tuple[Tensor, Tensor]:
    """(trajectory (B,), time index (B,)) of up to `STATES` states, spread evenly over trajectories and times."""
    count = min(STATES, trajectories * steps)
    number = torch.arange(count)
    return number % trajectories, number * steps // count


@torch.no_grad()
def measured(state: TrainState, batch: Batch, losses: Sequence[Callback]) -> float:
    """Mean loss of a batch under the model's present weights; the model is left as it was."""
    apart = replace(state, network=state.model)  # the processes' wrapper would exchange buffers
    count, total = len(next(iter(batch.values()))), 0.0
    device = next(iter(state.parameters.values())).device
    with evaluating(state.model), frozen_weights(state.model):
        for first in range(0, count, AT_ONCE):
            states = {name: value[first : first + AT_ONCE].to(device) for name, value in batch.items()}
            terms = [term for loss in losses for term in loss.loss_terms(apart, states).values()]
            total += float(torch.stack(terms).sum()) * len(next(iter(states.values()))) / count
    return total


@dataclass
class HeldOutLoss(Callback):
    """Measures the held-out loss of the averaged weights, and ends a stage of `steps: auto`.

    Attributes:
        batch: the held-out states.
        losses: callbacks whose loss terms are measured.
        budget: caps of the stage; its steps are the stage's number of steps where that is given.
        automatic: whether the stage ends by itself.
        settled: whether every layer computes at its target width.
        best_file: file for the averaged weights of lowest loss at the target widths; None where they are not kept. A
            process that goes on from a checkpoint may find those of a later step there, which are as good.
    """

    batch: Batch
    losses: Sequence[Callback]
    budget: Budget
    automatic: bool = False
    settled: Callable[[], bool] = lambda: True
    best_file: Path | None = None
    _best: float = math.inf
    _progress: Progress = field(default_factory=Progress)
    _latest: float | None = None
    _measured_at: int = -1
    _before: float = 0.0
    _in_steps: float = 0.0
    _resumed_at: float | None = None
    _logged: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = "held-out"

    @property
    def seconds(self) -> float:
        """Wall time of the stage's training so far, over all processes that took part one after another."""
        return self._before + self._in_steps + (0.0 if self._resumed_at is None else monotonic() - self._resumed_at)

    def spend(self, seconds: float) -> None:
        """Count wall time that the stage took before its first step."""
        self._before += seconds

    def before_step(self, state: TrainState) -> None:
        """Decide whether the stage is to end; all processes follow the first one's measurement and clock."""
        if self._resumed_at is None:
            self._resumed_at = monotonic()
        if not self.automatic or state.ending is not None or state.step % EVERY:
            return
        own = self._latest if self._measured_at == state.step and self._latest is not None else math.nan
        value, seconds, before = exchanged(own, self.seconds, self._before)[0]
        self._progress = self._progress.updated(state.step, None if math.isnan(value) else value, self.settled())
        state.ending = ending(state.step, self._progress, self.budget, seconds, before=before)

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Measure the averaged weights, every few steps and at the end."""
        last = self.budget.steps if state.ending is None else state.ending.last
        if state.step % EVERY == 0 or state.step == last:
            with averaged_weights(state):
                self._latest, self._measured_at = measured(state, self.batch, self.losses), state.step
                self._keep_best(state)
        self._logged = {"held_out": self._latest} if self._measured_at == state.step else {}

    def _keep_best(self, state: TrainState) -> None:
        """Keep the model's present weights if they are the best so far."""
        if self.best_file is None or self._latest is None or not self._latest < self._best or not self.settled():
            return
        self._best = self._latest
        if is_first():
            save_tensors(changing_state(state.model, state.frozen), self.best_file)

    @property
    def best(self) -> Mapping[str, Tensor] | None:
        """The weights of lowest held-out loss; None where none were kept."""
        return load_file(self.best_file) if self.best_file is not None and math.isfinite(self._best) else None

    def scalars(self) -> Mapping[str, float]:
        return {name: value for name, value in self._logged.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._progress.losses),
            "settled_at": self._progress.settled_at,
            "latest": self._latest,
            "measured_at": self._measured_at,
            "seconds": self.seconds,
            "before": self._before,
            "best": self._best if math.isfinite(self._best) else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state; time that was spent before going back to an earlier checkpoint still counts."""
        self._progress = Progress(tuple(saved["losses"]), saved["settled_at"])
        self._latest, self._measured_at = saved["latest"], saved["measured_at"]
        self._best = math.inf if saved["best"] is None else saved["best"]
        seconds = max(saved["seconds"], self.seconds)
        self._before = max(saved.get("before", 0.0), self._before)
        self._in_steps, self._resumed_at = seconds - self._before, None


def best_weights(
    state: TrainState,
    start: Mapping[str, Tensor],
    losses: Sequence[Callback],
    *,
    held_out: Batch,
    trained: Batch,
    figures: Callable[[nn.Module], ImageFigures],
    best: Mapping[str, Tensor] | None = None,
) -> Choice:
    """Leave in the model the weights whose held-out images are nearest to full precision's.

    Weights without a finite loss lose against any other, and so do weights whose images, as a set, are further from
    full precision's than those of the start by more than `WORSE` allows: an image can be near to its own while all of
    them have lost the same thing. Of equals the moving average is kept, then the last, then those of the lowest
    held-out loss.

    Args:
        state: state after the last training step.
        start: weights that the stage was given, in the form of the model's own before its training.
        losses: callbacks whose loss terms are measured.
        held_out: states of the held-out trajectories.
        trained: states of the trained trajectories, to compare with.
        figures: function that measures the model's held-out images.
        best: weights of the lowest held-out loss on the way, where they were kept.
    """
    candidates: dict[Kept, Mapping[str, Tensor]] = {}
    if state.ema is not None:
        with averaged_weights(state) as model:
            candidates["average"] = changing_state(model, state.frozen)
    candidates["last"] = changing_state(state.model, state.frozen)
    candidates |= {**({} if best is None else {"best": best}), "start": start}
    on_held_out: dict[Kept, float] = {}
    on_trained: dict[Kept, float] = {}
    images: dict[Kept, ImageFigures | None] = {}
    for kind, weights in candidates.items():
        load_changing(state.model, weights, state.frozen)
        on_held_out[kind] = measured(state, held_out, losses)
        on_trained[kind] = measured(state, trained, losses)
        images[kind] = figures(state.model) if math.isfinite(on_held_out[kind]) else None
    kept = nearest(images)
    load_changing(state.model, candidates[kept], state.frozen)
    return Choice(kept, on_held_out, on_trained, images)


def nearest(images: Mapping[Kept, ImageFigures | None]) -> Kept:
    """The first kind of weights of largest PSNR among those whose distance has not grown beyond `WORSE`."""
    start = images["start"]
    most = math.inf if start is None or not math.isfinite(start.distance) else WORSE * start.distance

    def rank(kind: Kept) -> tuple[bool, float]:
        found = images[kind]
        if found is None or math.isnan(found.psnr):
            return False, -math.inf
        return kind == "start" or found.distance <= most, found.psnr

    return max(images, key=rank)
