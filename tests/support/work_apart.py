"""Functions for test_own_process.py to call in another process: they leave a file, end in every way, or wait.

Only the standard library is imported here, so that the other process begins at once. Not here: any test.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from pathlib import Path


def write(path: str, text: str) -> None:
    Path(path).write_text(text)


def end(how: str) -> None:
    if how == "raise":
        raise RuntimeError("no such\nlayer " + "x" * 1000)
    if how == "full disk":
        raise OSError(errno.ENOSPC, "No space left", "/some/where")
    if how == "no memory":
        raise MemoryError
    if how == "exit":
        print("the last word")
        os._exit(3)
    if how == "segmentation fault":
        ctypes.string_at(0)
    os.kill(os.getpid(), getattr(signal, how))


def wait(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)
