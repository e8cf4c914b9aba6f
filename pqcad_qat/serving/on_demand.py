"""What takes much memory, such as a compiled graph: made when it is asked for, and again after it was dropped.

Not here: what is made (part_runtime.py, compiled_sizes.py, vae_runtime.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class OnDemand(Generic[Made]):
    """The result of `make`; any number of threads may ask for it and drop it."""

    def __init__(self, make: Callable[[], Made], first: Made | None = None) -> None:
        """Take what makes the result, and the first one where it is made already."""
        self._make = make
        self._lock = threading.Lock()
        self._held = first

    @property
    def held(self) -> bool:
        """Whether the result is in memory."""
        return self._held is not None

    def __call__(self) -> Made:
        """The result, which is made now if it is not in memory."""
        with self._lock:
            if self._held is None:
                self._held = self._make()
            return self._held

    def drop(self) -> None:
        """Leave the result to those who use it now."""
        with self._lock:
            self._held = None
