"""Numbers about quantizers for the log of a training stage: each layer's width and ranges, and the mean width.

Not here: what changes widths (bit_schedule.py), and what is wrong with a range (trouble_warnings.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pqcad_qat.quantization.layer_state import QuantizedLayer, blend_state, range_sizes, read_bits
from pqcad_qat.training.callback import Callback, StepReport, TrainState

OBSERVE_EVERY = 5
"""Training steps between two observations of single layers, which change slowly."""


@dataclass
class QuantizerLog(Callback):
    """Logs the mean width at every step, and `layer/NAME/bits`, `weight_range` and `input_range` at some.

    A range is logged as its size in units of the tensor; for weights it is the mean over their scales. A blend counts
    as the mixture of its two widths.

    Attributes:
        layers: quantized layers by name.
    """

    layers: Mapping[str, QuantizedLayer]
    _own: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.name = "quantizer-log"

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self._own = {}
        if (state.step - 1) % OBSERVE_EVERY == 0:
            for name, layer in self.layers.items():
                weights, inputs = range_sizes(layer)
                quantities = {"bits": mixed_width(layer), "weight_range": weights, "input_range": inputs}
                self._own |= {f"layer/{name}/{quantity}": value for quantity, value in quantities.items()}

    def scalars(self) -> dict[str, float]:
        """Values for the log."""
        if not self.layers:
            return {}
        return {"mean_bits": sum(map(mixed_width, self.layers.values())) / len(self.layers), **self._own}


def mixed_width(layer: QuantizedLayer) -> float:
    """The layer's weight width in bits; during a blend, the mean of its two widths weighted by their shares."""
    blend = blend_state(layer)
    return (
        float(read_bits(layer)[0]) if blend is None else (1 - blend.share) * blend.bits + blend.share * blend.next_bits
    )
