"""A study: its cells run one after another, each a run of its own; what is finished is kept, what fails does not stop the others.

Not here: the expansion of a study's file into cells (policy/cells.py), the stages of a cell (pipeline.py), its table (evaluation/).
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pqcad_qat import pipeline
from pqcad_qat.errors import CheckpointError, PqcadError, StudyError
from pqcad_qat.evaluation.report import PAGE_FILE, read_report
from pqcad_qat.evaluation.run_comparison import Comparison, Run, compare_runs
from pqcad_qat.evaluation.run_comparison_page import write_comparison
from pqcad_qat.policy.cells import Cell, Study
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import TRAINED, stages_of
from pqcad_qat.run_folder import POLICY, check_policy, write_atomically
from pqcad_qat.training.metrics_log import progress_bar

STUDY_PAGE = "study.html"
ERRORS = "errors"
"""Folder of the tracebacks of cells that failed by no mistake of the user's."""


def sweep(study: Study, folder: Path, command: str, console: Console) -> Comparison:
    """Run every cell that is not finished, then write study.json, study.html and study.md of all that are.

    Raises:
        CheckpointError: a cell that is there belongs to another policy; nothing has been run.
        StudyError: some cells failed; the others are in the table.
    """
    _refuse_changed(study, folder)
    failed: dict[str, str] = {}
    with progress_bar(console) as bar:
        task = bar.add_task(f"study {study.name}", total=len(study.cells), note="")
        for place, cell in enumerate(study.cells, start=1):
            bar.update(task, note=cell.name)
            if not finished(folder / cell.name):
                console.print(f"study {study.name}: cell {place} of {len(study.cells)}: {cell.name}")
                _run_cell(cell, folder, command, console, failed)
            bar.update(task, advance=1)
    done = [Run(str(folder / cell.name), cell.labels, read_report(folder / cell.name)) for cell in study.cells if cell.name not in failed]
    comparison = compare_runs(study.name, done, command)
    write_comparison(comparison, folder / STUDY_PAGE)
    if failed:
        listed = "\n".join(f"  - {name}: {message}" for name, message in failed.items())
        raise StudyError(f"{folder}: {len(failed)} of {len(study.cells)} cells failed; the same command tries them again:\n{listed}")
    return comparison


def finished(path: Path) -> bool:
    """The run's report, which is written last, is there."""
    return (path / PAGE_FILE).is_file()


def _run_cell(cell: Cell, folder: Path, command: str, console: Console, failed: dict[str, str]) -> None:
    try:
        pipeline.run(cell.policy, folder / cell.name, command, console, resume=True, shares_training=True)
    except PqcadError as error:
        failed[cell.name] = str(error)
    except Exception as error:  # a fault of this cell, whatever it is, must not lose the others
        write_atomically(folder / ERRORS / f"{cell.name}.txt", traceback.format_exc())
        failed[cell.name] = f"{type(error).__name__}: {error} ({ERRORS}/{cell.name}.txt has its traceback)"
    if cell.name in failed:
        console.print(f"[red]failed:[/] {cell.name}: {failed[cell.name]}", soft_wrap=True)


def _refuse_changed(study: Study, folder: Path) -> None:
    faults = []
    for cell in study.cells:
        try:
            if (folder / cell.name / POLICY).is_file():
                check_policy(folder / cell.name / POLICY, cell.policy)
        except PqcadError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join([*faults, "--out DIR starts the study anew in another folder"]))


def cells_table(study: Study, folder: Path) -> Table:
    """What every cell would do, and how far it is."""
    table = Table("cell", "variants", "trains", "steps", "is", title=f"{study.name}: {len(study.cells)} cells in {folder}")
    for cell in study.cells:
        stages = [stage for stage in stages_of(cell.policy.evaluation.variants) if stage in TRAINED]
        path = folder / cell.name
        state = "finished" if finished(path) else "begun" if (path / POLICY).is_file() else "new"
        steps = sum(_steps(cell.policy, stages))
        table.add_row(cell.name, " ".join(cell.policy.evaluation.variants), " ".join(stages), str(steps), state)
    return table


def _steps(policy: Policy, stages: Sequence[str]) -> list[int]:
    """Training steps of each stage."""
    return [policy.progressive.steps if stage in ("pq", "fixed-bit") else policy.distillation.steps for stage in stages]
