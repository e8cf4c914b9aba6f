"""Work in a separate process, so that whatever ends it (a signal, lack of memory) becomes an error with a reason here.

The work is a module-level function whose arguments are JSON values; it leaves its results in files.

Not here: the work itself.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pqcad_qat.errors import DiedError, shortened
from pqcad_qat.machine.files import disk_refusal
from pqcad_qat.machine.usage_reports import report_no_usage

REASON = 300
"""Largest number of characters of a reason that a message repeats."""

_PR_SET_PDEATHSIG = 1  # from prctl.h
"""Option of prctl that sets the signal sent to a process when its parent dies."""


def run_apart(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work` with these arguments in a new process, and wait for it.

    The new process ends when this one ends, for any reason.

    Raises:
        DiedError: a signal or an exception ended the work.
        OSError: the disk is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        error, output = Path(folder) / "error.json", Path(folder) / "output"
        # unbuffered (-u), so that its last output is known however it ends
        command = [
            sys.executable,
            "-u",
            "-m",
            __name__,
            str(os.getpid()),
            f"{work.__module__}:{work.__qualname__}",
            str(error),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with output.open("w") as output_file:
            # A session of its own: Ctrl-C reaches every process of a terminal's session, but only this process
            # should handle it, and it ends the child.
            child = subprocess.Popen(
                [*command, json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output_file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                code = child.wait()
            finally:
                child.kill()
                child.wait()
        if error.exists():
            failure = json.loads(error.read_text(encoding="utf-8"))
            if failure["errno"] is not None:
                raise OSError(failure["errno"], os.strerror(failure["errno"]), failure["path"])
            raise DiedError(shortened(failure["text"], REASON))
        if code:
            raise DiedError(_ending(code, output.read_text(encoding="utf-8", errors="replace")))


def _ending(code: int, output: str) -> str:
    """How a process ended that left no reason itself: its exit code or signal, and its last line of output."""
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
    if code > 0:
        return shortened(f"its process ended with exit code {code}: {last}", REASON)
    name, meaning = signal.Signals(-code).name, signal.strsignal(-code)
    why = ""
    if -code == signal.SIGKILL:
        why = ", out of memory perhaps"
    elif -code == signal.SIGABRT and last:
        why = f": {last}"
    return shortened(f"its process died of {name} ({meaning}){why}", REASON)


def _serve(parent: int, target: str, error: Path, arguments: list[Any]) -> None:
    """In the new process: do the work, or leave the reason for the failure."""
    _end_with(parent)
    report_no_usage()
    module, _, name = target.partition(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except Exception as raised:
        full = disk_refusal(raised) is not None
        error_number, path = (raised.errno, raised.filename) if isinstance(raised, OSError) else (errno.ENOSPC, None)
        text = " ".join(f"{type(raised).__name__}: {raised}".split())
        failure = {"text": text, "errno": error_number if full else None, "path": None if path is None else str(path)}
        error.write_text(json.dumps(failure), encoding="utf-8")
        sys.exit(1)


def _end_with(parent: int) -> None:
    """Have this process killed when the parent dies, and killed before the parent if memory runs out."""
    with suppress(OSError, AttributeError, TypeError):  # only Linux has these
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
