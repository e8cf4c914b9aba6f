"""Where commands print: tables, lines that are not broken, and the result of a run.

Not here: the contents of a table (report/tables.py).
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console, RenderableType

from pqcad_qat.machine.processes import launched

if TYPE_CHECKING:
    from pqcad_qat.report.record import Report

PIPED_WIDTH = 130
"""Width in columns of output that does not go to a terminal."""

CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit code after the reader of the output has gone; shells report a program that SIGPIPE ended by the same code."""


class _OutputConsole(Console):
    """A console that ends the program quietly once the reader of its output has gone."""

    def on_broken_pipe(self) -> None:
        _end_quietly()


CONSOLE = _OutputConsole(
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH,
    quiet=launched()[0] > 0,
    markup=False,  # a pattern such as re:[/a-z]+ or a folder's name would be taken for it
    emoji=False,
)
"""Console of everything that a command prints."""

PROGRESS = _OutputConsole(stderr=True, quiet=launched()[0] > 0, markup=False, emoji=False)
"""Console for the progress of commands whose output another program may read."""


@contextmanager
def closed_pipe_is_no_fault() -> Iterator[None]:
    """Run a command inside; if the reader of its output goes away, as in `... | head`, the program ends quietly."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # by itself the interpreter flushes at its end, where an error can no longer be caught
    except BrokenPipeError:
        if not _reader_has_gone():  # some other pipe, such as one to a process of our own
            raise
        _end_quietly()


def _reader_has_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_quietly() -> NoReturn:
    """Exit by CLOSED_PIPE; what is still written to the output is lost."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(CLOSED_PIPE)


def show_result(folder: Path, page: Path) -> Report:
    """Print a short form of a run's report and the paths of its page and deployed folders; return the report."""
    from pqcad_qat.report.report_files import read_report
    from pqcad_qat.report.tables import result_remarks, result_table

    report = read_report(folder)
    CONSOLE.print(result_table(report, folder))
    tell(*result_remarks(report), f"report:   {page}")
    first = ["openvino"] if report.execution is not None else []
    others = [proof.folder for proof in report.also_deployed.values()]
    tell(*(f"deployed: {folder / name}" for name in (*first, *others)))
    return report


def show(*tables: RenderableType) -> None:
    """Print tables, and remarks that stand between them."""
    CONSOLE.print(*tables, sep="\n", highlight=False)


def tell(*lines: RenderableType) -> None:
    """Print lines that are not broken, so that a path can be copied."""
    for line in lines:
        CONSOLE.print(line, highlight=False, soft_wrap=True)
