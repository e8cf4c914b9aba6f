"""Where commands print: tables, lines that are not broken, and what a run came to.

Not here: what a table holds (report/tables.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console, RenderableType

from pqcad_qat.machine.processes import launched

PIPED_WIDTH = 130
"""Columns of what is not shown on a terminal."""

CONSOLE = Console(
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH,
    quiet=launched()[0] > 0,
    markup=False,  # a pattern such as re:[/a-z]+ or a folder's name would be taken for it
    emoji=False,
)

PROGRESS = Console(stderr=True, quiet=launched()[0] > 0, markup=False, emoji=False)
"""For the progress of commands whose output a program may read."""


def show_result(folder: Path, page: Path) -> None:
    """The report of a run, short, and where its page and its deployed folder are."""
    from pqcad_qat.report.report_files import read_report
    from pqcad_qat.report.tables import result_remarks, result_table

    report = read_report(folder)
    CONSOLE.print(result_table(report, folder))
    tell(*result_remarks(report), f"report:   {page}")
    if (folder / "openvino").exists():
        tell(f"deployed: {folder / 'openvino'}")


def show(*tables: RenderableType) -> None:
    """Tables, and the remarks between them."""
    CONSOLE.print(*tables, sep="\n", highlight=False)


def tell(*lines: RenderableType) -> None:
    """Lines that are not broken, so that a path can be copied."""
    for line in lines:
        CONSOLE.print(line, highlight=False, soft_wrap=True)
