"""What of a quantized model is trained: all of it, its quantizers' ranges alone, or these and low-rank updates of its
weights.

An optimizer holds two more tensors of the size of each one that it trains, training a gradient, and averaging a fourth.
So a model of a billion weights takes 16 GB beside its own 4. With `low_rank`, the weights W of quantized layers are
frozen, and a layer computes with Q(W + B A) instead of Q(W), where B has `rank` columns and A as many rows (Hu et al.
2021, arXiv 2106.09685). The update lies within the quantizer, so that it is merged into W when the stage is over and
costs nothing afterwards (EfficientDM: He et al. 2023, arXiv 2310.03270). B begins at 0, so the model begins as it is.

Not here: the loop that trains (training/trainer.py), and the layers that compute with an update (brevitas_layers.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.training_sections import TrainingPolicy
from pqcad_qat.policy.value_types import Trainable
from pqcad_qat.quantization.brevitas_layers import trained_weight
from pqcad_qat.quantization.conversion import quantized_layers

RANGES = ("weight_quant.", "input_quant.")
"""Parts of the names of the Parameters that hold learned ranges."""

UPDATE = "update"
"""Name of a layer's update, as its attribute and in the names of its Parameters."""


@dataclass(frozen=True)
class TrainedPart:
    """Which Parameters are trained.

    Attributes:
        what: `all`; `scales`, the learned ranges alone; or `low_rank`, an update of the weights of every quantized
            layer, and everything but these weights.
        rank: largest rank of an update.
        seed: seed of the matrices A.
    """

    what: Trainable = "all"
    rank: int = 16
    seed: int = 0

    @classmethod
    def asked(cls, training: TrainingPolicy) -> TrainedPart:
        """The part that a policy's section asks for."""
        return cls(training.trainable, training.rank, training.seed)

    @property
    def freezes_weights(self) -> bool:
        """Whether the weights of quantized layers stay as they are."""
        return self.what != "all"


ALL = TrainedPart()
"""All of the model."""


class LowRankUpdate(nn.Module):
    """W + B A, where A (rank, I) is drawn at random and B (O, rank) begins at 0.

    The elements of A have a variance of 1 / rank. One step of Adam, which moves all of B by the learning rate, then
    moves the weights by the learning rate as well, as if they were trained themselves.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        drawn = torch.randn(rank, columns, generator=generator) / math.sqrt(rank)
        self.a = nn.Parameter(drawn.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight (O, ...) with the update, of the same shape."""
        return weight + (self.b @ self.a).view_as(weight)


def begin_training(model: nn.Module, part: TrainedPart) -> frozenset[str]:
    """Freeze what is not trained, and add updates where they are; return the names of the Parameters that are frozen
    now and were not before.

    Raises:
        PolicyError: ranges alone are to be trained, and no layer has learned ones.
    """
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if part.what == "low_rank":
        generator = torch.Generator().manual_seed(part.seed)
        for layer in quantized_layers(model).values():
            layer.weight.requires_grad_(False)
            layer.update = LowRankUpdate(layer.weight, part.rank, generator)
    elif part.what == "scales":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and any(kind in name for kind in RANGES))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise PolicyError(
            "training.trainable: got scales, and no layer has a learned range; allowed all, low_rank, or scale: "
            "learned in a rule of quantization.layers"
        )
    return frozenset(before - trained)


@torch.no_grad()
def end_training(model: nn.Module, frozen: Collection[str]) -> None:
    """Merge all updates into their weights, and train everything again that `begin_training` has frozen."""
    for layer in quantized_layers(model).values():
        if layer.update is not None:
            layer.weight.copy_(trained_weight(layer))
            layer.update = None
    for name in frozen:
        model.get_parameter(name).requires_grad_(True)


def changing_state(model: nn.Module, frozen: Collection[str]) -> dict[str, Tensor]:
    """A copy of all buffers and of all Parameters that `begin_training` has not frozen."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name not in frozen}


@torch.no_grad()
def load_changing(model: nn.Module, state: Mapping[str, Tensor], frozen: Collection[str]) -> None:
    """Load what `changing_state` has returned, or the state of the model before `begin_training`: its updates are then
    0.

    Raises:
        RuntimeError: the state is that of another model.
    """
    own = model.state_dict()
    updates = {name for name in own if name.endswith((f".{UPDATE}.a", f".{UPDATE}.b"))}
    if missing := own.keys() - state.keys() - updates - set(frozen):
        raise RuntimeError(f"got a state without {', '.join(sorted(missing))}; allowed the whole state of this model")
    model.load_state_dict({**own, **state})
    for name in updates - state.keys():
        if name.endswith(".b"):
            model.get_parameter(name).zero_()
