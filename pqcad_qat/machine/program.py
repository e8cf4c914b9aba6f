"""The program around a command: its memory, its processes, and its end, with a message and an exit code.

Not here: the command line (cli.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

from pqcad_qat.errors import DiskError, InterruptedByUserError, PqcadError, UsageError, abridged, shortened
from pqcad_qat.machine.cores import cores_of_share
from pqcad_qat.machine.files import disk_refusal
from pqcad_qat.machine.processes import check_launch, close_group, is_reporter, launched, wait_for_report

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
"""Options of mallopt."""

_RETURNED = 2**25
"""Size in bytes from which freed blocks go back to the system; glibc takes no larger one."""

ERRORS = Console(stderr=True)
"""Console on which errors are printed."""

SHARED_COMMANDS = ("run", "pretrain")
"""Commands on which several processes can work together."""

GOES_ON = {
    **dict.fromkeys(("run", "pretrain"), "; --resume goes on from there"),
    **dict.fromkeys(("sweep", "sensitivity"), "; the same command goes on from there"),
}
"""How to continue an interrupted command, by command, as added to a message."""


class _TerminatedError(KeyboardInterrupt):
    """A request to terminate, which for example a launcher sends to the other processes as soon as one has ended."""


@contextmanager
def reported_endings(command_line: Sequence[str]) -> Iterator[None]:
    """Run a command inside; whatever ends it becomes a message and an exit code.

    The code is 2 if the user can fix the cause, and 130 after an interruption.

    Args:
        command_line: the command line, the command first.
    """
    again = GOES_ON.get(command_line[0], "") if command_line else ""
    try:
        with _terminated_as_interrupted(), _disks_of_threads_silent():
            _check_processes(command_line)
            yield
            close_group()
    except InterruptedByUserError as stop:
        _end(stop, f"{stop}{again}", 130)
    except DiskError as error:
        note = f"; what is finished is kept{again}" if again else ""
        _end(error, f"{error}{note}", 2)
    except PqcadError as error:
        _end(error, abridged(str(error).splitlines()), 2)
    except (OSError, SafetensorError) as error:
        if (reason := _cannot_write(error) or _cannot_use(error)) is None:
            raise
        _end(error, reason, 2)
    except KeyboardInterrupt as stop:
        _end(stop, f"interrupted{again}", 130)


def keep_freed_memory() -> None:
    """Make glibc keep the memory that training frees in each training step and needs again in the next.

    torch, if it is not imported yet, also uses huge pages. Without this, page faults took an eighth of a training step,
    and the page tables another twentieth of one between two widths. Blocks of `_RETURNED` bytes and more go back to the
    system all the same: only large models have them, and kept blocks of many sizes would leave gaps of gigabytes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # for the processes of a sweep
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(_RETURNED), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another system's allocator has no mallopt


def keep_to_share_of_cores() -> None:
    """Limit torch to as many threads as a container's share of the cores feeds.

    It must be called before torch is imported; by itself torch counts all cores.
    """
    if (cores := cores_of_share()) is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _end(error: BaseException, text: str, code: int) -> NoReturn:
    """Report what ended the program, once for all its processes, and exit."""
    if is_reporter(error):
        start = Text("error: ", "bold red") if code == 2 else Text()
        ERRORS.print(start.append(Text(text)), highlight=False, soft_wrap=True)
    elif not isinstance(error, _TerminatedError):
        wait_for_report(code)
    sys.exit(code)


def _check_processes(command_line: Sequence[str]) -> None:
    """Raise UsageError for several processes on a command that only one can do."""
    check_launch()
    count = launched()[1]
    if count > 1:
        # otherwise torch reports for every model that all its parameters are used
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if count > 1 and [*command_line, ""][0] not in SHARED_COMMANDS:
        raise UsageError(
            f"{' '.join(command_line[:1])}: got {count} processes; allowed 1: only run and pretrain share their work"
        )


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """While the context lasts, a request to terminate ends the program as Ctrl-C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _disks_of_threads_silent() -> Iterator[None]:
    """While the context lasts, a thread that a full disk ends shows no traceback, for example TensorBoard's.

    The next write through that thread raises the error.
    """
    before = threading.excepthook

    def show(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is None or disk_refusal(failure.exc_value) is None:
            before(failure)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = before


def _cannot_write(error: OSError | SafetensorError) -> str | None:
    """The message for a disk's refusal that no writer has reported better; None for any other error."""
    if (reason := disk_refusal(error)) is None:
        return None
    return f"cannot write: {error if isinstance(error, OSError) and error.filename else reason}"


def _cannot_use(error: OSError | SafetensorError) -> str | None:
    """The message for an unusable path of the user's that no command has checked; None for any other error."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR):
        return None
    path = shortened(str(error.filename), 300)
    return f"{path}: got {error.strerror}; allowed a path that can be read or written here"
