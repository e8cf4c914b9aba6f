"""A table for terminals of any width: if its columns do not fit side by side, every row becomes a block of lines.

Not here: the contents of tables (tables.py and the files of the pages). Rich's own tables would cut numbers and break
names.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

SPARE = 3
"""Number of terminal columns between two columns of a table."""


class TerminalTable(Table):
    """A rich table whose words are never broken: headings wrap at spaces, and if that is not enough, rows become
    blocks.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A column is never narrower than its longest word. If the columns do not fit even so, rows become blocks;
        # otherwise the space left over goes to the first columns.
        ranges = [_range(console, options, column) for column in self.columns]
        room = options.max_width - SPARE * len(ranges) - 1
        if sum(least for least, _ in ranges) > room:
            yield from self._blocks()
            return
        spare = room - sum(least for least, _ in ranges)
        for column, (least, most) in zip(self.columns, ranges, strict=True):
            column.min_width = least
            if sum(most for _, most in ranges) > room:  # the first columns get the remaining width
                column.width = least + min(spare, most - least)
                spare -= column.width - least
        yield from super().__rich_console__(console, options)

    def _blocks(self) -> Iterator[Text | Padding]:
        """Yield the title, one block for each row headed by its first cell, and the caption."""
        if self.title:
            yield Text(str(self.title), "italic")
        headings = [_plain(column.header) for column in self.columns]
        for row, cells in zip(self.rows, zip(*(column.cells for column in self.columns), strict=True), strict=True):
            first, *rest = map(_plain, cells)
            pairs = zip(headings[1:], rest, strict=True)
            yield Text(f"{headings[0]} {first}".strip(), f"bold {row.style or ''}".strip())
            yield Padding(Text("; ".join(f"{heading} {cell}" for heading, cell in pairs if cell)), (0, 0, 0, 2))
        if self.caption:
            yield Text(str(self.caption), "dim")


def _range(console: Console, options: ConsoleOptions, column: Column) -> tuple[int, int]:
    """Smallest and largest number of terminal columns that a column of the table needs."""
    cells = [column.header, *column.cells]
    measurements = [Measurement.get(console, options.update(max_width=10_000), cell) for cell in cells]
    return max(each.minimum for each in measurements), max(each.maximum for each in measurements)


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
