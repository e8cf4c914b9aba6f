"""What a variant's denoiser is exported from: its integers, its sampler, and where it comes from.

Not here: what a deployed folder holds beside its denoiser (deploy.py), and how it is written (export/).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.export.export_model import ExportRequest
from pqcad_qat.models.conditions import GUIDANCE, NULL_CLASS, exported_inputs
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.conversion import integer_layers
from pqcad_qat.sampling.schedulers import STEPS
from pqcad_qat.sampling.trajectory import written_out
from pqcad_qat.serving.deployed_folder import EMBEDDED_GUIDANCE
from pqcad_qat.stages.prepared import Prepared


def denoiser_request(
    policy: Policy, prepared: Prepared, *, name: str, model: nn.Module, calibration: CalibrationSet
) -> ExportRequest:
    """Everything that the graph of a variant's model is made from, with attention in floating point and nothing beside
    the graph.

    Args:
        policy, prepared: policy and full-precision model that it was made by.
        name: the variant.
        model: its quantized model.
        calibration: the set whose time steps the graph must know.
    """
    walk = prepared.sampled_by(policy, name).walk(policy.sampling_steps(name))
    return ExportRequest(
        model=model,
        scheduler_config=scheduler_of(policy, prepared, name),
        layers=integer_layers(model),
        sample_shape=prepared.model.sample_shape,
        batch_size=policy.export.batch_size,
        provenance=_provenance(policy, prepared, name),
        conditions=exported_inputs(prepared.model.condition_inputs, prepared.conditions),
        # float steps are not among the calibration set's times, and the graph of float steps knows times too
        visited=(*calibration.timesteps, *(t for t, _ in walk)),
    )


def scheduler_of(policy: Policy, prepared: Prepared, name: str) -> dict[str, Any]:
    """Scheduler config of a variant: its noise schedule written out, its sampling steps and its guidance."""
    return {
        **written_out(prepared.model.scheduler_config, prepared.sampled_by(policy, name)),
        STEPS: policy.sampling_steps(name),
        **_guidance(policy, prepared, name),
    }


def _provenance(policy: Policy, prepared: Prepared, name: str) -> dict[str, Any]:
    """Origin of the deployed model, as its manifest states it."""
    return {
        "policy": policy.name,
        "variant": name,
        "model": prepared.model.source,
        "model_digest": prepared.model.digest,
        "sampler": prepared.schedule.sampler,
        "sampling_steps": policy.sampling_steps(name),
        "full_precision_steps": policy.sampler.steps,
        "training_seed": policy.training.seed,
        **_guidance(policy, prepared, name),
    }


def _guidance(policy: Policy, prepared: Prepared, name: str) -> dict[str, Any]:
    """Settings for sampling a variant of a conditional model: its guidance scale, and the label of the unconditional
    pass if there is one.

    If the denoiser also takes guidance as an input and every condition has the same value, that value is included.
    """
    if not prepared.conditions.choices:
        return {}
    scale, null = policy.guidance_scale(name), prepared.conditions.null_class
    embedded = {round(value, 4) for value in prepared.conditions.choices.get("guidance", torch.zeros(0)).tolist()}
    return (
        {GUIDANCE: scale}
        | ({} if null is None else {NULL_CLASS: null})
        | ({EMBEDDED_GUIDANCE: embedded.pop()} if len(embedded) == 1 else {})
    )
