"""What long work tells where no terminal is: lines without escape codes, one at the end at least.

Not here: the line of a stage that trains (test_metrics_log.py).
"""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pqcad_qat.machine import progress
from pqcad_qat.machine.progress import progress_bar, working
from pqcad_qat.policy.variants import PQ


def piped() -> Console:
    return Console(file=io.StringIO(), width=40, markup=False)


def lines_of(console: Console) -> list[str]:
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    return list(text.splitlines())


def test_work_that_is_soon_done_has_one_line() -> None:
    console = piped()
    with progress_bar(console) as bar:
        task = bar.add_task("sample [fp32]", total=3, note="openvino")
        for _ in range(3):
            bar.update(task, advance=1)
        bar.update(task, advance=0)
    assert [re.sub(r"\d+:\d\d:\d\d", "T", line) for line in lines_of(console)] == ["sample [fp32]: 3 of 3, openvino, T"]


def test_long_work_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    console = piped()
    with progress_bar(console) as bar:
        task = bar.add_task("calibration", total=100, note="")
        for _ in range(3):
            bar.advance(task)
    assert [line.split(",")[0] for line in lines_of(console)] == ["calibration: 2 of 100"]


def test_a_bar_without_lines_is_silent() -> None:
    console = piped()
    with progress_bar(console, lines=False) as bar:
        bar.update(bar.add_task(PQ, total=1, note=""), advance=1)
    assert lines_of(console) == []


def test_work_of_unknown_length_says_what_it_is_at_once() -> None:
    console = piped()
    with working(console, "export: writing") as tell:
        assert lines_of(console) == ["export: writing"]
        tell("export: proving")
    assert lines_of(console) == ["export: writing"]


def test_a_terminal_is_shown_a_bar_and_no_line() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with progress_bar(console) as bar:
        bar.update(bar.add_task("sample", total=1, note=""), advance=1)
    assert "sample: 1 of 1" not in console.file.getvalue()  # type: ignore[attr-defined]
