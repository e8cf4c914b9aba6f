"""The record of a transition: one layer's move to a narrower width.

This file does not import torch, so that a report can be read without it.

Not here: how a transition is decided (transition_decision.py) and carried out (bit_schedule.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Cause = Literal["momentum", "deadline", "fixed"]
"""What set the time of a transition's end: the momentum's pace, the deadline, or a fixed schedule."""


@dataclass(frozen=True)
class Transition:
    """A transition that ended; in a report its widths are called `from` and `to`.

    Attributes:
        step: training step from which on the layer computes at the new width.
        layer: path of the layer.
        from_bits: width before it, in bits.
        to_bits: width after it, in bits.
        perturbation: || Q_to(W) - Q_from(W) || / || Q_from(W) || at its beginning.
        cause: what set the time of its end.
        began: training step at which it began.
    """

    step: int
    layer: str
    from_bits: Annotated[int, Field(alias="from")]
    to_bits: Annotated[int, Field(alias="to")]
    perturbation: float
    cause: Cause
    began: int
