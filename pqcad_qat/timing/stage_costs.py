"""Costs of the stages of some work in this process: seconds, and peak resident memory.

Not here: the cost of a training step (training/step_profile.py), and the speed of a denoiser (latency.py).
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pqcad_qat.machine.memory import peak_resident, resident
from pqcad_qat.report.rehearsal_record import StageCost

_CLEAR = Path("/proc/self/clear_refs")
"""Linux's file that resets the process's peak of resident memory."""

_RESET_PEAK = "5"  # see the manual page proc_pid_clear_refs(5)
"""Text whose writing resets the peak."""


class StageMeter:
    """Measures one stage after another and reports each when it ends.

    Attributes:
        costs: costs of the stages so far.
    """

    def __init__(self, tell: Callable[[StageCost], None] = lambda _: None) -> None:
        self.costs: list[StageCost] = []
        self._tell = tell

    @property
    def peak_bytes(self) -> int:
        """Largest resident memory of all stages, in bytes.

        Where the system does not measure single stages, it is that of the whole process.
        """
        known = [cost.peak_bytes for cost in self.costs if cost.peak_bytes is not None]
        return max(known) if known else peak_resident()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as the stage of that name."""
        exact = _reset_peak()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        peak = resident("VmHWM") if exact else None
        _give_back()
        self.costs.append(StageCost(name, seconds, peak, resident("VmRSS") if exact else None))
        self._tell(self.costs[-1])


def _reset_peak() -> bool:
    """Reset the system's peak of resident memory; return whether it can."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Free unreferenced memory, and have glibc return it to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another system's allocator has no malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)
