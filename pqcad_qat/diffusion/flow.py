"""Flow matching: the noise schedule of a FlowMatchEulerDiscreteScheduler, the Euler step and its inverse, as pure functions.

Not here: DDPM's kin (ddim.py), and what both share (sampling.py). Every function takes numpy arrays and torch tensors alike.

Names are the papers': x_t = (1 - sigma) x_0 + sigma eps, the denoiser predicts the velocity eps - x_0, time is t = sigma T. Sources: flow
matching (Lipman et al. 2023), rectified flow (Liu et al. 2023), the shift of sigma (Esser et al. 2024, eq. 23).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np

from pqcad_qat.diffusion.ddim import Array, Walk
from pqcad_qat.errors import ModelError

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
FlowSpacing = Literal["linspace", "trailing"]

SPACING = "timestep_spacing"
"""Key of ours in a flow's scheduler config: what the model's pipeline of diffusers hands its scheduler, which the config does not say."""

DIGITS = 4
"""Decimals of a time: float32 tells no more of 1000, and so equal times of two samplers are equal numbers."""

UNKNOWN = ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")
"""Keys of a scheduler config that make another schedule, or another sampler, of it."""


@dataclass(frozen=True)
class FlowSchedule:
    """What a FlowMatchEulerDiscreteScheduler's config says, as numbers.

    Attributes:
        shift: by which sigma is moved towards noise.
        timestep_spacing: how N steps are laid before the shift: linspace from 1 to the scheduler's smallest sigma, its own way, as Stable
            Diffusion 3 has it; or trailing, from 1 to 1/N, as Flux's pipeline asks for.
        train_timesteps: T.
    """

    shift: float
    timestep_spacing: FlowSpacing
    train_timesteps: int

    sampler: ClassVar[Literal["euler"]] = "euler"
    prediction_type: ClassVar[Literal["flow"]] = "flow"
    timestep_dtype: ClassVar[Literal["float32"]] = "float32"

    def shifted(self, sigma: float) -> float:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def unshifted(self, sigma: float) -> float:
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def time(self, sigma: float) -> float:
        """t of a sigma before its shift."""
        return round(self.train_timesteps * self.shifted(sigma), DIGITS)

    def walk(self, steps: int) -> Walk:
        """The steps of an N-step sampler, from noise at t = T to the image at 0.

        Raises:
            ModelError: fewer than 1 step, or more than the model was trained with.
        """
        count = self.train_timesteps
        if not 1 <= steps <= count:
            raise ModelError(f"sampling steps: got {steps}; allowed 1 to {count}, the model's training steps")
        last = 1 / steps if self.timestep_spacing == "trailing" else self.shifted(1 / count)
        return _through(self.time(float(sigma)) for sigma in np.linspace(1.0, last, steps))

    def passing(self, counts: Sequence[int]) -> Walk:
        """The steps of a walk that visits the times of several samplers."""
        return _through(t for count in counts for t, _ in self.walk(count))

    def finer(self, walk: Walk, factor: int, asked: str) -> tuple[Walk, ...]:
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

    def error_weight(self, t: float) -> float:
        """What a squared error of a velocity at t weighs, in x_0 by truncated SNR.

        An error of x_0 = x_t - sigma v is sigma times one of v, and SNR = ((1 - sigma) / sigma)^2, so sigma^2 max(SNR, 1) is:
        """
        sigma = t / self.train_timesteps
        return max((1 - sigma) ** 2, sigma**2)


def flow_schedule(config: Mapping[str, Any]) -> FlowSchedule:
    """Read the config of a FlowMatchEulerDiscreteScheduler whose shift is settled (`settled`).

    Raises:
        ModelError: a key that these functions do not know how to honour.
    """
    for key in UNKNOWN:
        if config.get(key):
            raise ModelError(f"scheduler config: {key}: got {config[key]}; allowed null or false")
    if config.get("use_dynamic_shifting"):
        raise ModelError("scheduler config: use_dynamic_shifting: got true; allowed of a model whose pipeline says how, as Flux's does")
    spacing = config.get(SPACING, "linspace")
    if spacing not in get_args(FlowSpacing):
        raise ModelError(f"scheduler config: {SPACING}: got {spacing!r}; allowed {', '.join(get_args(FlowSpacing))}")
    return FlowSchedule(float(config.get("shift", 1.0)), spacing, int(config.get("num_train_timesteps", 1000)))


def settled(config: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The config with a dynamic shift as the fixed one that it is for an image of so many tokens, and the spacing of Flux's pipeline.

    diffusers' time_shift(mu) is the fixed shift by e^mu, of type linear by mu; mu lies on the line through the config's two ends.
    """
    found = {**config, SPACING: "trailing"}
    if found.get("use_dynamic_shifting"):
        ends = [float(config.get(key, default)) for key, default in (("base_image_seq_len", 256), ("max_image_seq_len", 4096))]
        shifts = [float(config.get(key, default)) for key, default in (("base_shift", 0.5), ("max_shift", 1.15))]
        mu = shifts[0] + (shifts[1] - shifts[0]) * (tokens - ends[0]) / (ends[1] - ends[0])
        linear = config.get("time_shift_type", "exponential") == "linear"
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
