"""What is compiled for one size of image, made when a size is first asked for and kept for the next time.

Not here: what is compiled (compiled_sizes.py, vae_runtime.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Size = tuple[int, int]
"""Height and width."""

KEPT = 4
"""Number of sizes that are kept besides the own one; the one that was not asked for longest goes first."""

Made = TypeVar("Made")


class _Place(Generic[Made]):
    """The place of one size, and its lock: others are not kept waiting while it is made."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: Made | None = None


class PerSize(Generic[Made]):
    """Results of `make` by size; any number of threads may ask."""

    def __init__(self, make: Callable[[Size], Made], own: Size | None = None) -> None:
        """Take what makes a result; that of the size `own` is always kept."""
        self._make, self._own = make, own
        self._places: OrderedDict[Size, _Place[Made]] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, size: Size) -> Made:
        """What was made for this size, or is made now."""
        with self._lock:
            place = self._places.setdefault(size, _Place())
            self._places.move_to_end(size)
            others = [known for known in self._places if known != self._own]
            for dropped in others[: len(others) - KEPT]:
                del self._places[dropped]
        with place.lock:
            if place.made is None:
                place.made = self._make(size)
            return place.made
