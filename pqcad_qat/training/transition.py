"""The record of a transition: one layer's move to a narrower width.

This file does not import torch, so that a report can be read without it.

Not here: how a transition is decided (transition_decision.py) and carried out (bit_schedule.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Cause = Literal["plateau", "deadline", "fixed"]
"""Why a transition began: the loss reached a plateau, the deadline was near, or a fixed schedule said so."""


@dataclass(frozen=True)
class Transition:
    """A decided transition; in a report its widths are called `from` and `to`.

    Attributes:
        step: training step of the progressive stage.
        layer: path of the layer.
        from_bits: width before it, in bits.
        to_bits: width after it, in bits.
        loss_momentum: averaged relative improvement of the loss, None before the first.
        perturbation: averaged || Q_to(W) - Q_from(W) || / || Q_from(W) ||.
        cause: why it began.
    """

    step: int
    layer: str
    from_bits: Annotated[int, Field(alias="from")]
    to_bits: Annotated[int, Field(alias="to")]
    loss_momentum: float | None
    perturbation: float | None
    cause: Cause
