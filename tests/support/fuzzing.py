"""Limits for every fuzz test: a correct answer or one clear error, within 10 seconds and 2 GB.

The examples follow from a fixed seed. PQCAD_FUZZ_EXAMPLES is the number of examples of each test, 60 by default and
more in `tox -e long` and `tox -e fuzz`. Not here: any test.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("PQCAD_FUZZ_EXAMPLES", "60"))

SECONDS, BYTES = 10, 2 * 10**9
"""Limits of an example: processor time in seconds, and additional memory in bytes."""

FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""Decorator of the fuzz tests."""


class HangError(BaseException):  # no Exception, so that no handler in the tested code catches it
    """Raised when an example takes longer than SECONDS."""


@contextmanager
def bounded(seconds: int = SECONDS, memory: int = BYTES) -> Iterator[None]:
    """Limit the time and memory of the block: HangError after `seconds`, MemoryError above `memory` additional bytes.

    The time is processor time, which other programs do not lengthen. A block that only waits ends the process after ten
    times as many seconds of wall time.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise HangError(f"no end within {seconds} s")

    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, hard))
    # repeat every second: the first signal may come where exceptions are swallowed
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    # covers a wait, and a loop in C code that no signal interrupts
    faulthandler.dump_traceback_later(10 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, handler)
