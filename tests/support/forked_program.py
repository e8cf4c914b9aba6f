"""`python -m pqcad_qat ARGUMENTS`, or another program of this folder, as a process that begins at once: it is forked
from a server that has imported everything and used nothing.

A forked program has the process id, the signals and the exit code of one that was started by itself. Not here: any
test, or programs that start other Python processes, which would import this file in place of the package's entry point.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Ask = Callable[..., Any]
"""Function that sends the server one request and returns its answer."""


@dataclass
class ForkedProgram:
    """A started program, used as a `subprocess.Popen` of text; its output is read when it has ended."""

    pid: int
    folder: Path
    ask: Ask
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.ask("poll", self.pid)
        return self.returncode

    def send_signal(self, sent: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, sent)

    def communicate(self, timeout: float) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"no end after {timeout} s"
            time.sleep(0.01)
        output, errors = ((self.folder / name).read_text(encoding="utf-8") for name in ("output", "errors"))
        return output, errors


@contextmanager
def program_server(environment: dict[str, str]) -> Iterator[Callable[..., ForkedProgram]]:
    """Function that starts a program with these arguments, in a server's environment: the function `main` of a module,
    which takes them from the command line.
    """
    server = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    requests, answers = server.stdin, server.stdout

    def ask(*request: Any) -> Any:
        print(json.dumps(request), file=requests, flush=True)
        return json.loads(answers.readline())

    def start(*arguments: str | Path, program: str = "pqcad_qat.cli") -> ForkedProgram:
        folder = Path(tempfile.mkdtemp(dir=root))
        return ForkedProgram(ask("start", str(folder), program, *map(str, arguments)), folder, ask)

    with server, tempfile.TemporaryDirectory() as root:
        yield start
        requests.close()


def serve() -> None:
    """In the server: answer requests until there are no more."""
    from pqcad_qat.machine.program import keep_freed_memory
    from pqcad_qat.machine.usage_reports import report_no_usage

    keep_freed_memory()
    report_no_usage()  # as the program does before it imports anything
    import torchmetrics.image  # noqa: F401  # which runs import late, as it takes two seconds

    from pqcad_qat.commands import run  # noqa: F401  # all of it, before any fork
    from pqcad_qat.report import page, tables  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not live on in a forked process"
    gc.freeze()  # the programs need not collect what is imported
    for line in sys.stdin:
        match json.loads(line):
            case ["start", folder, program, *arguments]:
                answer: int | None = started(Path(folder), program, arguments)
            case ["poll", number]:
                ended, status = os.waitpid(number, os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)


def started(folder: Path, program: str, arguments: list[str]) -> int:
    """Fork a process that runs the program, with its output in this folder; return its number."""
    if number := os.fork():
        return number
    code = 1
    try:
        for stream, file in enumerate((Path(os.devnull), folder / "output", folder / "errors")):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), stream)
        sys.argv[1:] = arguments
        try:
            import_module(program).main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve()
