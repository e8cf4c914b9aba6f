"""What the stages of a run take on disk, about, and the warning where there is less: told before the first of them.

Not here: what is told where a disk does fill up (disk.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from pqcad_qat.machine.files import free_bytes
from pqcad_qat.policy.schema import Policy
from pqcad_qat.sampling.trajectory import noise_schedule
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.resuming import Recipes

_GB = 1e9


def room_warning(
    policy: Policy, prepared: Prepared, recipes: Recipes, to_do: Collection[str], *, path: Path
) -> str | None:
    """What to tell where the stages that are to do want more than is free; None where there is room."""
    wanted = sum(stage_bytes(policy, prepared, recipes, stage) for stage in to_do)
    free = free_bytes(path)
    if wanted <= free:
        return None
    return (
        f"{path}: the stages to do take about {wanted / _GB:.3g} GB, and {free / _GB:.3g} GB are free; "
        "fewer calibration.trajectories or "
        "training.keep_checkpoints take less, and a run that a full disk ends goes on with --resume"
    )


def stage_bytes(policy: Policy, prepared: Prepared, recipes: Recipes, stage: str) -> int:
    """Bytes that a stage leaves, and has at most while it works."""
    weights = 4 * sum(parameter.numel() for parameter in prepared.split.parameters())
    state = 4 * math.prod(prepared.model.sample_shape)
    trajectories = policy.calibration.trajectories
    if recipes[
        stage
    ].trained:  # a checkpoint has the weights, their averages and two moments of each; one more while one is written
        return weights * (1 + 4 * (policy.training.keep_checkpoints + 1))
    if stage == "calibration":
        steps = noise_schedule(prepared.model.scheduler_config).passing(
            policy.sampler.steps, (policy.distillation.student_steps,)
        )
        columns = 2 if policy.sampler.guidance_scale == 1.0 else 3
        return 2 * trajectories * (len(steps) * columns + 1) * state  # in parts, and as a whole
    if stage == "teacher":
        return 4 * trajectories * policy.sampler.steps * state
    if stage.startswith("samples-"):
        return 2 * policy.evaluation.images * state
    return {"export": 3 * weights, "baselines": 2 * weights}.get(stage, 0)
