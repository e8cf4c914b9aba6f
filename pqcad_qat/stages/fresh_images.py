"""Images for measurements before training: from noise that no trajectory of the calibration set begins with.

Not here: what is measured on them (float_steps.py, step_costs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.guidance import guided_call
from pqcad_qat.policy.schema import Policy
from pqcad_qat.sampling.trajectory import initial_noise
from pqcad_qat.stages.prepared import Prepared

IMAGES = 8
"""Largest number of images on which something is measured."""

Follow = Callable[[Tensor, float], Tensor]
"""A denoiser with its conditions and its guidance: (x_t, t) -> prediction."""


def fresh_noise(policy: Policy, prepared: Prepared) -> Tensor:
    """Noise with which no trajectory of the calibration set begins."""
    section = policy.calibration
    count = min(IMAGES, section.trajectories)
    return torch.from_numpy(initial_noise(section.seed, section.trajectories, count, prepared.model.sample_shape))


def fresh_follow(policy: Policy, prepared: Prepared, denoiser: nn.Module) -> Follow:
    """The denoiser with the conditions that belong to this noise, and with the sampler's guidance."""
    section, conditions = policy.calibration, prepared.conditions
    chosen = conditions.drawn(section.seed, section.trajectories, min(IMAGES, section.trajectories))
    return guided_call(partial(predict, denoiser), chosen, conditions.unconditional, policy.sampler.guidance_scale)
