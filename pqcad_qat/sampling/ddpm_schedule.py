"""The noise schedule of DDPM's kin, with the timesteps of its DDIM sampler, as numbers read from a scheduler config.

DDPM's kin are the schedulers whose noise is made of betas. Names follow the papers, as in ddim.py.

Not here: which scheduler classes are DDPM's kin, and their keys (schedulers.py), named betas (betas.py), the DDIM step
itself (ddim.py), flow matching (flow.py), or code that both kinds of schedule share (trajectory.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.betas import Betas, betas_of, named_betas, zero_terminal_snr
from pqcad_qat.sampling.ddim import Array, add_noise, ddim_inverse, ddim_step
from pqcad_qat.sampling.schedulers import DDIM_CURVES, DDIM_SCHEDULER, KIN, PredictionType, TimestepSpacing, ddim_keys

Walk = tuple[tuple[float, float], ...]
"""Sampling steps as pairs (t, s), each from time t to the less noisy time s."""

LOW_SIGNAL = 1e-3
"""Value of alpha_bar below which a prediction of epsilon carries no information about x_0."""

LEAST_SIGNAL = 1e-37
"""Smallest alpha_bar that float32, the precision of diffusers, still distinguishes from no signal."""

END = -1
"""Time of the image; every time below 0 stands for it."""

STEPS_KEY = "sampling steps"
"""Name of the number of steps in messages, unless a policy's key asks for that number."""


@dataclass(frozen=True)
class DDPMSchedule:
    """The noise schedule of a diffusers scheduler config, as numbers.

    Attributes:
        config: config, with every key, of diffusers' DDIMScheduler with this schedule and these timesteps.
        alpha_bar: (T,) float64, share of signal at each training timestep, falling.
        prediction_type: quantity that the denoiser predicts.
        timestep_spacing: rule by which N sampling steps are placed on the T training timesteps.
        steps_offset: number added to the timesteps of `leading` spacing.
        final_alpha_bar: share of signal after the last step.
        clip_sample_range: bound on the absolute value of the predicted x_0; None where it is not clipped.
    """

    config: Mapping[str, Any]
    alpha_bar: npt.NDArray[np.float64]
    prediction_type: PredictionType
    timestep_spacing: TimestepSpacing
    steps_offset: int
    final_alpha_bar: float
    clip_sample_range: float | None

    sampler: ClassVar[Literal["ddim"]] = "ddim"
    timestep_dtype: ClassVar[Literal["int64"]] = "int64"

    @property
    def train_timesteps(self) -> int:
        """Number T of training timesteps."""
        return len(self.alpha_bar)

    def alpha_bar_at(self, t: float) -> float:
        """Return alpha_bar at timestep t; every t below 0 stands for the end of sampling."""
        return float(self.alpha_bar[int(t)]) if t >= 0 else self.final_alpha_bar

    def walk(self, steps: int, key: str = STEPS_KEY) -> Walk:
        """Return the steps of an N-step sampler; `key` names the number of steps in messages.

        Raises:
            ModelError: no sampler has this number of steps, or its first prediction would carry no information.
        """
        times = timesteps(self, steps, key)
        if self.prediction_type == "epsilon" and self.alpha_bar_at(times[0]) == 0.0:
            raise ModelError(
                f"{key}: got {steps}; they begin at time step {times[0]}, where rescale_betas_zero_snr leaves no "
                "signal and epsilon says nothing of the picture; "
                "allowed a scheduler of v_prediction or sample, or of timestep_spacing leading"
            )
        return tuple((t, next_timestep(self, t, steps)) for t in times)

    def student(self, steps: int, student_steps: int) -> DDPMSchedule:
        """Return the schedule of a sampler of fewer steps that starts at the N-step sampler's first timestep.

        Trajectories start from pure noise at the first, noisiest timestep. A student that started from pure noise at a
        later timestep would see states that it was not trained on. With trailing and linspace spacing the first
        timestep is T - 1, whatever the number of steps.

        With leading spacing the first timestep depends on the number of steps. The timesteps of N steps are k r +
        steps_offset, where r = T // N and k < N. Take every f-th of them, the first included: these are k (f r) +
        steps_offset + (f - 1) r for k < N / f. This is leading spacing again, with a larger offset, as long as T // (N
        / f) equals f r. Where the divisions leave a remainder, that equality can fail. Then the schedule is cut off
        after the first visited timestep, at a length for which it holds.

        Raises:
            ModelError: no sampler with this number of steps starts there.
        """
        factor, ratio = steps // student_steps, self.train_timesteps // steps
        if self.timestep_spacing == "linspace" and student_steps == 1 < steps:
            raise ModelError(
                "distillation.student_steps: got 1; with linspace spacing one step begins at time step 0; "
                "allowed 2 or more"
            )
        if self.timestep_spacing != "leading" or factor == 1:
            return self
        changes: dict[str, Any] = {"steps_offset": self.steps_offset + (factor - 1) * ratio}
        if self.train_timesteps // student_steps != factor * ratio:
            count = min(self.train_timesteps, steps * ratio + student_steps - 1)
            changes |= _written_betas(betas_of(self.alpha_bar)[:count])
        return ddpm_schedule({**self.config, **changes}, f"scheduler of a student of {student_steps} steps")

    def passing(self, steps: int, students: Sequence[int]) -> Walk:
        """Return the steps of a sampler that visits the timesteps of the N-step sampler and of its students.

        Where the N-step sampler already visits all of them, its own steps are returned.
        """
        walk = self.walk(steps)
        times = {t for t, _ in walk} | {t for count in students for t, _ in self.student(steps, count).walk(count)}
        return walk if len(times) == len(walk) else tuple(pairwise([*sorted(times, reverse=True), END]))

    def finer(self, walk: Walk, factor: int) -> tuple[Walk, ...]:
        """Split each step of a sampler, up to the timestep of the next, into `factor` parts.

        They are as even as whole timesteps allow, and fewer where there are not enough whole timesteps.
        """
        if factor == 1:
            return tuple((step,) for step in walk)
        split_steps = []
        for t, end in pairwise([*(t for t, _ in walk), walk[-1][1]]):
            # Divide the stretch from one visited timestep to the next. Rounding to whole timesteps may make duplicates,
            # which the set removes, and may reach the end.
            divided = {t - round((t - end) * index / factor) for index in range(factor)}
            visited = sorted((u for u in divided if u >= 0 and u > end), reverse=True)
            split_steps.append(tuple(pairwise([*visited, end])))
        return tuple(split_steps)

    @property
    def spelled_out(self) -> dict[str, Any]:
        """The config with its betas written out, for programs that do not know its curve by name."""
        return {**self.config, **_written_betas(betas_of(self.alpha_bar))}

    def noised(self, x_0: Array, eps: Array, t: float) -> Array:
        """Return the state x_t (B, C, H, W) of images with this noise."""
        return add_noise(x_0, eps, self.alpha_bar_at(t))

    def step(self, prediction: Array, x_t: Array, t: float, s: float) -> Array:
        """Return x_s (B, C, H, W) from x_t and the prediction at x_t."""
        return ddim_step(
            prediction,
            x_t,
            self.alpha_bar_at(t),
            self.alpha_bar_at(s),
            prediction_type=self.prediction_type,
            clip_sample_range=self.clip_sample_range,
        )

    def inverse(self, x_t: Array, x_s: Array, t: float, s: float) -> Array:
        """Return the prediction that takes x_t to x_s in one step without clipping of x_0."""
        return ddim_inverse(x_t, x_s, self.alpha_bar_at(t), self.alpha_bar_at(s), prediction_type=self.prediction_type)

    def prediction_to(self, x_t: Array, x_s: Array, t: float, s: float) -> Array:
        """Return the prediction from which `step` comes nearest to x_s: lands on it, unless that needs an x_0 that is
        clipped.
        """
        return ddim_inverse(
            x_t,
            x_s,
            self.alpha_bar_at(t),
            self.alpha_bar_at(s),
            prediction_type=self.prediction_type,
            clip_sample_range=self.clip_sample_range,
        )

    def moves(self, t: float, s: float) -> bool:
        """Return whether a step changes the state: between times of equal alpha_bar it does not."""
        return self.alpha_bar_at(t) != self.alpha_bar_at(s)

    def informative(self, t: float) -> bool:
        """Return whether a prediction at t says anything of x_0; one of epsilon does not where there is no signal."""
        return self.prediction_type != "epsilon" or self.alpha_bar_at(t) >= LOW_SIGNAL


def ddpm_schedule(config: Mapping[str, Any], where: str = "scheduler config") -> DDPMSchedule:
    """Read the config of a diffusers scheduler of DDPM's kin, DDIM where it names no class.

    `where` names its file.

    Raises:
        ModelError: a class, key or value is not supported.
    """
    written = ddim_keys(config, where)
    with np.errstate(all="ignore"):  # the checks below report invalid betas
        betas = _betas(written)
        alpha_bar = np.cumprod(1.0 - betas, dtype=np.float64)
        # With rescale_betas_zero_snr, some solvers leave a tiny alpha_bar at the last timestep where DDIM leaves 0.
        # Such a schedule has no name in DDIM's config, so its betas are written out.
        least = KIN[config.get("_class_name", DDIM_SCHEDULER)].zero_snr
        if written["rescale_betas_zero_snr"] and least:
            alpha_bar[-1] = least
        _check_signal(alpha_bar, written, where)
        if written["beta_schedule"] not in DDIM_CURVES or (written["rescale_betas_zero_snr"] and least):
            written |= _written_betas(betas_of(alpha_bar))
    return DDPMSchedule(
        config={"_class_name": DDIM_SCHEDULER, **written},
        alpha_bar=alpha_bar,
        prediction_type=written["prediction_type"],
        timestep_spacing=written["timestep_spacing"],
        steps_offset=written["steps_offset"],
        final_alpha_bar=1.0 if written["set_alpha_to_one"] else float(alpha_bar[0]),
        clip_sample_range=written["clip_sample_range"] if written["clip_sample"] else None,
    )


def _betas(written: Mapping[str, Any]) -> Betas:
    """Return the noise variances beta_t (T,) of a config with every key."""
    if written["trained_betas"] is not None:
        betas = np.asarray(written["trained_betas"], dtype=np.float64)
    else:
        betas = named_betas(
            written["beta_schedule"], written["beta_start"], written["beta_end"], written["num_train_timesteps"]
        )
    return zero_terminal_snr(betas) if written["rescale_betas_zero_snr"] else betas


def _written_betas(betas: Betas) -> dict[str, Any]:
    """Return the keys of a DDIM config that spell out betas for which DDIM has no name."""
    named = {"beta_schedule": "linear", "rescale_betas_zero_snr": False}
    return {**named, "num_train_timesteps": len(betas), "trained_betas": [float(beta) for beta in betas]}


def _check_signal(alpha_bar: npt.NDArray[np.float64], written: Mapping[str, Any], where: str) -> None:
    """Raise ModelError where float32 keeps no noise or no signal; only the last timestep may have exactly no signal."""
    key = (
        "trained_betas"
        if written["trained_betas"] is not None
        else "beta_start, beta_end, beta_schedule and num_train_timesteps"
    )
    # The last timestep may have an alpha_bar of exactly 0, but not a tiny one.
    low = ~(alpha_bar >= LEAST_SIGNAL)
    low[-1] &= alpha_bar[-1] != 0.0
    if low.any() or alpha_bar[-1] < 0.0:
        signal = f"no signal from time step {int(low.argmax())} on" if low.any() else "less than no signal at the end"
        raise ModelError(
            f"{where}: {key}: got {signal}; allowed alpha_bar over {LEAST_SIGNAL:g} before the last time step"
        )
    if np.float32(alpha_bar[0]) == 1.0:
        raise ModelError(f"{where}: {key}: got no noise at time step 0; allowed a first beta of at least 1e-7")


def timesteps(schedule: DDPMSchedule, steps: int, key: str = STEPS_KEY) -> tuple[int, ...]:
    """Return the N timesteps of the denoiser calls, falling, placed as diffusers' DDIMScheduler places them.

    Raises:
        ModelError: the number of steps is below 1, exceeds the training timesteps, or gives timesteps outside the
            schedule.
    """
    count = schedule.train_timesteps
    if not 1 <= steps <= count:
        raise ModelError(f"{key}: got {steps}; allowed 1 to {count}, the model's training steps")
    # diffusers' three spacings. Leading: multiples of T // N from 0 up, plus the offset. Trailing: steps of T / N down
    # from T - 1. Linspace: N timesteps spread evenly from T - 1 to 0.
    if schedule.timestep_spacing == "leading":
        laid = np.arange(0.0, steps)[::-1] * (count // steps) + schedule.steps_offset
    elif schedule.timestep_spacing == "trailing":
        laid = np.round(np.arange(count, 0, -count / steps)) - 1
    else:
        laid = np.linspace(0, count - 1, steps).round()[::-1]
    if len(laid) != steps:  # rounding of T / N lets numpy's arange begin one step too many
        raise ModelError(
            f"{key}: got {steps}; diffusers' trailing spacing makes {len(laid)}, the last before time 0; "
            "allowed another number"
        )
    if laid[0] >= count:
        raise ModelError(
            f"{key}: got {steps}; with the scheduler's steps_offset of {schedule.steps_offset} they begin at time step "
            f"{int(laid[0])} of {count}; allowed fewer steps, or a smaller steps_offset"
        )
    return tuple(int(t) for t in laid)


def next_timestep(schedule: DDPMSchedule, t: int, steps: int) -> int:
    """Return the timestep that one DDIM step of an N-step sampler lands on; below 0 at the end of sampling."""
    return t - schedule.train_timesteps // steps
