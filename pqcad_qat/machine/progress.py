"""The one progress bar of long work on a terminal.

Not here: what is printed where no terminal is.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console, quiet: bool = False) -> Progress:
    """The one look of every progress line: name, bar, count, what is going on, time spent and left.

    `quiet`: drawn only when it is told to, so that it takes no time from what is being timed.
    """
    return Progress(
        TextColumn("[bold]{task.description:<14}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        auto_refresh=not quiet,
    )
