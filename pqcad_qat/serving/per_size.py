"""What is compiled for one size of image, made when a size is first asked for and kept for the next time.

Not here: what is compiled (compiled_sizes.py, part_runtime.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Size = tuple[int, int]
"""Height and width."""

KEPT = 4
"""Number of sizes that are kept; the one that was not asked for longest goes first."""

Made = TypeVar("Made")


class PerSize(Generic[Made]):
    """Results of `make` by size; any number of threads may ask."""

    def __init__(self, make: Callable[[Size], Made]) -> None:
        self._make = make
        self._made: OrderedDict[Size, Made] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, size: Size) -> Made:
        """What was made for this size, or is made now."""
        with self._lock:
            if size not in self._made:
                self._made[size] = self._make(size)
                if len(self._made) > KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(size)
            return self._made[size]
