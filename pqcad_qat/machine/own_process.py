"""Work in a process of its own, so that what ends that process, a signal or a lack of memory, is an error with a reason
here.

Not here: the work. It is a function at the top of a module, of values that JSON knows; what it makes it leaves in
files.
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

REASON = 300
"""Characters of a reason that are told."""

_PR_SET_PDEATHSIG = 1  # prctl.h


def run_apart(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work` with these arguments in a new process, and wait for it. It ends with this one, however this one ends.

    Raises:
        DiedError: it was ended by a signal, or by an exception.
        OSError: its disk is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        error, output = Path(folder) / "error.json", Path(folder) / "output"
        # unbuffered: what it printed last is known however it ends
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
        with output.open("w") as told:
            # in a session of its own, since Ctrl-C reaches all of a terminal's: this process answers it, and ends the
            # other
            child = subprocess.Popen(
                [*command, json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                stdout=told,
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
            found = json.loads(error.read_text(encoding="utf-8"))
            if found["errno"] is not None:
                raise OSError(found["errno"], os.strerror(found["errno"]), found["path"])
            raise DiedError(shortened(found["text"], REASON))
        if code:
            raise DiedError(_ending(code, output.read_text(encoding="utf-8", errors="replace")))


def _ending(code: int, output: str) -> str:
    """How a process ended that could not say so itself."""
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
    if code > 0:
        return shortened(f"its process ended with exit code {code}: {last}", REASON)
    name, meaning = signal.Signals(-code).name, signal.strsignal(-code)
    why = (
        ", out of memory perhaps"
        if -code == signal.SIGKILL
        else f": {last}"
        if -code == signal.SIGABRT and last
        else ""
    )
    return shortened(f"its process died of {name} ({meaning}){why}", REASON)


def _serve(parent: int, target: str, error: Path, arguments: list[Any]) -> None:
    """The new process: do the work, or leave the reason why not."""
    _end_with(parent)
    module, _, name = target.partition(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except Exception as raised:
        full = disk_refusal(raised) is not None
        number, path = (raised.errno, raised.filename) if isinstance(raised, OSError) else (errno.ENOSPC, None)
        text = " ".join(f"{type(raised).__name__}: {raised}".split())
        found = {"text": text, "errno": number if full else None, "path": None if path is None else str(path)}
        error.write_text(json.dumps(found), encoding="utf-8")
        sys.exit(1)


def _end_with(parent: int) -> None:
    """Be killed as soon as the parent is gone, and where memory runs out be killed before it."""
    with suppress(OSError, AttributeError):  # Linux's alone
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
