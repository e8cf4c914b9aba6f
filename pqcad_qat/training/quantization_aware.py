"""Quantization-aware training on the calibration set: its batches, and the loss against the full-precision prediction.

Not here: when each width is trained (bit_schedule.py), and the distilled student (distillation.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.models.denoiser import predict
from pqcad_qat.training.batches import batch_dice, mixed_states
from pqcad_qat.training.callback import Batch, BatchSource, Callback, TrainState, condition_of, with_condition


@dataclass
class FullPrecisionMatching(Callback):
    """Mean squared error to the full-precision model's prediction at the same state, in its parameterisation.

    Each state's error is weighted by what an error at its time costs in the image (the batch's weight (B,)).
    """

    def __post_init__(self) -> None:
        self.name = "full-precision"

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        prediction = predict(state.network, batch["x_t"], batch["t"], condition_of(batch))
        errors = (prediction.float() - batch["target"]).square().flatten(1).mean(dim=1)
        return {"full_precision": (errors * batch["weight"]).mean()}


def calibration_batches(
    calibration: CalibrationSet, batch_size: int, seed: int, weights: Mapping[float, float] | None = None
) -> BatchSource:
    """A batch source of the calibration set: {x_t (B, C, H, W), t (B,), target (B, C, H, W), weight (B,), condition}.

    It is pure in seed and step. Where trajectories are guided, every second state belongs to the unconditional pass.
    `weights` gives each time of the set its weight in the loss, 1 for all without it.
    """

    def batch(step: int) -> Batch:
        rows, columns = mixed_states(
            len(calibration.predictions), len(calibration.timesteps), batch_size, batch_dice(seed, step)
        )
        return calibration_states(calibration, rows, columns, step, weights=weights)

    return batch


def calibration_states(
    calibration: CalibrationSet,
    rows: Tensor,
    columns: Tensor,
    first: int = 0,
    *,
    weights: Mapping[float, float] | None = None,
) -> Batch:
    """The batch of these states (trajectory, time index); `first` numbers the first, as for `CalibrationSet.passes`."""
    target = calibration.predictions[rows, columns]
    if calibration.unconditional_predictions is not None:
        odd = calibration.passes(len(rows), first)
        target[odd] = calibration.unconditional_predictions[rows, columns][odd]
    t = torch.tensor(calibration.timesteps)
    weight = torch.tensor([1.0 if weights is None else weights[time] for time in calibration.timesteps])
    states = {"x_t": calibration.states[rows, columns], "t": t[columns], "target": target, "weight": weight[columns]}
    return with_condition(states, calibration.conditions_of(rows, first))
