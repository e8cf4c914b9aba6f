"""Float steps: the first sampling steps of a quantized model, which full precision computes in its place.

Where sampling begins, x_t is nearly all noise. A model that predicts epsilon then tells x_0 by a small difference: an
error d of epsilon is an error d * sqrt((1 - a) / a) of x_0, with a = alpha_bar. At a = 1e-4 that is a hundred times d,
so the rounding of 8-bit inputs decides what the picture will be. One step later a is larger, and the same rounding
hardly shows. So those few steps are computed in full precision, and all later ones in INT8.

Which network computes a step is decided by its time alone: a time is the same whatever the sampler and its number of
steps, and a student visits its teacher's times. Times fall while sampling proceeds.

Not here: how many such steps a model needs (stages/float_steps.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pqcad_qat.sampling.ddim import Array
from pqcad_qat.sampling.ddpm_schedule import Walk

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


def by_time(full: Prediction[Array], quantized: Prediction[Array], start: float) -> Prediction[Array]:
    """Return the denoiser that is `full` at the time `start` and above, and `quantized` below it."""

    def call(x_t: Array, t: float, condition: Mapping[str, Any]) -> Array:
        return (full if t >= start else quantized)(x_t, t, condition)

    return call
