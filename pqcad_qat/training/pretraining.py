"""Training of a full-precision denoiser from real images, which is how the embedded model was made.

Not here: the loop (trainer.py), the images (data/images.py), and quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pqcad_qat.data.images import ImageSet, to_float
from pqcad_qat.models.denoiser import predict
from pqcad_qat.sampling.ddim import add_noise, join_prediction
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule
from pqcad_qat.training.batches import batch_dice, mixed_states
from pqcad_qat.training.callback import Batch, BatchSource, Callback, TrainState, condition_of, with_condition


@dataclass
class DenoisingLoss(Callback):
    """Mean squared error of the prediction at a random time step (Ho et al. 2020, eq. 14).

    The prediction is in the schedule's own parameterisation.
    """

    def __post_init__(self) -> None:
        self.name = "denoising"

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        prediction = predict(state.network, batch["x_t"], batch["t"], condition_of(batch))
        return {"denoising": F.mse_loss(prediction.float(), batch["target"])}


@dataclass(frozen=True)
class ClassLabels:
    """How class labels condition a model.

    Attributes:
        null: label that stands for no class, None where the model has none.
        dropout: share of labels that are replaced by it (Ho and Salimans 2022, algorithm 1).
    """

    null: int | None
    dropout: float

    def with_dropout(self, labels: Tensor, dice: torch.Generator) -> Tensor:
        """The labels (B,) of a batch, some of them replaced by the null label."""
        if self.null is None:
            return labels
        return torch.where(torch.rand(len(labels), generator=dice) < self.dropout, self.null, labels)


def noisy_batches(
    images: ImageSet, schedule: DDPMSchedule, batch_size: int, seed: int, *, classes: ClassLabels | None = None
) -> BatchSource:
    """A batch source of noisy images: {x_t (B, C, H, W), t (B,), target (B, C, H, W)}, pure in seed and step.

    With classes, a batch also holds class_labels.
    """
    alpha_bar = torch.from_numpy(schedule.alpha_bar)

    def batch(step: int) -> Batch:
        dice = batch_dice(seed, step)
        chosen, t = mixed_states(len(images.images), schedule.train_timesteps, batch_size, dice)
        x_0 = to_float(images.images[chosen])
        eps = torch.randn(x_0.shape, generator=dice)
        a = alpha_bar[t].float().view(-1, 1, 1, 1)
        states = {
            "x_t": add_noise(x_0, eps, a),
            "t": t,
            "target": join_prediction(x_0, eps, a, schedule.prediction_type),
        }
        if classes is None or images.labels is None:
            return states
        return with_condition(states, {"class_labels": classes.with_dropout(images.labels[chosen], dice)})

    return batch
