"""A table on terminals of every width: no word is broken and no number is cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from pqcad_qat.policy.variants import PQCAD_OPENVINO
from pqcad_qat.report.terminal_table import TerminalTable

WORDS = ("down_blocks.0.resnets.0.conv1", "re:[/a-z]+", "435.12", "unsteady", PQCAD_OPENVINO, "1,234,567")


def shown(width: int) -> str:
    table = TerminalTable("variant", "rule that matches", "ms/image", "parameters", title="w4a8", caption="two rows")
    table.add_row(Text("down_blocks.0.resnets.0.conv1"), Text("re:[/a-z]+"), "435.12 unsteady", "1,234,567")
    table.add_row(PQCAD_OPENVINO, "", "16.34", "12", style="dim")
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [200, 80, 72, 60, 50, 40])
def test_words_and_numbers_are_whole_at_every_width(width: int) -> None:
    text = shown(width)
    assert all(word in text for word in (*WORDS, "w4a8", "two rows"))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_columns_stand_side_by_side_where_there_is_room_for_them() -> None:
    assert any(PQCAD_OPENVINO in line and "16.34" in line for line in shown(80).splitlines())


def test_a_row_becomes_a_block_where_there_is_none() -> None:
    lines = [line.rstrip() for line in shown(50).splitlines()]
    assert lines[lines.index(f"variant {PQCAD_OPENVINO}") + 1] == "  ms/image 16.34; parameters 12"
