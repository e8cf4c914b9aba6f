"""The models that training stages have left in a run, each read back when something first needs it.

A run that goes on late, or makes its report again, thus loads what is still used and no more.

Not here: training (train.py), and models before it (quantized_models.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from safetensors.torch import load_file
from torch import nn

from pqcad_qat.policy.variants import FIXED_BIT
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_dependencies import WEIGHTS


@dataclass(frozen=True)
class TrainedModels:
    """The trained models of one run.

    Attributes:
        run: the run whose stages have trained them.
        untrained: the models that training begins with.
    """

    run: RunFolder
    untrained: QuantizedModels
    _loaded: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def of(self, stage: str) -> nn.Module:
        """Return the model that a finished training stage has kept, on the CPU: the same object every time."""
        if stage not in self._loaded:
            begins_at = self.untrained.at_targets if stage == FIXED_BIT else self.untrained.at_first_widths
            self.keep(stage, begins_at(calibrated=False))
        return self._loaded[stage]

    def keep(self, stage: str, model: nn.Module) -> None:
        """Take a model of the stage's kind, and give it the weights that the finished stage has kept."""
        model.load_state_dict(load_file(self.run.path / WEIGHTS.format(stage)), strict=True)
        self._loaded[stage] = model.cpu()
