"""Work in a process of its own: every way in which that can end is told, and it never outlives the program that waits
for it.

Not here: the work itself (work_apart.py), nor the baselines that are made so (test_baselines.py).
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import SUPPORT, environment
from work_apart import end, write

from pqcad_qat.errors import DiedError
from pqcad_qat.machine.own_process import run_apart


def test_what_it_makes_it_leaves_in_files(tmp_path: Path) -> None:
    run_apart(write, str(tmp_path / "made"), "by another process")
    assert (tmp_path / "made").read_text() == "by another process"


ENDINGS = {
    "raise": "RuntimeError: no such layer xxx",
    "no memory": "MemoryError",
    "exit": "its process ended with exit code 3: the last word",
    "segmentation fault": r"its process died of SIGSEGV \(Segmentation fault\)",
    "SIGKILL": r"its process died of SIGKILL \(Killed\), out of memory perhaps",
    "SIGABRT": r"its process died of SIGABRT \(Aborted\)",
}


@pytest.mark.parametrize("how", ENDINGS)
def test_every_end_of_it_has_a_reason(how: str) -> None:
    with pytest.raises(DiedError, match=ENDINGS[how]) as died:
        run_apart(end, how)
    assert len(str(died.value)) <= 300
    assert "\n" not in str(died.value)


def test_a_full_disk_is_told_as_one() -> None:
    with pytest.raises(OSError, match="No space left") as full:
        run_apart(end, "full disk")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/some/where")


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_program_that_waits_for_it(ended_by: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "number"
    program = (
        "from work_apart import wait\nfrom pqcad_qat.machine.own_process import "
        f"run_apart\nrun_apart(wait, {str(file)!r})"
    )
    search = {"PYTHONPATH": os.pathsep.join([str(SUPPORT), environment()["PYTHONPATH"]])}
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**environment(), **search}, stderr=subprocess.DEVNULL
    ) as parent:
        number = int(awaited(file))
        parent.send_signal(ended_by)
        parent.wait(60)
        deadline = time.monotonic() + 60
        while alive(number):
            assert time.monotonic() < deadline, "it goes on by itself"
            time.sleep(0.05)


def awaited(file: Path) -> str:
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, "it never began"
        time.sleep(0.05)
    return file.read_text()


def alive(number: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
