"""One layer's move to a narrower width, as it is decided, stored and reported.

Not here: how it is decided and made (bit_schedule.py). Without torch, which a report is read without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Cause = Literal["plateau", "deadline", "fixed"]


@dataclass(frozen=True)
class Transition:
    """A decided transition; a report calls its widths `from` and `to`."""

    step: int  # of progressive training
    layer: str
    from_bits: Annotated[int, Field(alias="from")]
    to_bits: Annotated[int, Field(alias="to")]
    loss_momentum: float | None  # averaged relative improvement of the loss
    perturbation: float | None  # averaged || Q_to(W) - Q_from(W) || / || Q_from(W) ||
    cause: Cause
