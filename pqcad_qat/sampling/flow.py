"""Flow matching: the noise schedule of a FlowMatchEulerDiscreteScheduler, the Euler step and its inverse, as pure
functions.

Not here: DDPM's kin (ddim.py), and what both share (trajectory.py). Every function takes numpy arrays and torch tensors
alike.

Names are the papers': x_t = (1 - sigma) x_0 + sigma eps, the denoiser predicts the velocity eps - x_0, time is t =
sigma T. Sources: flow matching (Lipman et al. 2023), rectified flow (Liu et al. 2023), the shift of sigma (Esser et al.
2024, eq. 23).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddim import STEPS_KEY, Array, Walk
from pqcad_qat.sampling.schedulers import FLOW_SCHEDULER, MOST_TIMESTEPS, SIGMAS, Keys

FlowSpacing = Literal["linspace", "trailing"]

SPACING = "timestep_spacing"
"""Key of ours in a flow's scheduler config: what the model's pipeline of diffusers hands its scheduler, which the
config does not say.
"""

DIGITS = 4
"""Decimals of a time: float32 tells no more of 1000, and so equal times of two samplers are equal numbers."""

SHIFTS = (0.01, 100.0)
"""Between which a shift lies: beyond them times that are a training step apart come to be the same in DIGITS."""

DYNAMIC: Mapping[str, Any] = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
}
"""Keys of a dynamic shift, with what they mean where they are left out."""

UNKNOWN = ("invert_sigmas", "shift_terminal", *SIGMAS, "stochastic_sampling")
"""Keys of a scheduler config that make another schedule, or another sampler, of it."""


@dataclass(frozen=True)
class FlowSchedule:
    """What a FlowMatchEulerDiscreteScheduler's config says, as numbers.

    Attributes:
        shift: by which sigma is moved towards noise.
        timestep_spacing: how N steps are laid before the shift: linspace from 1 to the scheduler's smallest sigma, its
            own way, as Stable Diffusion 3 has it; or trailing, from 1 to 1/N, as Flux's pipeline asks for.
        train_timesteps: T.
    """

    shift: float
    timestep_spacing: FlowSpacing
    train_timesteps: int

    sampler: ClassVar[Literal["euler"]] = "euler"
    prediction_type: ClassVar[Literal["flow"]] = "flow"
    timestep_dtype: ClassVar[Literal["float32"]] = "float32"

    @property
    def config(self) -> dict[str, Any]:
        """Of the scheduler of diffusers that has this schedule, every key that decides it written out."""
        off = {key: None if key == "shift_terminal" else False for key in (*UNKNOWN, "use_dynamic_shifting")}
        return {"_class_name": FLOW_SCHEDULER, "num_train_timesteps": self.train_timesteps, "shift": self.shift, **off}

    def shifted(self, sigma: float) -> float:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def unshifted(self, sigma: float) -> float:
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def time(self, sigma: float) -> float:
        """t of a sigma before its shift."""
        return round(self.train_timesteps * self.shifted(sigma), DIGITS)

    def walk(self, steps: int, key: str = STEPS_KEY) -> Walk:
        """The steps of an N-step sampler, from noise at t = T to the image at 0; `key` is who asks for them.

        Raises:
            ModelError: fewer than 1 step, or more than the model was trained with.
        """
        count = self.train_timesteps
        if not 1 <= steps <= count:
            raise ModelError(f"{key}: got {steps}; allowed 1 to {count}, the model's training steps")
        last = 1 / steps if self.timestep_spacing == "trailing" else self.shifted(1 / count)
        return _through(self.time(float(sigma)) for sigma in np.linspace(1.0, last, steps))

    def student(self, steps: int, student_steps: int) -> FlowSchedule:
        """Itself: whatever their number, steps begin at t = T."""
        return self

    def passing(self, steps: int, students: Sequence[int]) -> Walk:
        """The steps of a walk that visits the times of N steps and of its students of so many."""
        return _through(t for count in (steps, *students) for t, _ in self.walk(count))

    def finer(self, walk: Walk, factor: int) -> tuple[Walk, ...]:
        """Each step of a walk in `factor` steps, even before the shift."""
        found = []
        for ends in walk:
            high, low = (self.unshifted(t / self.train_timesteps) for t in ends)
            inner = [self.time(high + (low - high) * number / factor) for number in range(1, factor)]
            found.append(tuple(pairwise([ends[0], *inner, ends[1]])))
        return tuple(found)

    def step(self, prediction: Array, x_t: Array, t: float, s: float) -> Array:
        """x_s (B, C, H, W) from x_t and the prediction there."""
        return euler_step(prediction, x_t, t / self.train_timesteps, s / self.train_timesteps)

    def inverse(self, x_t: Array, x_s: Array, t: float, s: float) -> Array:
        """The prediction that carries x_t to x_s in one step."""
        return euler_inverse(x_t, x_s, t / self.train_timesteps, s / self.train_timesteps)

    def error_weight(self, t: float, s: float = 0.0) -> float:
        """What a squared error of the velocity of a step weighs, in x_0 by truncated SNR.

        An error of x_0 = x_t - sigma v is sigma times one of v, and SNR = ((1 - sigma) / sigma)^2, so sigma^2 max(SNR,
        1) is:
        """
        sigma = t / self.train_timesteps
        return max((1 - sigma) ** 2, sigma**2)


def flow_schedule(config: Mapping[str, Any], where: str = "scheduler config") -> FlowSchedule:
    """Read the config of a FlowMatchEulerDiscreteScheduler whose shift is settled (`settled`); `where` is its file.

    Raises:
        ModelError: a key or a value that these functions do not know how to honour.
    """
    keys = Keys({"shift": 1.0, SPACING: "linspace", "num_train_timesteps": 1000, **config}, where)
    keys.off(UNKNOWN)
    if config.get("use_dynamic_shifting"):
        raise keys.fault(
            "use_dynamic_shifting", "null or false, but of a model whose pipeline says how, as Flux's does"
        )
    spacing = keys.choice(SPACING, get_args(FlowSpacing))
    timesteps = keys.whole("num_train_timesteps", 1, MOST_TIMESTEPS)
    return FlowSchedule(keys.number("shift", *SHIFTS), cast(FlowSpacing, spacing), timesteps)


def settled(config: Mapping[str, Any], tokens: int, where: str = "scheduler config") -> dict[str, Any]:
    """The config with a dynamic shift as the fixed one that it is for an image of so many tokens, and the spacing of
    Flux's pipeline.

    diffusers' time_shift(mu) is the fixed shift by e^mu, of type linear by mu; mu lies on the line through the config's
    two ends.

    Raises:
        ModelError: a key or a value that is not one of a dynamic shift.
    """
    found = {**config, SPACING: "trailing"}
    if found.get("use_dynamic_shifting"):
        keys = Keys({**DYNAMIC, **config}, where)
        ends = [keys.number(key) for key in ("base_image_seq_len", "max_image_seq_len")]
        shifts = [keys.number(key, above=-10, below=10) for key in ("base_shift", "max_shift")]
        if ends[0] == ends[1]:
            raise keys.fault("max_image_seq_len", "another number than base_image_seq_len")
        mu = shifts[0] + (shifts[1] - shifts[0]) * (tokens - ends[0]) / (ends[1] - ends[0])
        linear = keys.choice("time_shift_type", ("exponential", "linear")) == "linear"
        low, high = SHIFTS if linear else (math.log(shift) for shift in SHIFTS)
        if not low < mu < high:
            raise keys.fault(
                "max_shift",
                f"one that comes to a shift of {SHIFTS[0]:g} to {SHIFTS[1]:g} for {tokens} tokens; this is {mu:g}",
            )
        found |= {"use_dynamic_shifting": False, "shift": mu if linear else math.exp(mu)}
    return found


def euler_step(velocity: Array, x_t: Array, sigma_t: Any, sigma_s: Any) -> Array:
    """One Euler step of the flow from sigma_t to the smaller sigma_s: x_s = x_t + (sigma_s - sigma_t) v."""
    return cast(Array, cast(Any, x_t) + (sigma_s - sigma_t) * cast(Any, velocity))


def euler_inverse(x_t: Array, x_s: Array, sigma_t: Any, sigma_s: Any) -> Array:
    """The velocity that carries x_t to x_s in one Euler step: `euler_step` solved for it."""
    return cast(Array, (cast(Any, x_s) - cast(Any, x_t)) / (sigma_s - sigma_t))


def _through(times: Iterable[float]) -> Walk:
    """The steps from each of the times to the next smaller one, the last to 0."""
    return tuple(pairwise([*sorted(set(times), reverse=True), 0.0]))
