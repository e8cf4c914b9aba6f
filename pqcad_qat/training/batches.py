"""The choice of examples and time steps for each batch: a pure function of the seed and of the training step.

Not here: what an example holds (quantization_aware.py, distillation.py, pretraining.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def batch_dice(seed: int, step: int) -> torch.Generator:
    """A generator of random numbers for one batch, the same whether or not training was interrupted before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def mixed_states(examples: int, steps: int, batch_size: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """(example (B,), time index (B,)) of a batch: random examples, and time steps spread over all of them.

    The time steps are divided into B equal parts, and one is drawn from each. Such stratified time steps lower the
    variance of the loss (Kingma et al. 2021, appendix I.1).
    """
    rows = torch.randint(0, examples, (batch_size,), generator=dice)
    part = (torch.randperm(batch_size, generator=dice) + torch.rand(batch_size, generator=dice)) / batch_size
    return rows, (part * steps).long().clamp(max=steps - 1)
