"""Quantized copies of a policy's model before they are trained, all with the ranges of one calibration.

What the layers read depends neither on widths nor on training, and looking at it takes as long as many training steps.
So it is looked at once, when the first copy needs it.

Not here: training (train.py), and how ranges follow from what was seen (quantization/ranges.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.conversion import observed_ranges, quantize_model, set_ranges
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.ranges import InputRange
from pqcad_qat.stages.prepared import RANGE_INPUTS, Prepared


@dataclass
class QuantizedModels:
    """Quantized copies of one full-precision model.

    Attributes:
        policy: policy that says how it is quantized.
        prepared: the model and its plan.
        calibration: calibration set that shows what its layers read.
    """

    policy: Policy
    prepared: Prepared
    calibration: CalibrationSet
    _seen: Mapping[str, InputRange] = field(default_factory=dict, repr=False)

    @property
    def target_plan(self) -> tuple[LayerPlan, ...]:
        """The plan with layers at their target widths from the start."""
        return tuple(replace(layer, ladder=(layer.weights.bits,)) for layer in self.prepared.plan)

    def of(self, plan: Sequence[LayerPlan]) -> QuantizedModels:
        """Return the copies by another plan, which quantizes the same layers or fewer, with the same ranges."""
        return replace(self, prepared=replace(self.prepared, plan=tuple(plan)))

    def at_first_widths(self, calibrated: bool = True) -> nn.Module:
        """Return a copy at the first width of each layer's ladder, where progressive quantization begins.

        Without `calibrated` its inputs have no ranges yet, as suits a copy whose state is loaded.
        """
        return self._copy(self.prepared.plan, calibrated)

    def at_targets(self, calibrated: bool = True) -> nn.Module:
        """Return a copy at the target widths: the start of fixed-bit training, and the variant `ptq`."""
        return self._copy(self.target_plan, calibrated)

    def _copy(self, plan: Sequence[LayerPlan], calibrated: bool) -> nn.Module:
        model = quantize_model(copy.deepcopy(self.prepared.split), plan)
        if calibrated:
            if not self._seen:
                batch = self.policy.calibration.batch_size
                self._seen = observed_ranges(model, self.calibration.inputs(RANGE_INPUTS, batch))
            set_ranges(model, self._seen)
        return model
