"""DDPM's kin: noise schedules, time steps, the DDIM step and its inverse, as pure functions.

Not here: flow matching (flow.py), and what both share (sampling.py). Every function takes numpy arrays and torch tensors alike.

Names are the papers': x_t the state, x_0 the image, eps the noise, v the velocity, alpha_bar_t the share of signal (its square root
multiplies x_0). Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021, eq. 12), v (Salimans and Ho 2022, appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]

Walk = tuple[tuple[float, float], ...]
"""The steps of a sampler: (t, s), from time t to the less noisy s."""

CLIPPING = ("DDIMScheduler", "DDPMScheduler")
"""diffusers' schedulers that clip x_0 unless their config says no; Euler's and the solvers' know no clipping."""

LOW_SIGNAL = 1e-3
"""alpha_bar under which epsilon says nothing about x_0."""

Array = TypeVar("Array")  # a numpy array or a torch tensor


@dataclass(frozen=True)
class DDPMSchedule:
    """What a diffusers scheduler config says, as numbers.

    Attributes:
        alpha_bar: (T,) float64, share of signal at every training time step, falling.
        prediction_type: what the denoiser predicts.
        timestep_spacing: how N sampling steps are laid over T.
        steps_offset: added to the steps of `leading` spacing.
        final_alpha_bar: share of signal after the last step.
        clip_sample_range: bound on the predicted x_0, None where it is not clipped.
    """

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
        return len(self.alpha_bar)

    def alpha_bar_at(self, t: float) -> float:
        """alpha_bar at time step t; every t below 0 stands for the end of sampling."""
        return float(self.alpha_bar[int(t)]) if t >= 0 else self.final_alpha_bar

    def walk(self, steps: int) -> Walk:
        """The steps of an N-step sampler."""
        return tuple((t, next_timestep(self, t, steps)) for t in timesteps(self, steps))

    def passing(self, counts: Sequence[int]) -> Walk:
        """The steps of the longest of several samplers, which visits the time steps of the others."""
        return self.walk(max(counts))

    def finer(self, walk: Walk, factor: int, asked: str) -> tuple[Walk, ...]:
        """Each step of a whole walk as the steps that a sampler of `factor` times as many makes there; `asked` begins a complaint.

        Raises:
            ModelError: with this spacing the finer sampler passes by the walk's time steps.
        """
        fine = self.walk(len(walk) * factor)
        visited = [t for t, _ in fine]
        if missed := [t for t, _ in walk if t not in visited]:
            raise ModelError(
                f"{asked}: with {self.timestep_spacing} spacing {len(fine)} steps do not visit {len(missed)} of the time steps of "
                f"{len(walk)} steps; allowed with leading or trailing spacing, in divisors of the {self.train_timesteps} of training"
            )
        firsts = [visited.index(t) for t, _ in walk]
        return tuple(fine[first:last] for first, last in pairwise([*firsts, len(fine)]))

    def step(self, prediction: Array, x_t: Array, t: float, s: float) -> Array:
        """x_s (B, C, H, W) from x_t and the prediction there."""
        return ddim_step(prediction, x_t, self.alpha_bar_at(t), self.alpha_bar_at(s), self.prediction_type, self.clip_sample_range)

    def inverse(self, x_t: Array, x_s: Array, t: float, s: float) -> Array:
        """The prediction that carries x_t to x_s in one step."""
        return ddim_inverse(x_t, x_s, self.alpha_bar_at(t), self.alpha_bar_at(s), self.prediction_type)

    def error_weight(self, t: float) -> float:
        """What a squared error of a prediction at t weighs, in x_0 by truncated SNR; 0 where a prediction says nothing of x_0."""
        signal = self.alpha_bar_at(t)
        told = self.prediction_type != "epsilon" or signal >= LOW_SIGNAL
        return truncated_snr_weight(signal, self.prediction_type) if told else 0.0


def ddpm_schedule(config: Mapping[str, Any]) -> DDPMSchedule:
    """Read a diffusers scheduler config (DDPM, DDIM and their kin).

    Raises:
        ModelError: a key that these functions do not know how to honour.
    """
    if config.get("thresholding"):
        raise ModelError("scheduler config: thresholding: got true; allowed false (dynamic thresholding is not a fixed function of x_t)")
    alpha_bar = np.cumprod(1.0 - _betas(config), dtype=np.float64)
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in get_args(PredictionType):
        raise ModelError(f"scheduler config: prediction_type: got {prediction_type!r}; allowed {', '.join(get_args(PredictionType))}")
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in get_args(TimestepSpacing):
        raise ModelError(f"scheduler config: timestep_spacing: got {spacing!r}; allowed {', '.join(get_args(TimestepSpacing))}")
    clipped = config.get("clip_sample", config.get("_class_name", "DDIMScheduler") in CLIPPING)
    return DDPMSchedule(
        alpha_bar=alpha_bar,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=int(config.get("steps_offset", 0)),
        final_alpha_bar=1.0 if config.get("set_alpha_to_one", True) else float(alpha_bar[0]),
        clip_sample_range=float(config.get("clip_sample_range", 1.0)) if clipped else None,
    )


def _betas(config: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """(T,) noise variances beta_t of the config's schedule, with diffusers' names."""
    count = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    elif kind == "linear":
        betas = np.linspace(first, last, count)
    elif kind == "scaled_linear":
        betas = np.linspace(math.sqrt(first), math.sqrt(last), count) ** 2
    elif kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, eq. 17
        ends = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1.0 - ends[1:] / ends[:-1], 0.999)
    else:
        raise ModelError(f"scheduler config: beta_schedule: got {kind!r}; allowed linear, scaled_linear, squaredcos_cap_v2")
    return _zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _zero_terminal_snr(betas: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1.0 - alphas


def timesteps(schedule: DDPMSchedule, steps: int) -> tuple[int, ...]:
    """The N time steps at which the denoiser is called, falling, as diffusers' DDIMScheduler lays them.

    Raises:
        ModelError: fewer than 1 step, or more than the model was trained with.
    """
    count = schedule.train_timesteps
    if not 1 <= steps <= count:
        raise ModelError(f"sampling steps: got {steps}; allowed 1 to {count}, the model's training steps")
    if schedule.timestep_spacing == "leading":
        laid = np.arange(0, steps) * (count // steps) + schedule.steps_offset
        return tuple(int(t) for t in laid[::-1])
    if schedule.timestep_spacing == "trailing":
        return tuple(int(t) for t in np.round(np.arange(count, 0, -count / steps)) - 1)
    return tuple(int(t) for t in np.linspace(0, count - 1, steps).round()[::-1])


def next_timestep(schedule: DDPMSchedule, t: int, steps: int) -> int:
    """The time step that one DDIM step of an N-step sampler lands on; below 0 at the end of sampling."""
    return t - schedule.train_timesteps // steps


def split_prediction(prediction: Array, x_t: Array, alpha_bar_t: Any, prediction_type: PredictionType) -> tuple[Array, Array]:
    """(x_0, eps) that a prediction at x_t stands for; alpha_bar_t is a number or broadcasts over (B, C, H, W)."""
    p, x = cast(Any, prediction), cast(Any, x_t)
    signal, noise = alpha_bar_t**0.5, (1.0 - alpha_bar_t) ** 0.5
    if prediction_type == "epsilon":
        return (x - noise * p) / signal, p
    if prediction_type == "sample":
        return p, (x - signal * p) / noise
    return signal * x - noise * p, signal * p + noise * x


def join_prediction(x_0: Array, eps: Array, alpha_bar_t: Any, prediction_type: PredictionType) -> Array:
    """The prediction that stands for (x_0, eps) at alpha_bar_t: the inverse of `split_prediction`."""
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
    prediction_type: PredictionType,
    clip_sample_range: float | None = None,
) -> Array:
    """One deterministic DDIM step from t to the less noisy s (Song et al. 2021, eq. 12 with eta = 0).

    Args:
        prediction: (B, C, H, W), the denoiser's output at x_t.
        x_t: (B, C, H, W).
        alpha_bar_t, alpha_bar_s: numbers, or arrays that broadcast over (B, C, H, W).
        clip_sample_range: bound on the predicted x_0; eps is left as predicted, as diffusers does.

    Returns:
        (B, C, H, W), the state x_s.
    """
    x_0, eps = split_prediction(prediction, x_t, alpha_bar_t, prediction_type)
    if clip_sample_range is not None:
        x_0 = cast(Any, x_0).clip(-clip_sample_range, clip_sample_range)
    return cast(Array, alpha_bar_s**0.5 * cast(Any, x_0) + (1.0 - alpha_bar_s) ** 0.5 * cast(Any, eps))


def ddim_inverse(x_t: Array, x_s: Array, alpha_bar_t: Any, alpha_bar_s: Any, prediction_type: PredictionType) -> Array:
    """The prediction that carries x_t to x_s in one DDIM step: `ddim_step` solved for it (Salimans and Ho 2022, appendix G).

    x_t and x_s are two linear equations in (x_0, eps); the determinant is 0 only where t and s are the same time.
    """
    signal_t, noise_t = alpha_bar_t**0.5, (1.0 - alpha_bar_t) ** 0.5
    signal_s, noise_s = alpha_bar_s**0.5, (1.0 - alpha_bar_s) ** 0.5
    determinant = signal_t * noise_s - noise_t * signal_s
    t, s = cast(Any, x_t), cast(Any, x_s)
    x_0 = (t * noise_s - s * noise_t) / determinant
    eps = (s * signal_t - t * signal_s) / determinant
    return cast(Array, join_prediction(x_0, eps, alpha_bar_t, prediction_type))


def add_noise(x_0: Array, eps: Array, alpha_bar_t: Any) -> Array:
    """x_t of the forward process (Ho et al. 2020, eq. 4)."""
    return cast(Array, alpha_bar_t**0.5 * cast(Any, x_0) + (1.0 - alpha_bar_t) ** 0.5 * cast(Any, eps))


def truncated_snr_weight(alpha_bar: float, prediction_type: PredictionType) -> float:
    """Weight that turns a squared error of a prediction into max(SNR, 1) times the squared error of x_0 (Salimans and Ho 2022, section 4).

    With SNR = a / (1 - a), an error of x_0 is sqrt((1 - a) / a) times one of epsilon, and sqrt(1 - a) times one of v.
    """
    in_x_0 = {"epsilon": (1 - alpha_bar) / alpha_bar, "v_prediction": 1 - alpha_bar, "sample": 1.0}[prediction_type]
    snr = alpha_bar / (1 - alpha_bar)
    return in_x_0 * max(snr, 1.0)
