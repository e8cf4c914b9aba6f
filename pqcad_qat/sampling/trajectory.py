"""Sampling for any noise schedule: guidance, seeded noise, and the trajectory of a deterministic sampler.

All are pure functions of numpy arrays or torch tensors alike, so the deployed runtime needs no torch.

Not here: models, or the schedules and their steps, for DDPM's kin (ddpm_schedule.py) and for flow matching (flow.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, cast

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddim import Array
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule, Walk, ddpm_schedule
from pqcad_qat.sampling.flow import FlowSchedule, flow_schedule
from pqcad_qat.sampling.schedulers import FLOW_SCHEDULER, STEPS, Keys, scheduler_class

NoiseSchedule = DDPMSchedule | FlowSchedule
"""Relation between noise and time in a model, with the steps of its sampler: `walk`, `step` and `inverse`."""


def noise_schedule(config: Mapping[str, Any], where: str = "scheduler config") -> NoiseSchedule:
    """Read a diffusers scheduler config; `where` names its file.

    Raises:
        ModelError: a class, key or value is not supported.
    """
    return (
        flow_schedule(config, where)
        if scheduler_class(config, where) == FLOW_SCHEDULER
        else ddpm_schedule(config, where)
    )


def written_out(config: Mapping[str, Any], schedule: NoiseSchedule) -> dict[str, Any]:
    """Return the config of a deployed sampler: diffusers' scheduler, with every key that decides the steps.

    Every such key is written because defaults differ between classes. Other keys are kept, except for infinite values,
    such as a solver's lambda_min_clipped, which JSON cannot hold.
    """
    finite = {key: value for key, value in config.items() if not isinstance(value, float) or math.isfinite(value)}
    return {**finite, **schedule.config}


def distilled_steps(config: Mapping[str, Any], where: str) -> int | None:
    """Return the sampling steps that a deployed model was distilled for, or None where its config names none.

    Raises:
        ModelError: the sampler cannot make this number of steps.
    """
    if config.get(STEPS) is None:
        return None
    return Keys(config, where).whole(STEPS, 1, noise_schedule(config, where).train_timesteps)


def check_sampler(name: str | None, schedule: NoiseSchedule, source: str) -> None:
    """Raise ModelError for a sampler other than that of the model's schedule; None stands for the right one."""
    if name not in (None, schedule.sampler):
        kind = (
            "the velocities of flow matching"
            if isinstance(schedule, FlowSchedule)
            else f"{schedule.prediction_type}, as DDPM's kin"
        )
        raise ModelError(f"sampler.name: got {name!r}; {source} predicts {kind}; allowed {schedule.sampler}")


def guided(conditional: Array, unconditional: Array, scale: float) -> Array:
    """Combine two predictions by classifier-free guidance (Ho and Salimans 2022, eq. 6, where scale is 1 + w).

    The scale multiplies the step from the unconditional to the conditional prediction.
    """
    c, u = cast(Any, conditional), cast(Any, unconditional)
    return cast(Array, u + scale * (c - u))


def initial_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return standard normal noise x_T (count, *shape) of the images `first` to `first + count` of a seed.

    Each image has noise of its own, so it does not depend on the batch size or on the framework that samples it.
    """
    return _standard_normal([(seed, index) for index in range(first, first + count)], shape)


def later_noise(seed: int, step: int, count: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return standard normal noise (count, *shape) for a sampler that adds some in its step `step`, from 1 on, to the
    images 0 to `count` of a seed.
    """
    # numpy reads (seed, index, 0) as (seed, index), which is the noise that sampling began from: hence from 1 on
    return _standard_normal([(seed, index, step) for index in range(count)], shape)


def _standard_normal(seeds: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A row of noise (*shape) for each seed, stacked."""
    return np.stack([np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds])


@dataclass(frozen=True)
class SamplerStep(Generic[Array]):
    """One sampling step, from x_t to x_s by the prediction at x_t."""

    t: float
    x_t: Array
    prediction: Array
    x_s: Array


def trajectory(
    predict: Callable[[Array, float], Array], x_t: Array, schedule: NoiseSchedule, steps: int
) -> Iterator[SamplerStep[Array]]:
    """Yield the N steps of the schedule's sampler from x_t (B, C, H, W).

    `predict` is the denoiser as (x_t, t) -> prediction.
    """
    return along(schedule.walk(steps), predict, x_t, schedule)


def along(
    walk: Walk, predict: Callable[[Array, float], Array], x_t: Array, schedule: NoiseSchedule
) -> Iterator[SamplerStep[Array]]:
    """Yield the given steps, starting from x_t (B, C, H, W)."""
    for t, s in walk:
        prediction = predict(x_t, t)
        x_s = schedule.step(prediction, x_t, t, s)
        yield SamplerStep(t, x_t, prediction, x_s)
        x_t = x_s


def landing(
    walk: Walk,
    predict: Callable[[Array, float], Array],
    x_t: Array,
    schedule: NoiseSchedule,
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> Array:
    """Return the state at which the given steps land from x_t (B, C, H, W), which is x_t where there are none.

    `advance` is called after each step with the number B of states.
    """
    for step in along(walk, predict, x_t, schedule):
        x_t = step.x_s
        advance(len(cast(Any, x_t)))
    return x_t
