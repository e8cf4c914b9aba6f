"""What every fuzz test holds the software to: a right answer or one clear error, within 10 seconds and 2 GB.

The examples follow from a fixed seed. PQCAD_FUZZ_EXAMPLES says how many each test tries: some hundred by default, more
by `tox -e fuzz`.
Not here: any test.
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

EXAMPLES = int(os.environ.get("PQCAD_FUZZ_EXAMPLES", "150"))

SECONDS, BYTES = 10, 2 * 10**9
"""Within which every example ends."""

FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""A decorator for the tests."""


class HangError(BaseException):  # so that nothing that catches exceptions answers for it
    """An example took longer than SECONDS."""


@contextmanager
def bounded(seconds: int = SECONDS, memory: int = BYTES) -> Iterator[None]:
    """Inside, longer than that raises HangError, and memory over what the process had before raises MemoryError.

    Seconds are of the processor, which other programs do not lengthen; a wait ends the process after ten times as many.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise HangError(f"no end within {seconds} s")

    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, hard))
    # and again after every further second: the first may come where exceptions are passed over
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    # for a wait, and a loop of C code that no signal interrupts
    faulthandler.dump_traceback_later(10 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, handler)
