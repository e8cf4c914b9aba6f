"""Resident memory of this process, as the system states it."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
"""Linux's file that states the process's memory."""


def peak_resident() -> int:
    """Largest resident memory of this program so far, in bytes.

    On Linux it is not getrusage's, which counts from what the process was before it began this program: a copy of the
    one that started it.
    """
    with suppress(OSError, KeyError):  # not every system has the file, or the line
        return resident("VmHWM")
    if sys.platform == "win32":
        import psutil  # a process that measures its memory alone is to be small

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has no such module

    # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident(key: str) -> int:
    """A value in bytes from the process's status, which states kilobytes."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[key].split()[0]) * 1024
