"""Progress of long work: a bar or spinner on a terminal, and a line from time to time elsewhere.

No line holds escape codes, so the lines can be kept in a file.

Not here: the work itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

SECONDS = 15.0
"""Seconds between two lines of one piece of work, where there is no terminal."""


class ProgressLines(Progress):
    """A progress bar that prints lines if its console is no terminal: one every `seconds`, and one at the end.

    Attributes:
        seconds: time between two lines; None prints none.
    """

    def __init__(self, *columns: str | ProgressColumn, console: Console, auto_refresh: bool, seconds: float | None):
        super().__init__(*columns, console=console, disable=not console.is_terminal, auto_refresh=auto_refresh)
        self.seconds = seconds
        self._printed_at: dict[TaskID, float] = {}

    def add_task(self, *args: Any, **fields: Any) -> TaskID:
        task = super().add_task(*args, **fields)
        self._printed_at[task] = monotonic()
        return task

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        """Print the progress, if it is time to."""
        task = self._tasks[task_id]
        if not self.disable or self.seconds is None or task.total is None or task_id not in self._printed_at:
            return
        if not task.finished and monotonic() - self._printed_at[task_id] < self.seconds:
            return
        self._printed_at[task_id] = monotonic()
        if task.finished:
            del self._printed_at[task_id]  # this was the last line
        spent = timedelta(seconds=round(task.finished_time or task.elapsed or 0))
        note = f", {task.fields['note']}" if task.fields.get("note") else ""
        line = f"{task.description}: {task.completed:g} of {task.total:g}{note}, {spent}"
        self.console.print(Text(line), soft_wrap=True)


def progress_bar(console: Console, quiet: bool = False, lines: bool = True) -> ProgressLines:
    """The common look of all progress bars: name, bar, count, note, time spent and time left.

    Args:
        console: where it is shown.
        quiet: whether it is drawn only on demand, so that it takes no time from work that is being timed.
        lines: whether lines are printed if the console is no terminal.
    """
    return ProgressLines(
        TextColumn("[bold]{task.description:<14}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=not quiet,
        seconds=SECONDS if lines else None,
    )


@contextmanager
def counting(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of one piece of work; the yielded function advances it."""
    with progress_bar(console) as bar:
        task = bar.add_task(name, total=total, note="")
        yield lambda count: bar.update(task, advance=count)


@contextmanager
def working(console: Console, activity: str) -> Iterator[Callable[[str], None]]:
    """Show what is going on where the progress is unknown; the yielded function names the next activity.

    A terminal shows a spinner. Elsewhere a line is printed at the start and from time to time.
    """
    if console.is_terminal:
        with console.status(Text(activity)) as status:
            yield lambda text: status.update(Text(text))
        return
    now, began, ended = [activity], monotonic(), threading.Event()

    def tell() -> None:
        spent = timedelta(seconds=round(monotonic() - began))
        console.print(Text(f"{now[0]}, {spent}" if spent else now[0]), soft_wrap=True)

    def keep_telling() -> None:
        while not ended.wait(2 * SECONDS):
            tell()

    tell()
    teller = threading.Thread(target=keep_telling, name="progress", daemon=True)
    teller.start()
    try:
        yield lambda text: now.__setitem__(0, text)
    finally:
        ended.set()
        teller.join()
