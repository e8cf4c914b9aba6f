"""Images from the noise of held-out trajectories: how near a trained model's are to full precision's own.

The loss of single sampling steps does not tell it. At 8 bits most of that loss is rounding, which averages out over the
steps of a trajectory; training lowers it by shifts of the weights, which add up. So the weights that a stage keeps are
chosen by whole images, one by one and as a set.

Not here: the held-out loss (training/held_out.py), and the figures of the report (quality/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.guidance import guided_call
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import REFERENCE
from pqcad_qat.quality.fidelity import nearness_to
from pqcad_qat.quality.patch_distance import patch_distance
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.quantization.plan import evaluating
from pqcad_qat.sampling.precision_by_time import StepsInFloat, by_time
from pqcad_qat.sampling.trajectory import initial_noise, landing
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.training.held_out import ImageFigures, divided

IMAGES = 16
"""Largest number of images that are compared."""

MeasuredImages = Callable[[nn.Module], ImageFigures]
"""A function that compares a model's held-out images with full precision's own."""


def measured_images(
    policy: Policy, prepared: Prepared, calibration: CalibrationSet, *, variant: str, in_float: StepsInFloat
) -> MeasuredImages:
    """Return the measure for a variant, some of whose sampling steps full precision computes."""
    rows = range(len(calibration.states))[divided(len(calibration.states))[1]][:IMAGES]
    noise = torch.from_numpy(initial_noise(policy.calibration.seed, rows.start, len(rows), prepared.model.sample_shape))
    condition = {name: value[rows.start : rows.stop] for name, value in calibration.condition.items()}
    full = partial(predict, prepared.model.denoiser)

    def images(call: Callable[[Tensor, float, Mapping[str, Any]], Tensor], name: str) -> Tensor:
        schedule = prepared.sampled_by(policy, name)
        follow = guided_call(call, condition, calibration.unconditional, policy.guidance_scale(name))
        return landing(schedule.walk(policy.sampling_steps(name)), follow, noise, schedule)

    @cache
    def wanted_images() -> Tensor:
        return images(full, REFERENCE)

    def figures(model: nn.Module) -> ImageFigures:
        denoisers = prepared.model.denoiser, model
        with evaluating(denoisers[0]), evaluating(model), on_accelerator(*denoisers), frozen_weights(model):
            quantized = by_time(full, partial(predict, model), prepared.sampled_by(policy, variant), in_float)
            own, wanted = images(quantized, variant), wanted_images()
        psnr = nearness_to(wanted, own, latent=prepared.model.latent)
        shown = (own, wanted) if prepared.model.latent else (own.clamp(-1, 1), wanted.clamp(-1, 1))
        return ImageFigures(psnr, patch_distance(*shown))

    return figures
