"""The command `report`: rebuild the page of a finished run from what its folder holds.

Not here: the content of the report (stages/measure.py), and how it looks (report/).
"""

from __future__ import annotations

from pathlib import Path

from pqcad_qat.commands.finished_run import finished_run
from pqcad_qat.report.report_files import REPORT_FILE, read_report
from pqcad_qat.stages.chosen_widths import with_chosen_widths
from pqcad_qat.stages.measure import report as write_page
from pqcad_qat.stages.open_run import POLICY


def report(path: Path) -> Path:
    """Rebuild report.json, report.csv, report.html and samples.png of a finished run; return the path of the page.

    Raises:
        ModelError: the folder holds no run, or its model cannot be loaded.
        CheckpointError: some stages are still to do, or would be repeated.
    """
    with finished_run(path, lambda _, table: tuple(table)) as (policy, prepared, run):
        reproduction = read_report(path).reproduction if (path / REPORT_FILE).is_file() else None
        again = f"python -m pqcad_qat run {path / POLICY} --out {path}"
        command = again if reproduction is None else reproduction.command
        return write_page(policy, with_chosen_widths(policy, prepared, run), run, command)
