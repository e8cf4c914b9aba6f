"""The end of a training stage: when it comes, why it came, and which weights the stage returned.

Not here: the decision (stopping_rule.py), and the choice of the weights (held_out.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

EndCause = Literal["steps", "plateau", "max_steps", "minutes"]
"""Why a stage ended: its number of steps was given, the held-out loss stopped improving, or a cap was near."""

Kept = Literal["start", "average", "last", "best"]
"""Weights that a stage may return: those that it was given, the moving average, the last ones, or the moving average at
its lowest held-out loss."""


@dataclass(frozen=True)
class Ending:
    """The end of a stage, once it is decided.

    Attributes:
        decay_from: training step from which the learning rate falls to 0.
        last: number of training steps of the whole stage.
        cause: why the stage ends.
    """

    decay_from: int
    last: int
    cause: EndCause


@dataclass(frozen=True)
class RateTrial:
    """A learning rate that was tried before a stage, and the held-out loss after it; None where it diverged."""

    rate: float
    held_out: float | None


@dataclass(frozen=True)
class StageEnd:
    """What a training stage came to.

    Attributes:
        steps: training steps that it took.
        cause: why it ended.
        kept: which weights it returned.
        held_out: loss of the held-out states under each kind of weights: start, average, last, best.
        images: PSNR in dB of held-out images to full precision's own, under each kind of weights.
        distances: distance between the patches of both sets of images, under each kind of weights. The largest PSNR is
            kept whose distance has not grown beyond training/held_out.py's bound.
        trained: loss of as many states of the trained trajectories, under the start's weights and the kept ones.
        decay_from: training step from which the learning rate fell, None where it fell all the way.
        training_s: wall time of its training steps in seconds, with the trials of learning rates.
        learning_rate: its peak learning rate.
        rate_trials: learning rates that were tried before it; empty where the rate was given.
        trial_steps: training steps of each trial that found its rate, also where another stage made the trials.
    """

    steps: int
    cause: EndCause
    kept: Kept
    held_out: Mapping[str, float | None] = field(default_factory=dict)
    images: Mapping[str, float | None] = field(default_factory=dict)
    distances: Mapping[str, float | None] = field(default_factory=dict)
    trained: Mapping[str, float | None] = field(default_factory=dict)
    decay_from: int | None = None
    training_s: float = 0.0
    learning_rate: float | None = None
    rate_trials: tuple[RateTrial, ...] = ()
    trial_steps: int = 20
