"""Classifier-free guidance: the conditional and the unconditional pass of a denoiser as one prediction.

Not here: the conditions of the passes (conditions.py), or the formula (sampling/trajectory.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pqcad_qat.models.denoiser import Condition, predict
from pqcad_qat.sampling.ddim import Array
from pqcad_qat.sampling.trajectory import guided


@dataclass(frozen=True)
class Guidance:
    """The conditions and the guidance scale of a batch of samples.

    Attributes:
        condition: mapping from name to a tensor (B, ...), one row per sample.
        unconditional: mapping from name to a tensor (1, ...) for the unconditional pass.
        scale: scale of classifier-free guidance; 1 turns guidance off.
    """

    condition: Condition = field(default_factory=dict)
    unconditional: Condition = field(default_factory=dict)
    scale: float = 1.0

    def follow(self, denoiser: nn.Module, device: torch.device) -> Callable[[Tensor, float], Tensor]:
        """Return a function (x_t, t) -> the denoiser's guided prediction, which sampling uses."""
        condition, unconditional = (
            {name: value.to(device) for name, value in tensors.items()}
            for tensors in (self.condition, self.unconditional)
        )
        return guided_call(partial(predict, denoiser), condition, unconditional, self.scale)


def rows_of(condition: Mapping[str, Array], count: int) -> dict[str, Array]:
    """Repeat a condition of one sample `count` times along the batch."""
    return {name: value[[0] * count] for name, value in condition.items()}  # type: ignore[index]


def guided_call(
    call: Callable[[Array, float, Mapping[str, Array]], Array],
    condition: Mapping[str, Array],
    unconditional: Mapping[str, Array],
    scale: float,
) -> Callable[[Array, float], Array]:
    """Return a function (x_t, t) -> the prediction that sampling uses.

    At scale 1 it makes one denoiser call. At any other scale it makes two, and combines them by classifier-free
    guidance.

    Args:
        call: the denoiser, as (x_t, t, condition).
        condition: the tensors (B, ...) of the samples.
        unconditional: the tensors (1, ...) of the unconditional pass.
        scale: scale of classifier-free guidance.
    """

    def plain(x_t: Array, t: float) -> Array:
        return call(x_t, t, condition)

    def by_both_passes(x_t: Array, t: float) -> Array:
        conditional = call(x_t, t, condition)
        other = call(x_t, t, rows_of(unconditional, len(x_t)))  # type: ignore[arg-type]
        return guided(conditional, other, scale)

    return plain if scale == 1.0 else by_both_passes
