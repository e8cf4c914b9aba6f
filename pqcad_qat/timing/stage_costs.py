"""What the stages of some work cost in this process: seconds, and resident memory at its peak.

Not here: what a training step costs (training/step_profile.py), nor how fast a denoiser runs (latency.py).
"""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pqcad_qat.report.rehearsal_record import StageCost

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5)


class StageMeter:
    """Measures one stage after the other, and tells of each when it is over; `costs` are those so far."""

    def __init__(self, tell: Callable[[StageCost], None] = lambda _: None) -> None:
        self.costs: list[StageCost] = []
        self._tell = tell

    @property
    def peak_bytes(self) -> int:
        """Most resident memory of all stages; of the whole process where the system does not tell it of a stage."""
        known = [cost.peak_bytes for cost in self.costs if cost.peak_bytes is not None]
        return max(known) if known else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside is the stage of that name."""
        exact = _reset_peak()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        peak = _resident("VmHWM") if exact else None
        _give_back()
        self.costs.append(StageCost(name, seconds, peak, _resident("VmRSS") if exact else None))
        self._tell(self.costs[-1])


def _reset_peak() -> bool:
    """Begin the peak anew; whether the system can."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(key: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[key].split()[0]) * 1024


def _give_back() -> None:
    """Free what nothing refers to, and have glibc give it back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another system's allocator: nothing to tell
        ctypes.CDLL("libc.so.6").malloc_trim(0)
