"""Sampling as pure functions, whatever the noise schedule: guidance, seeded noise, and the trajectory of a
deterministic sampler.

No model and no framework here: every function takes numpy arrays and torch tensors alike, so the deployed runtime needs
no torch. Not here: the schedules with their steps, of DDPM's kin (ddim.py) and of flow matching (flow.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, cast

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddim import Array, DDPMSchedule, Walk, ddpm_schedule
from pqcad_qat.sampling.flow import FlowSchedule, flow_schedule
from pqcad_qat.sampling.schedulers import FLOW_SCHEDULER, STEPS, Keys, scheduler_class

NoiseSchedule = DDPMSchedule | FlowSchedule
"""How noise and time belong together in a model, and with that the steps of its sampler: `walk`, `step` and
`inverse`.
"""


def noise_schedule(config: Mapping[str, Any], where: str = "scheduler config") -> NoiseSchedule:
    """Read a diffusers scheduler config; `where` is its file.

    Raises:
        ModelError: a class, a key or a value that these functions do not know how to honour.
    """
    return (
        flow_schedule(config, where)
        if scheduler_class(config, where) == FLOW_SCHEDULER
        else ddpm_schedule(config, where)
    )


def written_out(config: Mapping[str, Any], schedule: NoiseSchedule) -> dict[str, Any]:
    """The config of a deployed sampler: of the scheduler of diffusers that makes the schedule's steps, with every key
    that decides them.

    What one class means by a key that is left out, another does not. Other keys stay as they are, but for infinite
    ones, such as a solver's lambda_min_clipped, which are no JSON.
    """
    finite = {key: value for key, value in config.items() if not isinstance(value, float) or math.isfinite(value)}
    return {**finite, **schedule.config}


def distilled_steps(config: Mapping[str, Any], where: str) -> int | None:
    """The sampling steps that the model of a deployed scheduler config was distilled for; None where it names none.

    Raises:
        ModelError: they are no steps that its sampler can make.
    """
    if config.get(STEPS) is None:
        return None
    return Keys(config, where).whole(STEPS, 1, noise_schedule(config, where).train_timesteps)


def check_sampler(name: str | None, schedule: NoiseSchedule, source: str) -> None:
    """Raise ModelError for a sampler that is not the one of the model's schedule; None is always the one."""
    if name not in (None, schedule.sampler):
        kind = (
            "the velocities of flow matching"
            if isinstance(schedule, FlowSchedule)
            else f"{schedule.prediction_type}, as DDPM's kin"
        )
        raise ModelError(f"sampler.name: got {name!r}; {source} predicts {kind}; allowed {schedule.sampler}")


def guided(conditional: Array, unconditional: Array, scale: float) -> Array:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6; scale is 1 + w there): from the unconditional prediction
    on.
    """
    c, u = cast(Any, conditional), cast(Any, unconditional)
    return cast(Array, u + scale * (c - u))


def initial_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """(count, *shape) standard normal x_T of images `first` to `first + count` of a seed; each image's noise is its
    own.

    So the image of a number does not depend on how images are batched, nor on the framework that samples it.
    """
    rows = [
        np.random.default_rng((seed, number)).standard_normal(shape, dtype=np.float32)
        for number in range(first, first + count)
    ]
    return np.stack(rows)


@dataclass(frozen=True)
class SamplerStep(Generic[Array]):
    """One step of a sampler: from x_t, by the prediction made there, to x_s."""

    t: float
    x_t: Array
    prediction: Array
    x_s: Array


def trajectory(
    predict: Callable[[Array, float], Array], x_t: Array, schedule: NoiseSchedule, steps: int
) -> Iterator[SamplerStep[Array]]:
    """The N steps of the schedule's sampler from x_t (B, C, H, W); `predict` is the denoiser as (x_t, t) ->
    prediction.
    """
    return along(schedule.walk(steps), predict, x_t, schedule)


def along(
    walk: Walk, predict: Callable[[Array, float], Array], x_t: Array, schedule: NoiseSchedule
) -> Iterator[SamplerStep[Array]]:
    """The steps of a walk from x_t (B, C, H, W)."""
    for t, s in walk:
        prediction = predict(x_t, t)
        x_s = schedule.step(prediction, x_t, t, s)
        yield SamplerStep(t, x_t, prediction, x_s)
        x_t = x_s
