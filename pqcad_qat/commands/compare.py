"""The command `compare`: the reports of several runs in one table and page.

Not here: the content of the table (report/comparison.py), and how it looks (report/comparison_page.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pqcad_qat.errors import UsageError, shortened
from pqcad_qat.report.comparison import Comparison, compare_runs, named_runs
from pqcad_qat.report.comparison_page import write_comparison
from pqcad_qat.report.report_files import read_report

PAGE = "comparison.html"
"""Default name of the page."""


def compare(runs: Sequence[str], out: str | None, command: str) -> tuple[Comparison, Path]:
    """Compare finished runs; return the comparison, and the page that it was written to.

    Args:
        runs: folders of the runs.
        out: file of the page, or a folder for it; by default the page lies beside the first run.
        command: command that repeats the comparison.

    Raises:
        UsageError: there is no run or a run is given twice, or the page is neither a folder nor a name in .html.
        ModelError: a folder has no report.
    """
    if not runs:
        raise UsageError("got no run; allowed one or more folders of finished runs")
    folders = [os.path.realpath(run) for run in runs]
    if twice := [run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1]:
        raise UsageError(f"{twice[0]}: got the same folder twice; allowed once")
    page = Path(folders[0]).parent if out is None else Path(out)
    if page.suffix != ".html":
        if page.suffix and not page.is_dir():
            raise UsageError(f"--out: got {shortened(str(out))!r}; allowed a name in .html, or a folder")
        page = page / PAGE
    comparison = compare_runs("comparison", named_runs({run: read_report(Path(run)) for run in runs}), command)
    write_comparison(comparison, page)
    return comparison, page
