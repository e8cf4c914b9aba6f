"""Distance of the quantized weights from full precision during training, which progressive quantization keeps small.

Not here: the perturbation of a single transition, which schedules it (transition_decision.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pqcad_qat.quantization.layer_state import QuantizedLayer, quantized_weight
from pqcad_qat.training.callback import Callback, StepReport, TrainState

OBSERVE_EVERY = 5
"""Training steps between two observations, each of which quantizes every weight once."""


@dataclass
class WeightDistance(Callback):
    """Mean over the layers of || Q(W) - W_0 || / || W_0 ||, where W_0 are the weights at construction.

    During a blend, Q(W) is the mixture that the layer computes with.

    Attributes:
        layers: quantized layers by name, which hold their full-precision weights at construction.
        frozen: whether these weights stay as they are, and updates are trained (quantization/trained_part.py). They are
            then not copied.
    """

    layers: Mapping[str, QuantizedLayer]
    frozen: bool = False

    def __post_init__(self) -> None:
        self.name = "weight-distance"
        own = {name: layer.weight.detach() for name, layer in self.layers.items()}
        self._start = own if self.frozen else {name: weight.clone() for name, weight in own.items()}
        self._mean = self._measured()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if state.step % OBSERVE_EVERY == 0:
            self._mean = self._measured()

    def scalars(self) -> dict[str, float]:
        """Values for the log."""
        return {"weight_distance": self._mean}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._mean = saved["mean"]

    def _measured(self) -> float:
        """The mean distance at the present weights."""
        changes = []
        for name, layer in self.layers.items():
            # Training may have moved the layer to another device since.
            start = self._start[name] = self._start[name].to(layer.weight.device)
            changes.append((quantized_weight(layer) - start).norm() / start.norm())
        return float(sum(torch.stack(changes).tolist())) / len(changes)  # one wait for the accelerator, not one a layer
