"""DDPM's kin: noise schedules, timesteps, the DDIM step and its inverse, as pure functions.

Not here: which scheduler classes are DDPM's kin, and their keys (schedulers.py), named betas (betas.py), the effect of
clipping on a step's inverse (clipping.py), flow matching (flow.py), or code that both kinds of schedule share
(trajectory.py). Every function takes numpy arrays and torch tensors alike.

Names follow the papers: x_t is the state, x_0 the image, eps the noise and v the velocity. alpha_bar_t is the share of
signal, whose square root multiplies x_0. Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021, eq. 12), v (Salimans
and Ho 2022, appendix D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.betas import Betas, betas_of, named_betas, zero_terminal_snr
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

Array = TypeVar("Array")  # a numpy array or a torch tensor


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
                f"{key}: got {steps}; they begin at time step {times[0]}, where rescale_betas_zero_snr "
                "leaves no signal and epsilon says "
                "nothing of the picture; allowed a scheduler of v_prediction or sample, or of timestep_spacing leading"
            )
        return tuple((t, next_timestep(self, t, steps)) for t in times)

    def student(self, steps: int, student_steps: int) -> DDPMSchedule:
        """Return a schedule for a sampler of fewer steps that starts at the same timestep as this schedule's N-step
        sampler.

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
                "distillation.student_steps: got 1; with linspace spacing one step begins at time step "
                "0; allowed 2 or more"
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
        """Split each step of a sampler, up to the timestep of the next, into `factor` parts as even as whole timesteps
        allow.

        A step has fewer parts where there are not enough whole timesteps.
        """
        if factor == 1:
            return tuple((step,) for step in walk)
        found = []
        # Divide the stretch from one visited timestep to the next. Rounding to whole timesteps may make duplicates,
        # which the set removes.
        for t, end in pairwise([*(t for t, _ in walk), walk[-1][1]]):
            inner = {t - round((t - end) * number / factor) for number in range(factor)}
            found.append(tuple(pairwise([*sorted((u for u in inner if u >= 0 and u > end), reverse=True), end])))
        return tuple(found)

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

    def error_weight(self, t: float, s: float = END) -> float:
        """Return the weight of a squared prediction error at a step, which measures it in x_0 with truncated SNR.

        The weight is 0 where the prediction carries no information about x_0, or where the step does not move x_t.
        """
        signal = self.alpha_bar_at(t)
        told = self.prediction_type != "epsilon" or signal >= LOW_SIGNAL
        return truncated_snr_weight(signal, self.prediction_type) if told and signal != self.alpha_bar_at(s) else 0.0


def ddpm_schedule(config: Mapping[str, Any], where: str = "scheduler config") -> DDPMSchedule:
    """Read a diffusers scheduler config (DDPM, DDIM and their kin; DDIM where it names no class); `where` names its
    file.

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
        what = f"no signal is left from time step {int(low.argmax())} on" if low.any() else "less than none"
        raise ModelError(f"{where}: {key}: {what}; allowed alpha_bar over {LEAST_SIGNAL:g} before the last time step")
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
            f"{key}: got {steps}; diffusers' trailing spacing lays {len(laid)}, the last before time 0; allowed another"
        )
    if laid[0] >= count:
        raise ModelError(
            f"{key}: got {steps}; with the scheduler's steps_offset of {schedule.steps_offset} they begin "
            f"at time step {int(laid[0])} of "
            f"{count}; allowed fewer steps, or a smaller steps_offset"
        )
    return tuple(int(t) for t in laid)


def next_timestep(schedule: DDPMSchedule, t: int, steps: int) -> int:
    """Return the timestep that one DDIM step of an N-step sampler lands on; below 0 at the end of sampling."""
    return t - schedule.train_timesteps // steps


def split_prediction(
    prediction: Array, x_t: Array, alpha_bar_t: Any, prediction_type: PredictionType
) -> tuple[Array, Array]:
    """Return the (x_0, eps) that a prediction at x_t stands for; alpha_bar_t is a number or broadcasts over (B, C, H,
    W).
    """
    p, x = cast(Any, prediction), cast(Any, x_t)
    signal, noise = alpha_bar_t**0.5, (1.0 - alpha_bar_t) ** 0.5
    if prediction_type == "epsilon":
        return (x - noise * p) / signal, p
    if prediction_type == "sample":
        return p, (x - signal * p) / noise
    return signal * x - noise * p, signal * p + noise * x


def join_prediction(x_0: Array, eps: Array, alpha_bar_t: Any, prediction_type: PredictionType) -> Array:
    """Return the prediction that stands for (x_0, eps) at alpha_bar_t, the inverse of `split_prediction`."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    return cast(Array, alpha_bar_t**0.5 * cast(Any, eps) - (1.0 - alpha_bar_t) ** 0.5 * cast(Any, x_0))


def ddim_step(
    prediction: Array,
    x_t: Array,
    alpha_bar_t: Any,
    alpha_bar_s: Any,
    *,
    prediction_type: PredictionType,
    clip_sample_range: float | None = None,
) -> Array:
    """Make one deterministic DDIM step from t to the less noisy s (Song et al. 2021, eq. 12 with eta = 0).

    Args:
        prediction: (B, C, H, W), the denoiser's output at x_t.
        x_t: (B, C, H, W).
        alpha_bar_t, alpha_bar_s: numbers, or arrays that broadcast over (B, C, H, W).
        prediction_type: quantity that the denoiser predicts.
        clip_sample_range: bound on the predicted x_0; eps stays as predicted, as in diffusers.

    Returns:
        (B, C, H, W), the state x_s.
    """
    x_0, eps = split_prediction(prediction, x_t, alpha_bar_t, prediction_type)
    if clip_sample_range is not None:
        x_0 = cast(Any, x_0).clip(-clip_sample_range, clip_sample_range)
    return cast(Array, alpha_bar_s**0.5 * cast(Any, x_0) + (1.0 - alpha_bar_s) ** 0.5 * cast(Any, eps))


def ddim_inverse(
    x_t: Array, x_s: Array, alpha_bar_t: Any, alpha_bar_s: Any, *, prediction_type: PredictionType
) -> Array:
    """Return the prediction that takes x_t to x_s in one DDIM step: `ddim_step` solved for it (Salimans and Ho 2022,
    appendix G).

    x_t and x_s give two linear equations in (x_0, eps). Their determinant is 0 only where t and s are the same
    timestep.
    """
    signal_t, noise_t = alpha_bar_t**0.5, (1.0 - alpha_bar_t) ** 0.5
    signal_s, noise_s = alpha_bar_s**0.5, (1.0 - alpha_bar_s) ** 0.5
    determinant = signal_t * noise_s - noise_t * signal_s
    t, s = cast(Any, x_t), cast(Any, x_s)
    x_0 = (t * noise_s - s * noise_t) / determinant
    eps = (s * signal_t - t * signal_s) / determinant
    return cast(Array, join_prediction(x_0, eps, alpha_bar_t, prediction_type))


def add_noise(x_0: Array, eps: Array, alpha_bar_t: Any) -> Array:
    """Return x_t of the forward process (Ho et al. 2020, eq. 4)."""
    return cast(Array, alpha_bar_t**0.5 * cast(Any, x_0) + (1.0 - alpha_bar_t) ** 0.5 * cast(Any, eps))


def truncated_snr_weight(alpha_bar: float, prediction_type: PredictionType) -> float:
    """Return the weight that turns a prediction's squared error into max(SNR, 1) times the squared error of x_0.

    With SNR = a / (1 - a), where a is alpha_bar, an error of x_0 is sqrt((1 - a) / a) times one of epsilon, and sqrt(1
    - a) times one of v (Salimans and Ho 2022, section 4).
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "epsilon":
        return (1 - alpha_bar) / alpha_bar * max(snr, 1.0)
    return (1 - alpha_bar if prediction_type == "v_prediction" else 1.0) * max(snr, 1.0)
