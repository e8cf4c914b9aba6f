"""The search for a stage's learning rate: which rates are tried, and which is taken.

The right rate differs between models by factors of ten and more, and so it does between weights that lie anywhere
within their levels, as post-training quantization leaves them, and others. Too high a rate undoes in the first training
steps what a model has learned or how it was rounded, and a low one learns next to nothing in its budget. So a few rates
are tried from the weights that the stage is given, each for TRIAL_STEPS training steps, and the one is taken after
which the held-out loss of the averaged weights is the lowest. The search goes from FIRST downwards or upwards for as
long as that helps. Where 20 steps end is not where 200 do. What was measured of that is in NOTES.md.

Where the clock allows few training steps, trials are shorter, so that they take no more than a share of them. The rate
that is best for N steps falls with the square root of N, and a stage holds the rate that it has found for as many steps
as a trial has before it does so too (trainer.py). So a shorter trial finds a higher rate, and the stage leaves it
sooner.

Not here: a trial itself (stages/found_rate.py), and the course of the rate in a stage (trainer.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pqcad_qat.training.stage_end import RateTrial

RATES = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
"""Rates that may be tried."""

FIRST = RATES.index(1e-5)
"""Place in RATES of the first one that is tried."""

TRIAL_STEPS = 20
"""Number of training steps of a trial, where there is time for them."""

FEWEST_STEPS = 5
"""Smallest number of training steps of a trial."""

TRIALS = 4
"""Number of trials that a search takes, as a rule, with the measurements after them."""

SHARE = 0.2
"""Largest share of a stage's time that so many trials of more than FEWEST_STEPS may take."""


def trial_steps(seconds: float | None, step_s: float) -> int:
    """Return the number of training steps of a trial in a stage of so many seconds (None for any number), each of whose
    steps takes `step_s`.
    """
    if seconds is None:
        return TRIAL_STEPS
    return max(FEWEST_STEPS, min(TRIAL_STEPS, int(SHARE * seconds / (TRIALS * step_s))))


def searched(trial: Callable[[float], float]) -> tuple[RateTrial, ...]:
    """Try rates by `trial`, which maps a rate to the held-out loss after it, and return the trials in their order.

    The neighbour below is tried first: where both are as good, a lower rate is the safer one. A loss that is not
    finite is larger than any other.
    """
    losses: dict[int, float] = {}

    def loss_at(place: int) -> float:
        if place not in losses:
            found = trial(RATES[place])
            losses[place] = found if math.isfinite(found) else math.inf
        return losses[place]

    place = FIRST
    while place > 0 and loss_at(place - 1) <= loss_at(place):
        place -= 1
    while FIRST <= place < len(RATES) - 1 and loss_at(place + 1) < loss_at(place):
        place += 1
    return tuple(RateTrial(RATES[place], loss if math.isfinite(loss) else None) for place, loss in losses.items())


def best(trials: Sequence[RateTrial]) -> float:
    """The rate of the lowest loss, of equals the lowest rate; the lowest that was tried where no loss is finite."""

    def rank(trial: RateTrial) -> tuple[float, float]:
        return math.inf if trial.held_out is None else trial.held_out, trial.rate

    return min(trials, key=rank).rate
