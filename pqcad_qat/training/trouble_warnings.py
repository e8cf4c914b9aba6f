"""The warnings of trouble with a layer's weights or inputs: the limits above which they are given, and their words.

Not here: how the trouble is found (trouble_watch.py).
"""

from __future__ import annotations

from typing import Literal

SATURATED = 0.25
"""Share of clipped values above which a range saturates.

A range of least squared error clips 7 % of a Gaussian's values at 2 bits and less at larger widths. The worst case is
16 % of a SiLU's outputs, at 3 bits.
"""

OSCILLATING = 0.2
"""Largest share of a layer's weights that may oscillate without a warning.

Healthy training at a learning rate of 5e-4 down to 2 bits had 7 % at most, which occurred at 8 bits.
"""

Trouble = Literal[
    "collapsed weights", "saturated weights", "oscillating weights", "collapsed inputs", "saturated inputs"
]
"""Kinds of trouble that are warnings."""

WARNINGS: dict[Trouble, tuple[str, str]] = {
    "collapsed weights": (
        "the range of the weights collapsed: they are all zero, or a channel's scale is at its smallest",
        "use scale: statistics, range: mse or more bits for these layers, or a lower training.learning_rate",
    ),
    "saturated weights": (
        f"the range of the weights saturates: more than {SATURATED:.0%} of them are clipped",
        "use scale: statistics or range: mse for these layers, or a lower training.learning_rate",
    ),
    "oscillating weights": (
        f"weights oscillate between two integers: more than {OSCILLATING:.0%} of them turned back in "
        "every fifth look or oftener",
        "lower training.learning_rate, give these layers more bits, or keep training.ema, which averages over it",
    ),
    "collapsed inputs": (
        "the range of the inputs collapsed: every value becomes zero, or the scale is at its smallest",
        "use range: mse, scale: statistics or more bits for the inputs, or a lower training.learning_rate",
    ),
    "saturated inputs": (
        f"the range of the inputs saturates: more than {SATURATED:.0%} of the values are clipped",
        "use scale: learned, more calibration.trajectories or range: min_max for the inputs, or a lower "
        "training.learning_rate",
    ),
}
"""What a warning says of each trouble, and the advice that it gives."""
