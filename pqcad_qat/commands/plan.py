"""The command `plan`: which rule quantizes which layer, and to how many bits, computed from configs alone.

Not here: how rules are applied to a model (quantization/plan.py), and how a plan looks (report/tables.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pqcad_qat.models.model_folder import local
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.stages.prepared import notes_on, planned_shapes, with_own_model


@dataclass(frozen=True)
class PolicyPlan:
    """Plan of a policy.

    Attributes:
        denoiser: network that the plan is made for, as shapes without weights.
        layers: plan of the layers that will be quantized.
        notes: remarks on a valid policy that its reader may not expect.
    """

    denoiser: nn.Module
    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...]


def plan(policy: Policy, model: OwnModel | None = None) -> PolicyPlan:
    """Plan a policy on its model's configs, or on a module of the user's own in place of that model.

    Raises:
        ModelError, PlanError: as for `stages.prepared.planned_shapes`.
    """
    policy = with_own_model(policy, model)
    denoiser, layers, remarks = planned_shapes(policy, model)
    return PolicyPlan(denoiser, layers, notes_on(policy, layers, remarks, local(policy.model.source)))
