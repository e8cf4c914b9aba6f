"""Float steps: the first sampling steps of a quantized model, which full precision computes in its place.

Where sampling begins, x_t is nearly all noise. A model that predicts epsilon then tells x_0 by a small difference: an
error d of epsilon is an error d * sqrt((1 - a) / a) of x_0, with a = alpha_bar. At a = 1e-4 that is a hundred times d,
so the rounding of 8-bit inputs decides what the picture will be. One step later a is larger, and the same rounding
hardly shows. So those few steps are computed in full precision, and all later ones in INT8.

Which network computes a step is decided by its time alone: a time is the same whatever the sampler and its number of
steps, and a student visits its teacher's times. Times fall while sampling proceeds.

No training reaches a step that full precision computes, so nothing mends what a student loses by its longer steps
there. Such a step can be taken in its teacher's shorter ones: one prediction then stands for several calls. It is the
prediction from which DDIM's one step lands where the shorter ones do, so a sampling loop goes on as before.

Not here: how many such steps a model needs, and which are taken in parts (stages/float_steps.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pqcad_qat.sampling.ddim import Array
from pqcad_qat.sampling.ddpm_schedule import Walk
from pqcad_qat.sampling.trajectory import NoiseSchedule, landing

NO_FLOAT_STEPS = math.inf
"""Time from which full precision computes, where it computes no step."""

Prediction = Callable[[Array, float, Mapping[str, Any]], Array]
"""A denoiser as (x_t, t, condition) -> prediction."""


def float_from(walk: Walk, count: int) -> float:
    """Return the time from which on full precision computes, if it computes the first `count` steps of this walk."""
    return walk[count - 1][0] if count else NO_FLOAT_STEPS


def float_steps(walk: Walk, start: float) -> int:
    """Return the number of steps of this walk at the time `start` or above."""
    return sum(t >= start for t, _ in walk)


@dataclass(frozen=True)
class StepsInFloat:
    """The sampling steps that full precision computes.

    Attributes:
        start: time at which and above which full precision computes; NO_FLOAT_STEPS where it computes no step.
        stops: for each step that it takes in parts, the times from the step's start to its end.
    """

    start: float = NO_FLOAT_STEPS
    stops: tuple[tuple[int, ...], ...] = ()

    def along(self, walk: Walk) -> StepsInFloat:
        """Return these steps for another walk: one is taken in parts only where the walk makes the same step."""
        return replace(self, stops=tuple(times for times in self.stops if (times[0], times[-1]) in walk))

    @property
    def parts(self) -> Mapping[float, Walk]:
        """Start of a step that is taken in parts -> the parts."""
        return {times[0]: tuple(pairwise(times)) for times in self.stops}

    def calls(self, walk: Walk) -> int:
        """Return the number of full-precision denoiser calls along this walk."""
        parts = self.along(walk).parts
        return sum(len(parts.get(t, ((t, s),))) for t, s in walk if t >= self.start)


def are_stops(value: Any) -> bool:
    """Whether a value read from a file is the times of steps that are taken in parts: whole numbers, falling to 0."""
    if not isinstance(value, list) or not all(isinstance(times, list) and len(times) > 2 for times in value):
        return False
    whole = all(isinstance(time, int) and not isinstance(time, bool) for times in value for time in times)
    return whole and all(0 <= later < earlier for times in value for earlier, later in pairwise(times))


def in_parts(
    full: Callable[[Array, float], Array], schedule: NoiseSchedule, parts: Mapping[float, Walk]
) -> Callable[[Array, float], Array]:
    """Return the full-precision denoiser (x_t, t) whose predictions at the starts of `parts` land where they do."""

    def call(x_t: Array, t: float) -> Array:
        if (walk := parts.get(t)) is None:
            return full(x_t, t)
        return schedule.prediction_to(x_t, landing(walk, full, x_t, schedule), t, walk[-1][1])

    return call


def by_time(
    full: Prediction[Array], quantized: Prediction[Array], schedule: NoiseSchedule, in_float: StepsInFloat
) -> Prediction[Array]:
    """Return the denoiser that is `full` in the steps that full precision computes, and `quantized` in all others."""

    def call(x_t: Array, t: float, condition: Mapping[str, Any]) -> Array:
        if t < in_float.start:
            return quantized(x_t, t, condition)
        return in_parts(lambda state, time: full(state, time, condition), schedule, in_float.parts)(x_t, t)

    return call
