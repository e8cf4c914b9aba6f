"""Estimates of the disk space that the stages of a run need, and the warning shown before the first stage if too little
is free.

Not here: what happens when a disk does fill up (machine/files.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from pqcad_qat.machine.files import free_bytes
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import DEPLOYED, PTQ, exporting
from pqcad_qat.report.run_preview import StageBytes, bytes_wanted
from pqcad_qat.sampling.trajectory import noise_schedule
from pqcad_qat.stages.float_steps import may_have_float_steps
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.recipe import Recipes

_GB = 1e9


def room_warning(
    policy: Policy, prepared: Prepared, recipes: Recipes, to_do: Collection[str], *, path: Path
) -> str | None:
    """Warning for the case that the stages to do need more bytes than are free; None if there is room."""
    wanted = bytes_wanted([stage_bytes(policy, prepared, recipes, stage) for stage in to_do])
    free = free_bytes(path)
    if wanted <= free:
        return None
    return (
        f"{path}: the stages to do take about {wanted / _GB:.3g} GB, and {free / _GB:.3g} GB are free; "
        "fewer calibration.trajectories or "
        "training.keep_checkpoints take less, and a run that a full disk ends goes on with --resume"
    )


def stage_bytes(policy: Policy, prepared: Prepared, recipes: Recipes, stage: str) -> StageBytes:
    """Estimate the largest numbers of bytes that a stage occupies, while it works and when it is done."""
    weights = 4 * sum(parameter.numel() for parameter in prepared.split.parameters())
    state = 4 * math.prod(prepared.model.sample_shape)
    trajectories = policy.calibration.trajectories
    # A checkpoint holds the weights, their averages and two Adam moments of each weight; one more checkpoint exists
    # while it is written, and so do the best weights.
    if recipes[stage].trained:
        return StageBytes(weights * (3 + 4 * (policy.training.keep_checkpoints + 1)), weights)
    if stage == "calibration":
        steps = noise_schedule(prepared.model.scheduler_config).passing(
            policy.sampler.steps, (policy.distillation.student_steps,)
        )
        columns = 2 if policy.sampler.guidance_scale == 1.0 else 3
        # finished batches lie beside the whole file while it is written
        trajectory = (len(steps) * columns + 1) * state
        return StageBytes(2 * trajectories * trajectory, trajectories * trajectory)
    if stage == "teacher":
        return StageBytes(4 * trajectories * policy.sampler.steps * state)
    if stage.startswith("samples-"):
        decoded = math.prod(prepared.picture_shape) if prepared.model.latent and policy.takes_pictures else 0
        images = policy.evaluation.images * ((state if prepared.model.latent else state // 4) + decoded)
        return StageBytes(2 * images, images)
    # full-precision weights for float steps: in float32 beside the student, in float16 in two deployed folders
    in_float = 2 * weights if may_have_float_steps(policy, prepared.schedule) else 0
    if stage in map(exporting, DEPLOYED):
        return StageBytes(3 * weights + in_float)
    if stage == PTQ:
        return StageBytes(weights)
    return StageBytes(2 * weights if stage == "baselines" else 0)
