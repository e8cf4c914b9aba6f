"""How far the weights that compute are from full precision while a stage trains: what progressive quantization is to
keep small.

Not here: the perturbation of one transition, which decides it (bit_schedule.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pqcad_qat.quantization.quantized_layer import QuantizedLayer, quantized_weight
from pqcad_qat.training.callback import Callback, StepReport, TrainState

OBSERVE_EVERY = 5
"""Steps between two observations: each quantizes every weight once."""


@dataclass
class WeightDistance(Callback):
    """Mean over the layers of || Q(W) - W_0 || / || W_0 ||, W_0 the weights it is made with; a blend counts as what it
    computes with.

    Attributes:
        layers: quantized layers by name, around their full-precision weights.
    """

    layers: Mapping[str, QuantizedLayer]

    def __post_init__(self) -> None:
        self.name = "weight-distance"
        self._start = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self._mean = self._measured()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if state.step % OBSERVE_EVERY == 0:
            self._mean = self._measured()

    def scalars(self) -> dict[str, float]:
        """For the log."""
        return {"weight_distance": self._mean}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._mean = saved["mean"]

    def _measured(self) -> float:
        changes = []
        for name, layer in self.layers.items():
            start = self._start[name] = self._start[name].to(layer.weight.device)  # which training may have moved
            changes.append((quantized_weight(layer) - start).norm() / start.norm())
        return float(sum(torch.stack(changes).tolist())) / len(changes)  # accelerators are waited for once
