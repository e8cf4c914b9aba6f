"""The level of a training loss: its smoothed value, its lowest value so far, and the rise that is still healthy.

Not here: what follows a rise beyond that (trouble_watch.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

RISE = 100.0
"""Factor over its lowest level above which a loss has exploded.

Quantized training starts close to the full-precision optimum, so the loss rises in healthy training too. In our runs
it rose sixfold at a learning rate of 5e-4 before it came back.
"""

NEGLIGIBLE = 1e-6
"""Loss below which a rise means nothing, since predictions are of order 1."""


@dataclass(frozen=True)
class LossLevel:
    """A smoothed loss and its lowest value so far.

    It is smoothed over about five training steps, by an exponential moving average with Adam's bias correction.

    Attributes:
        average: the average before the correction.
        count: number of losses averaged so far.
        lowest: lowest corrected average so far, at least `NEGLIGIBLE`.
    """

    average: float = 0.0
    count: int = 0
    lowest: float = float("inf")

    def updated(self, loss: float) -> LossLevel:
        """The level after one more loss."""
        moved = replace(self, average=0.8 * self.average + 0.2 * loss, count=self.count + 1)
        return replace(moved, lowest=max(NEGLIGIBLE, min(self.lowest, moved.value)))

    @property
    def value(self) -> float:
        """The corrected average."""
        return self.average / (1 - 0.8**self.count)


def allowed_rise(dropped: int) -> float:
    """Factor over its lowest level that a loss may reach after widths dropped by `dropped` bits.

    Each bit doubles the distance between two integers, which quadruples the squared rounding error. A rise beyond that
    has another cause.
    """
    return max(RISE, 4.0**dropped)
