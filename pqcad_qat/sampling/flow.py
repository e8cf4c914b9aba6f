"""Flow matching: the noise schedule of a FlowMatchEulerDiscreteScheduler, the Euler step and its inverse.

All are pure functions, and take numpy arrays and torch tensors alike.

Not here: DDPM's kin (ddpm_schedule.py), or code that both kinds of schedule share (trajectory.py).

Names follow the papers: x_t = (1 - sigma) x_0 + sigma eps, the denoiser predicts the velocity eps - x_0, and time is t
= sigma T. Sources: flow matching (Lipman et al. 2023), rectified flow (Liu et al. 2023), the shift of sigma (Esser et
al. 2024, eq. 23).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddim import Array
from pqcad_qat.sampling.ddpm_schedule import STEPS_KEY, Walk
from pqcad_qat.sampling.schedulers import FLOW_SCHEDULER, MOST_TIMESTEPS, SIGMAS, Keys

FlowSpacing = Literal["linspace", "trailing"]
"""Rule that places the sampling steps; see FlowSchedule.timestep_spacing."""

SPACING = "timestep_spacing"
"""Key that this package adds to a flow scheduler's config: the spacing of sigmas.

diffusers' pipeline passes the sigmas to its scheduler, and the config does not hold them.
"""

DIGITS = 4
"""Number of decimals of a time. float32 has no more near 1000, and rounding makes equal times of two samplers compare
equal.
"""

SHIFTS = (0.01, 100.0)
"""Bounds of the shift. Beyond them, times one training step apart become equal at DIGITS decimals."""

DYNAMIC: Mapping[str, Any] = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
}
"""Keys of a dynamic shift, with their defaults."""

UNKNOWN = ("invert_sigmas", "shift_terminal", *SIGMAS, "stochastic_sampling")
"""Keys of a scheduler config that change the schedule or the sampler in a way that is not supported."""


@dataclass(frozen=True)
class FlowSchedule:
    """The noise schedule of a FlowMatchEulerDiscreteScheduler's config, as numbers.

    Attributes:
        shift: factor that moves sigma towards noise.
        timestep_spacing: rule that places N steps before the shift. `linspace` runs from 1 to the scheduler's smallest
            sigma, as in Stable Diffusion 3; `trailing` runs from 1 to 1/N, as in Flux's pipeline.
        train_timesteps: number T of training timesteps.
    """

    shift: float
    timestep_spacing: FlowSpacing
    train_timesteps: int

    sampler: ClassVar[Literal["euler"]] = "euler"
    prediction_type: ClassVar[Literal["flow"]] = "flow"
    timestep_dtype: ClassVar[Literal["float32"]] = "float32"

    @property
    def config(self) -> dict[str, Any]:
        """Config of diffusers' scheduler with this schedule, with every key that decides it."""
        off = {key: None if key == "shift_terminal" else False for key in (*UNKNOWN, "use_dynamic_shifting")}
        return {"_class_name": FLOW_SCHEDULER, "num_train_timesteps": self.train_timesteps, "shift": self.shift, **off}

    def shifted(self, sigma: float) -> float:
        """Return a sigma moved towards noise by the shift (Esser et al. 2024, eq. 23)."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def unshifted(self, sigma: float) -> float:
        """Return the sigma that `shifted` maps to the given one."""
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def time(self, sigma: float) -> float:
        """Return the time t of a sigma before its shift."""
        return round(self.train_timesteps * self.shifted(sigma), DIGITS)

    def walk(self, steps: int, key: str = STEPS_KEY) -> Walk:
        """Return the steps of an N-step sampler, from noise at t = T to the image at 0.

        `key` names the number of steps in messages.

        Raises:
            ModelError: the number of steps is below 1, or exceeds the training timesteps.
        """
        count = self.train_timesteps
        if not 1 <= steps <= count:
            raise ModelError(f"{key}: got {steps}; allowed 1 to {count}, the model's training steps")
        last = 1 / steps if self.timestep_spacing == "trailing" else self.shifted(1 / count)
        return _through(self.time(float(sigma)) for sigma in np.linspace(1.0, last, steps))

    def student(self, steps: int, student_steps: int) -> FlowSchedule:
        """Return this schedule itself: any number of steps starts at t = T."""
        return self

    def passing(self, steps: int, students: Sequence[int]) -> Walk:
        """Return steps that visit the times of the N-step sampler and of its students."""
        return _through(t for count in (steps, *students) for t, _ in self.walk(count))

    def finer(self, walk: Walk, factor: int) -> tuple[Walk, ...]:
        """Split each step into `factor` steps that are even before the shift."""
        split_steps = []
        for ends in walk:
            high, low = (self.unshifted(t / self.train_timesteps) for t in ends)
            inner = [self.time(high + (low - high) * index / factor) for index in range(1, factor)]
            split_steps.append(tuple(pairwise([ends[0], *inner, ends[1]])))
        return tuple(split_steps)

    def noised(self, x_0: Array, eps: Array, t: float) -> Array:
        """Return the state x_t (B, C, H, W) of images with this noise."""
        sigma = t / self.train_timesteps
        return cast(Array, (1 - sigma) * cast(Any, x_0) + sigma * cast(Any, eps))

    def step(self, prediction: Array, x_t: Array, t: float, s: float) -> Array:
        """Return x_s (B, C, H, W) from x_t and the prediction at x_t."""
        return euler_step(prediction, x_t, t / self.train_timesteps, s / self.train_timesteps)

    def inverse(self, x_t: Array, x_s: Array, t: float, s: float) -> Array:
        """Return the prediction that takes x_t to x_s in one step."""
        return euler_inverse(x_t, x_s, t / self.train_timesteps, s / self.train_timesteps)

    def prediction_to(self, x_t: Array, x_s: Array, t: float, s: float) -> Array:
        """Return the prediction from which `step` lands on x_s; this sampler clips nothing."""
        return self.inverse(x_t, x_s, t, s)

    def moves(self, t: float, s: float) -> bool:
        """Return whether a step changes the state."""
        return t != s

    def informative(self, t: float) -> bool:
        """Return whether a prediction at t says anything of x_0: a velocity always does."""
        return True


def flow_schedule(config: Mapping[str, Any], where: str = "scheduler config") -> FlowSchedule:
    """Read the config of a FlowMatchEulerDiscreteScheduler whose shift is fixed (see `settled`).

    `where` names its file.

    Raises:
        ModelError: a key or value is not supported.
    """
    keys = Keys({"shift": 1.0, SPACING: "linspace", "num_train_timesteps": 1000, **config}, where)
    keys.off(UNKNOWN)
    if config.get("use_dynamic_shifting"):
        raise keys.fault(
            "use_dynamic_shifting", "null or false, unless the model's pipeline says how to shift, as Flux's does"
        )
    spacing = keys.choice(SPACING, get_args(FlowSpacing))
    timesteps = keys.whole("num_train_timesteps", 1, MOST_TIMESTEPS)
    return FlowSchedule(keys.finite("shift", *SHIFTS), cast(FlowSpacing, spacing), timesteps)


def settled(config: Mapping[str, Any], tokens: int, where: str = "scheduler config") -> dict[str, Any]:
    """Return the config with trailing spacing and the fixed shift that its dynamic shift gives for `tokens` tokens.

    diffusers' time_shift(mu) equals the fixed shift by e^mu, or by mu for time_shift_type linear. mu is linear in the
    number of tokens, on the line through the two ends in the config. Trailing spacing is that of Flux's pipeline.

    Raises:
        ModelError: a key or value of the dynamic shift is not supported.
    """
    settled_config = {**config, SPACING: "trailing"}
    if settled_config.get("use_dynamic_shifting"):
        keys = Keys({**DYNAMIC, **config}, where)
        ends = [keys.finite(key) for key in ("base_image_seq_len", "max_image_seq_len")]
        shifts = [keys.finite(key, above=-10, below=10) for key in ("base_shift", "max_shift")]
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
        settled_config |= {"use_dynamic_shifting": False, "shift": mu if linear else math.exp(mu)}
    return settled_config


def euler_step(velocity: Array, x_t: Array, sigma_t: Any, sigma_s: Any) -> Array:
    """Make one Euler step of the flow from sigma_t to the smaller sigma_s: x_s = x_t + (sigma_s - sigma_t) v."""
    return cast(Array, cast(Any, x_t) + (sigma_s - sigma_t) * cast(Any, velocity))


def euler_inverse(x_t: Array, x_s: Array, sigma_t: Any, sigma_s: Any) -> Array:
    """Return the velocity that takes x_t to x_s in one Euler step: `euler_step` solved for it."""
    return cast(Array, (cast(Any, x_s) - cast(Any, x_t)) / (sigma_s - sigma_t))


def _through(times: Iterable[float]) -> Walk:
    """Return the steps from each time to the next smaller one, and from the last to 0."""
    return tuple(pairwise([*sorted(set(times), reverse=True), 0.0]))
