"""The quantized models of a run, each read back from its stage when something first needs it.

A run that goes on late, or makes its report again, thus loads what is still used and no more.

Not here: training (train.py), and models before it (quantized_models.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from safetensors.torch import load_file
from torch import nn

from pqcad_qat.policy.variants import FIXED_BIT, PTQ
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.trained_files import WEIGHTS

AT_TARGETS = (PTQ, FIXED_BIT)
"""Stages whose models have their target widths from the start; those of the others come down a ladder."""


@dataclass(frozen=True)
class TrainedModels:
    """The quantized models of one run, by the names of variants.

    Attributes:
        run: the run whose stages have trained them.
        untrained: the models that training begins with.
    """

    run: RunFolder
    untrained: QuantizedModels
    _loaded: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def of(self, variant: str) -> nn.Module:
        """Return the model that a finished stage has kept, on the CPU: the same object every time."""
        if variant not in self._loaded:
            untrained = self.untrained
            begins_at = untrained.at_targets if variant in AT_TARGETS else untrained.at_first_widths
            self.keep(variant, begins_at(calibrated=False))
        return self._loaded[variant]

    def plan_of(self, variant: str) -> tuple[LayerPlan, ...]:
        """Return the plan by which a variant's model is quantized before its weights are loaded."""
        untrained = self.untrained
        return untrained.target_plan if variant in AT_TARGETS else untrained.prepared.plan

    def keep(self, stage: str, model: nn.Module) -> None:
        """Take a model of the stage's kind, and give it the weights that the finished stage has kept."""
        model.load_state_dict(load_file(self.run.path / WEIGHTS.format(stage)), strict=True)
        self._loaded[stage] = model.cpu()
