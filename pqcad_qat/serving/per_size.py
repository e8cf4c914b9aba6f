"""The sizes that a denoiser takes, and what is compiled for one of them: made when a size is first asked for and kept
for the next time.

Not here: what is compiled (compiled_sizes.py, vae_runtime.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Size = tuple[int, int]
"""Height and width."""

KEPT = 4
"""Number of sizes that are kept besides the own one; the one that was not asked for longest goes first."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class SampleSizes:
    """The heights and widths of samples that a deployed folder takes.

    Attributes:
        own: the size that it was made for.
        free: whether it takes others.
        multiple: number of which the sides of others have to be multiples.
    """

    own: Size
    free: bool
    multiple: int

    def take(self, size: Size) -> bool:
        """Whether samples may have this size."""
        return size == self.own or (self.free and all(side and not side % self.multiple for side in size))


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
