"""Other samplers than DDIM for DDPM's kin: Euler, DPM-Solver++ (2M), UniPC and LCM's, in numpy.

Method: with x_t = alpha x_0 + sigma eps and lambda = log(alpha / sigma), the probability flow is linear in x_t but for
the predicted x_0. A first-order step takes that as constant, and is DDIM's. The multistep solvers extrapolate it from
the last two predictions: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, algorithm 2), and UniPC of order 2 with B(h) =
e^h - 1 (Zhao et al. 2023, arXiv 2302.04867), which also corrects each state once its own prediction is known. Latent
consistency models (Luo et al. 2023, arXiv 2310.04378) predict the image itself at every step, and the next state is
that image with fresh noise. Names and settings are diffusers'.

Not here: DDIM (ddim.py) and flow matching (flow.py), and the loop (serving/text_to_image.py). A student was distilled
for DDIM; what another sampler makes of it is to be looked at.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddim import split_prediction
from pqcad_qat.sampling.ddpm_schedule import END, DDPMSchedule, Walk
from pqcad_qat.sampling.flow import FlowSchedule

Float = npt.NDArray[Any]
"""Array of floats."""

Fresh = Callable[[int], Float]
"""Function from the number of a step, from 1 on, to standard normal noise (B, C, H, W) of that step."""

LCM_TIMES = 50
"""Number of times that latent consistency models are distilled at, `original_inference_steps` of diffusers."""

LCM_SCALE, LCM_DEVIATION = 10.0, 0.5
"""`timestep_scaling` of diffusers, and the standard deviation that it assumes of the data: how soon after time 0 a
latent consistency model's answer is all prediction and no state.
"""


@dataclass(frozen=True)
class _Point:
    """A time of the schedule: x = alpha x_0 + sigma eps, and lambda = log(alpha / sigma)."""

    alpha: float
    sigma: float
    lam: float


class Solver(ABC):
    """A sampler in progress: one object for one trajectory."""

    def __init__(self, schedule: DDPMSchedule, times: Sequence[float], fresh: Fresh) -> None:
        self.schedule, self.times, self.fresh = schedule, times, fresh
        # DDIM's steps end where the next one begins only where their number divides that of the training steps
        self.next = dict(pairwise([*times, END]))

    @classmethod
    def walk(cls, schedule: DDPMSchedule, steps: int) -> Walk:
        """Return the steps of a trajectory of so many: those of the schedule's own sampler.

        Raises:
            ModelError: this number of steps is not possible.
        """
        return schedule.walk(steps)

    def begun(self, noise: Float) -> Float:
        """Return the state x_T (B, C, H, W) that sampling begins from: the noise itself."""
        return noise

    @abstractmethod
    def step(self, prediction: Float, x_t: Float, t: float) -> Float:
        """Return the state (B, C, H, W) at the next time from x_t and the prediction at x_t."""

    def _point(self, t: float) -> _Point:
        """The point of a time; diffusers' solvers end at the image itself."""
        signal = self.schedule.alpha_bar_at(t) if t >= 0 else 1.0
        alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
        return _Point(alpha, sigma, math.log(alpha / sigma) if sigma else math.inf)

    def _image(self, prediction: Float, x_t: Float, t: float) -> Float:
        """The predicted x_0."""
        kind = self.schedule.prediction_type
        return split_prediction(prediction, x_t, self.schedule.alpha_bar_at(t), kind)[0]


class Euler(Solver):
    """Euler's method in x_t / alpha over sigma / alpha: DDIM's step, from noise without the signal's share."""

    def begun(self, noise: Float) -> Float:
        """Return the noise as diffusers scales it."""
        first = self._point(self.times[0])
        return noise if self.schedule.timestep_spacing == "leading" else np.asarray(noise * first.sigma)

    def step(self, prediction: Float, x_t: Float, t: float) -> Float:
        """Return the state (B, C, H, W) at the next time from x_t and the prediction at x_t."""
        image, here, there = self._image(prediction, x_t, t), self._point(t), self._point(self.next[t])
        return np.asarray(there.alpha * image + there.sigma * (x_t - here.alpha * image) / here.sigma)


class DPMSolver2M(Solver):
    """DPM-Solver++ of second order, midpoint, the last step of first order."""

    def __init__(self, schedule: DDPMSchedule, times: Sequence[float], fresh: Fresh) -> None:
        super().__init__(schedule, times, fresh)
        self._before: tuple[float, Float] | None = None

    def step(self, prediction: Float, x_t: Float, t: float) -> Float:
        """Return the state (B, C, H, W) at the next time from x_t and the prediction at x_t."""
        image, here, there = self._image(prediction, x_t, t), self._point(t), self._point(self.next[t])
        growth = -math.expm1(here.lam - there.lam)  # 1 - e^-h
        x_s = there.sigma / here.sigma * x_t + there.alpha * growth * image
        if self._before is not None and t != self.times[-1]:
            lam, image_before = self._before
            ratio = (here.lam - lam) / (there.lam - here.lam)
            x_s = x_s + there.alpha * growth / (2 * ratio) * (image - image_before)
        self._before = (here.lam, image)
        return np.asarray(x_s)


class UniPC(Solver):
    """UniPC of second order, whose corrector needs no further prediction."""

    def __init__(self, schedule: DDPMSchedule, times: Sequence[float], fresh: Fresh) -> None:
        super().__init__(schedule, times, fresh)
        self._images: list[tuple[_Point, Float]] = []  # the last two, the newest last
        self._last: tuple[Float, int] | None = None  # the state before this one, and the order of the step from it
        self._made = 0

    def step(self, prediction: Float, x_t: Float, t: float) -> Float:
        """Return the state (B, C, H, W) at the next time from x_t and the prediction at x_t."""
        here, image = self._point(t), self._image(prediction, x_t, t)
        if self._last is not None:
            x_t = self._corrected(here, image)
        self._images = [*self._images[-1:], (here, image)]
        order = min(2, len(self.times) - self._made, self._made + 1)
        self._last, self._made = (x_t, order), self._made + 1
        there = self._point(self.next[t])
        growth = math.expm1(here.lam - there.lam)
        x_s = there.sigma / here.sigma * x_t - there.alpha * growth * image
        if order == 2:
            before, image_before = self._images[0]
            ratio = (before.lam - here.lam) / (there.lam - here.lam)
            x_s = x_s - there.alpha * growth / 2 * (image_before - image) / ratio
        return np.asarray(x_s)

    def _corrected(self, here: _Point, image: Float) -> Float:
        """The present state again, now that its own prediction is known."""
        assert self._last is not None
        x, order = self._last
        start, image_start = self._images[-1]
        h = start.lam - here.lam
        growth = math.expm1(h)
        x_t = here.sigma / start.sigma * x - here.alpha * growth * image_start
        if order == 1:
            return np.asarray(x_t - here.alpha * growth / 2 * (image - image_start))
        before, image_before = self._images[0]
        ratio = (before.lam - start.lam) / -h
        first = growth / h - 1
        rows, sums = [[1.0, 1.0], [ratio, 1.0]], [first / growth, 2 * (first / h - 0.5) / growth]
        old, new = (float(weight) for weight in np.linalg.solve(rows, sums))
        change = old * (image_before - image_start) / ratio + new * (image - image_start)
        return np.asarray(x_t - here.alpha * growth * change)


class LCM(Solver):
    """The sampler of latent consistency models, with the boundary condition that a state at time 0 is its own answer.

    For models that were distilled so, or have such an adapter fused in.
    """

    @classmethod
    def walk(cls, schedule: DDPMSchedule, steps: int) -> Walk:
        """Return steps along the times at which such models are distilled.

        Raises:
            ModelError: there are not so many.
        """
        total = int(schedule.config["num_train_timesteps"])
        of_all = min(LCM_TIMES, total)
        if not 1 <= steps <= of_all:
            raise ModelError(
                f"steps: got {steps} with the solver lcm; allowed 1 to {of_all}, the times it was distilled at"
            )
        distilled = [(index + 1) * (total // of_all) - 1 for index in reversed(range(of_all))]
        times = [distilled[index * of_all // steps] for index in range(steps)]
        return tuple(pairwise([*times, END]))

    def step(self, prediction: Float, x_t: Float, t: float) -> Float:
        """Return the state (B, C, H, W) at the next time from x_t and the prediction at x_t."""
        time = LCM_SCALE * t
        skip = LCM_DEVIATION**2 / (time**2 + LCM_DEVIATION**2)
        answer = time / math.hypot(time, LCM_DEVIATION) * self._image(prediction, x_t, t) + skip * x_t
        if t == self.times[-1]:
            return np.asarray(answer)
        there = self._point(self.next[t])
        return np.asarray(there.alpha * answer + there.sigma * self.fresh(self.times.index(t) + 1))


SOLVERS: Mapping[str, type[Solver]] = {
    "euler": Euler,
    "dpm++2m": DPMSolver2M,
    "unipc": UniPC,
    "lcm": LCM,
}
"""Solvers by name."""


def solver_walk(name: str | None, schedule: DDPMSchedule | FlowSchedule, steps: int) -> Walk:
    """Return the steps that a solver makes, or without one the schedule's own sampler.

    Raises:
        ModelError: this number of steps is not possible, or as `solver_of`.
    """
    if name is None:
        return schedule.walk(steps)
    known = _checked(name, schedule)
    return SOLVERS[name].walk(known, steps)


def solver_of(name: str, schedule: DDPMSchedule | FlowSchedule, walk: Walk, fresh: Fresh) -> Solver:
    """Return a solver for one trajectory along these steps. `fresh` gives the noise of solvers that add some.

    Raises:
        ModelError: there is no such solver, or the schedule has a sampler of its own, or clips.
    """
    known = _checked(name, schedule)
    return SOLVERS[name](known, [t for t, _ in walk], fresh)


def _checked(name: str, schedule: DDPMSchedule | FlowSchedule) -> DDPMSchedule:
    """The schedule, where the solver of that name knows it.

    Raises:
        ModelError: there is no such solver, or the schedule has a sampler of its own, or clips.
    """
    if name not in SOLVERS:
        allowed = f"{', '.join(SOLVERS)}, or none for the model's own sampler"
        raise ModelError(f"solver: got {str(name)[:40]!r}; allowed {allowed}")
    if not isinstance(schedule, DDPMSchedule) or schedule.clip_sample_range is not None:
        kind = "clips its images" if isinstance(schedule, DDPMSchedule) else "matches flows"
        raise ModelError(f"solver: got {name!r} for a model that {kind}; allowed none, its own sampler")
    return schedule
