"""The command `sweep`: run the cells of a study in turn or side by side, each as a run of its own. Finished cells are
kept, and a failure does not stop the others.

Not here: the expansion of a study's file into cells (policy/study_cells.py), the stages of a cell (stages/), its table
(report/).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from pqcad_qat.commands import run as pipeline
from pqcad_qat.errors import CheckpointError, InterruptedByUserError, PqcadError, StudyError, UsageError, shortened
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.progress import progress_bar, working
from pqcad_qat.machine.task_pools import LostTaskError, dask_workers, local_processes, side_by_side
from pqcad_qat.models.own_model import OwnModel, own_model_of
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.study_cells import Cell, Study
from pqcad_qat.policy.variants import TRAINED, VARIANTS, stages_of
from pqcad_qat.quantization.layer_matching import listed
from pqcad_qat.report.comparison import Comparison, Run, compare_runs
from pqcad_qat.report.comparison_page import markdown, with_section, write_comparison
from pqcad_qat.report.report_files import PAGE_FILE, read_report
from pqcad_qat.report.tables import CellState
from pqcad_qat.stages.open_run import POLICY, check_policy
from pqcad_qat.stages.prepared import planned_shapes
from pqcad_qat.stages.stage_dependencies import most_steps, training_steps

STUDY_PAGE = "study.html"
ERRORS = "errors"
"""Name of the folder for tracebacks of cells that failed by no mistake of the user's."""

CONSOLES = "consoles"
"""Name of the folder for the output of cells that ran side by side."""


def sweep(
    study: Study,
    folder: Path,
    command: str,
    console: Console,
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    only: str = "*",
    page: Path | None = None,
    module: str | None = None,
) -> Comparison:
    """Run every unfinished cell, and after each one write study.json, study.html and study.md of all finished cells.

    Args:
        only: glob on the names of the cells to run.
        jobs: number of simultaneous cells, each in its own process with its share of the cores; small models benefit.
        scheduler: address of a Dask scheduler, on whose workers the cells run; they share the folder.
        page: Markdown file that gets the table too, as a section with the study's name.
        module: FILE.py:FUNCTION of the user's own module, for the cells whose model.source is its `module:NAME`.

    Raises:
        UsageError: the page is not text, or its folder does not exist, or the module is no OwnModel, or no cell's;
            nothing has been run.
        CheckpointError: an existing cell belongs to another policy; nothing has been run.
        StudyError: as for `check_cells`, or cells that time models would run beside others, or `only` matches none;
            nothing has been run. Also raised if some cells failed; the others are in the table.
        KeyboardInterrupt: Ctrl-C; every cell that was training has written a checkpoint.
    """
    if page is not None:
        with_section(_page_text(page), study.name, "")
    _refuse_changed(study, folder)
    chosen, own = chosen_cells(study, only), _own_module(study, module)
    waiting = [cell for cell in chosen if not finished(folder / cell.name)]
    if jobs > 1 and scheduler is not None:
        raise UsageError("--jobs: got a number beside --scheduler, whose workers say how many run at once; allowed one")
    if jobs > 1 or scheduler is not None:
        _refuse_timings(waiting, "--jobs" if scheduler is None else "--scheduler", scheduler or jobs)
    check_cells(waiting, console, own)
    failed: dict[str, str] = {}
    with progress_bar(console, lines=False) as bar:
        task = bar.add_task(f"study {study.name}", total=len(chosen), completed=len(chosen) - len(waiting), note="")

        def begin(cell: Cell) -> None:
            bar.update(task, note=cell.name)
            console.print(f"study {study.name}: cell {chosen.index(cell) + 1} of {len(chosen)}: {cell.name}")

        def end(cell: Cell, fault: str | None) -> None:
            if fault is None:
                _write_table(study, folder, command)
            else:
                failed[cell.name] = fault
                console.print(Text.assemble(("failed:", "red"), f" {cell.name}: {fault}"), soft_wrap=True)
            bar.update(task, advance=1)

        if jobs == 1 and scheduler is None:
            in_turn = partial(_run_cell, folder=folder, command=command, console=console, own=own)
            _in_turn(waiting, in_turn, begin=begin, end=end)
        else:
            with local_processes(jobs) if scheduler is None else dask_workers(scheduler, folder) as pool:
                apart = partial(
                    _run_quietly, folder=folder.resolve(), command=command, threads=pool.threads, module=module
                )
                with _endings_told(folder, console, pool.interrupted):
                    side_by_side(pool, waiting, apart, begin=begin, end=end)
    comparison = _write_table(study, folder, command)
    if failed:
        listed = "\n".join(f"  - {name}: {message}" for name, message in failed.items())
        raise StudyError(
            f"{folder}: {len(failed)} of {len(chosen)} cells failed; the same command tries them again:\n{listed}"
        )
    if page is not None:
        write_file(page, with_section(_page_text(page), study.name, markdown(comparison)))
    return comparison


def _own_module(study: Study, module: str | None) -> OwnModel | None:
    """The user's own module, which some cell must name."""
    if module is None:
        return None
    own = own_model_of(module)
    if all(cell.policy.model.source != own.source for cell in study.cells):
        raise UsageError(
            f"--module: got {own.source}, which no cell names; allowed the model.source of a cell: "
            f"{listed(sorted({cell.policy.model.source for cell in study.cells}))}"
        )
    return own


def _module_of(policy: Policy, own: OwnModel | None) -> OwnModel | None:
    """The user's own module, if this policy names it."""
    return own if own is not None and policy.model.source == own.source else None


def check_cells(cells: Sequence[Cell], console: Console, own: OwnModel | None = None) -> None:
    """Plan every cell on its model's configs; cells with equal plans are planned once.

    Raises:
        StudyError: `plan` finds faults; the message names the cells of each.
    """
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(json.dumps(_planned_by(cell.policy), sort_keys=True), []).append(cell)
    faults: dict[str, list[str]] = {}
    with working(console, "study: planning every cell") as tell:
        for place, group in enumerate(alike.values(), start=1):
            tell(f"study: plan {place} of {len(alike)}: {group[0].name}")
            try:
                planned_shapes(group[0].policy, _module_of(group[0].policy, own))
            except PqcadError as error:
                faults.setdefault(str(error), []).extend(cell.name for cell in group)
    if faults:
        count = sum(map(len, faults.values()))
        lines = [f"{listed(names)}: {line}" for fault, names in faults.items() for line in fault.splitlines()]
        raise StudyError(
            "\n".join(
                [f"got {count} of {len(cells)} cells that cannot run; allowed cells that `plan` accepts:", *lines]
            )
        )


def _planned_by(policy: Policy) -> dict[str, Any]:
    """Part of a policy that can affect its plan: everything except how the model is trained."""
    values = policy.model_dump(mode="json", exclude={"name", "progressive", "training"})
    return {**values, "ladder": policy.progressive.ladder, "checkpointing": policy.training.activation_checkpointing}


def _write_table(study: Study, folder: Path, command: str) -> Comparison:
    """Write the table and page of the finished cells."""
    done = [cell for cell in study.cells if finished(folder / cell.name)]
    runs = [Run(str(folder / cell.name), cell.labels, read_report(folder / cell.name)) for cell in done]
    comparison = compare_runs(study.name, runs, command)
    write_comparison(comparison, folder / STUDY_PAGE)
    return comparison


def chosen_cells(study: Study, only: str) -> list[Cell]:
    """Cells whose names match a glob.

    Raises:
        StudyError: no cell matches.
    """
    chosen = [cell for cell in study.cells if fnmatchcase(cell.name, only)]
    if not chosen:
        raise StudyError(
            f"--only: got {only!r}, which matches none of the {len(study.cells)} cells; allowed a glob, "
            f"as of {study.cells[0].name}"
        )
    return chosen


def finished(path: Path) -> bool:
    """Tell whether a run's report exists, which is written last."""
    return (path / PAGE_FILE).is_file()


Begin = Callable[[Cell], None]
End = Callable[[Cell, str | None], None]
"""Callbacks for a cell that begins, and for a cell that ended, with the fault if it failed."""

RunCell = Callable[[Cell], str | None]
"""Function that runs or resumes a cell and returns its fault, or None."""


def _in_turn(cells: Sequence[Cell], run_cell: RunCell, *, begin: Begin, end: End) -> None:
    for cell in cells:
        begin(cell)
        end(cell, run_cell(cell))


@contextmanager
def _endings_told(folder: Path, console: Console, interrupted: str) -> Iterator[None]:
    """Explain what ends cells that run side by side.

    Raises:
        StudyError: the process of a cell died.
    """
    try:
        yield
    except LostTaskError as error:
        raise StudyError(
            f"{folder}: got a process that died at {error.task.name}, perhaps for want of memory; "
            "allowed fewer at a time, which need less: the same command goes on"
        ) from None
    except KeyboardInterrupt:
        console.print(f"interrupted: {interrupted}")
        raise


def _run_quietly(
    cell: Cell, *, folder: Path, command: str, threads: Callable[[], int], module: str | None
) -> str | None:
    """Run a cell in this process, which has no other work; its output goes to a file."""
    torch.set_num_threads(threads())
    own = None if module is None else own_model_of(module)
    (folder / CONSOLES).mkdir(parents=True, exist_ok=True)
    with (folder / CONSOLES / f"{cell.name}.txt").open("a", encoding="utf-8") as file:
        console = Console(file=file, width=160, markup=False)
        return _run_cell(cell, folder=folder, command=command, console=console, own=own)


def _run_cell(cell: Cell, *, folder: Path, command: str, console: Console, own: OwnModel | None) -> str | None:
    """Run or resume a cell; return its fault, or None."""
    try:
        model = _module_of(cell.policy, own)
        pipeline.run(cell.policy, folder / cell.name, command, console, resume=True, shares_training=True, model=model)
    except InterruptedByUserError:
        raise KeyboardInterrupt from None
    except PqcadError as error:
        return str(error)
    except Exception as error:  # no fault of this cell may lose the other cells
        write_file(folder / ERRORS / f"{cell.name}.txt", traceback.format_exc())
        return f"{type(error).__name__}: {error} ({ERRORS}/{cell.name}.txt has its traceback)"
    return None


def _refuse_timings(cells: Sequence[Cell], option: str, value: object) -> None:
    timing = [cell.name for cell in cells if "benchmark" in stages_of(cell.policy.variants)]
    timed = [name for name, spec in VARIANTS.items() if "benchmark" in spec.stages]
    if timing:
        raise StudyError(
            f"{option}: got {value}, but {len(timing)} cells time models, which others beside them would disturb: "
            f"{timing[0]}, ...; allowed one at a time, or no deploy and evaluation.variants without {', '.join(timed)}"
        )


def _refuse_changed(study: Study, folder: Path) -> None:
    faults = []
    for cell in study.cells:
        try:
            if (folder / cell.name / POLICY).is_file():
                check_policy(folder / cell.name / POLICY, cell.policy)
        except PqcadError as error:
            faults.append(str(error))
    if faults:
        advice = (
            f"{folder}: got a study that has changed; allowed the same, or another folder: --out DIR starts it anew"
        )
        raise CheckpointError("\n".join([*faults, advice]))


def checked_cells(
    study: Study,
    folder: Path,
    console: Console,
    *,
    only: str = "*",
    page: Path | None = None,
    module: str | None = None,
) -> tuple[CellState, ...]:
    """List the work and the progress of every cell; nothing is run or written.

    Raises:
        UsageError, StudyError: `sweep` would refuse before the first cell.
    """
    if page is not None:
        with_section(_page_text(page), study.name, "")
    chosen = chosen_cells(study, only)
    check_cells(chosen, console, _own_module(study, module))
    states = []
    for cell in chosen:
        stages = [stage for stage in stages_of(cell.policy.variants) if stage in TRAINED]
        path = folder / cell.name
        state = "finished" if finished(path) else "begun" if (path / POLICY).is_file() else "new"
        steps = sum(most_steps(cell.policy, stage) for stage in stages)
        automatic = any(training_steps(cell.policy, stage) is None for stage in stages)
        states.append(CellState(cell.name, cell.policy.variants, tuple(stages), steps, state, automatic))
    return tuple(states)


def _page_text(page: Path) -> str:
    """Read a Markdown file; a file that does not exist yet is empty.

    Raises:
        UsageError: the file is not text, or its folder does not exist.
    """
    if page.parent.is_dir() and not page.exists():
        return ""
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--page: got {shortened(str(page))!r}; allowed a Markdown file, or a new one") from error
