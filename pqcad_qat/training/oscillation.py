"""Oscillation of weights between two integers: how often each weight turns back.

Not here: from which share of the weights on a layer's oscillation is a warning (trouble_warnings.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 0.9
"""Decay of the average frequency of flips at each look; it remembers about 50 training steps."""

OFTEN = 0.2
"""Frequency of flips from which a weight oscillates: it turned back in one look of five."""


@dataclass
class Flips:
    """How often weights turn back, a sign of oscillation, from one look at their integers to the next.

    The method is that of Nagel et al. 2022 ("Overcoming oscillations in quantization-aware training", section 4),
    applied at every look instead of every step. A weight flips when its integer changes in the direction opposite to
    its last change.

    Attributes:
        integers: (weights,), layer after layer, at the last look.
        direction: (weights,), direction of the last change, -1 or 1; 0 before the first change.
        frequency: (weights,), moving average of flips, 1 for a flip and 0 otherwise.
    """

    integers: Tensor
    direction: Tensor
    frequency: Tensor

    @classmethod
    def at_first_look(cls, integers: Tensor) -> Flips:
        """The state at the first look."""
        return cls(integers, torch.zeros_like(integers), torch.zeros_like(integers))

    def look(self, integers: Tensor) -> None:
        """Compare the integers with those of the last look, and update the state."""
        change = (integers - self.integers).sign()
        self.frequency.lerp_((change * self.direction < 0).to(self.frequency.dtype), 1 - MEMORY)
        self.direction = torch.where(change == 0, self.direction, change)
        self.integers = integers
