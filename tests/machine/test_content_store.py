"""Folders that runs share: made once, whole or not at all.

Not here: what runs keep in them (test_run.py, test_sweep.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pqcad_qat.machine.content_store import LOCKS, content_digest, parts_folder, shared_folder

PATIENCE = 120  # seconds; a busy machine is no failure


def entries(store: Path) -> list[Path]:
    """What a store holds, without the files by which processes wait."""
    return [path for path in store.iterdir() if path.name != LOCKS]


def writing(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "file").write_text(text)

    return make


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    first = shared_folder(tmp_path, {"seed": 1}, writing("one"))
    again = shared_folder(tmp_path, {"seed": 1}, lambda _: pytest.fail("made twice"))
    assert first == again == tmp_path / content_digest({"seed": 1})
    assert (again / "file").read_text() == "one"


def test_everything_that_decides_is_in_the_name_and_its_order_is_not() -> None:
    assert content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})
    assert content_digest({"a": 1, "b": 2}) != content_digest({"a": 1, "b": 3})


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        shared_folder(tmp_path, {}, fail)
    assert entries(tmp_path) == []


def test_what_fails_before_its_first_part_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        parts_folder(folder).mkdir()
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        shared_folder(tmp_path, {}, fail)
    assert entries(tmp_path) == []


def test_of_two_that_make_the_same_at_once_one_waits_for_the_other(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def make(folder: Path) -> None:
        begun.set()
        assert may_end.wait(PATIENCE)
        (folder / "file").write_text("first")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(shared_folder, tmp_path, {}, make)
        assert begun.wait(PATIENCE)
        second = pool.submit(shared_folder, tmp_path, {}, lambda _: pytest.fail("made twice"))
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        may_end.set()
        assert first.result(PATIENCE) == second.result(PATIENCE) == tmp_path / content_digest({})
    assert (first.result() / "file").read_text() == "first"
    assert len(entries(tmp_path)) == 1


def test_where_the_first_fails_the_one_that_waited_makes_it(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def fail(folder: Path) -> None:
        begun.set()
        assert may_end.wait(PATIENCE)
        raise ValueError("disk full")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(shared_folder, tmp_path, {}, fail)
        assert begun.wait(PATIENCE)
        second = pool.submit(shared_folder, tmp_path, {}, writing("second"))
        may_end.set()
        with pytest.raises(ValueError, match="disk full"):
            first.result(PATIENCE)
        assert (second.result(PATIENCE) / "file").read_text() == "second"
    assert len(entries(tmp_path)) == 1


def test_what_a_killed_process_left_half_made_is_dropped(tmp_path: Path) -> None:
    draft = tmp_path / f".{content_digest({})}"
    (draft / "logs").mkdir(parents=True)
    (draft / "half").write_text("")
    folder = shared_folder(tmp_path, {}, writing("whole"))
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert entries(tmp_path) == [folder]


def test_what_lies_in_its_parts_outlives_a_failure_and_a_killed_process_and_is_gone_once_the_folder_is_whole(
    tmp_path: Path,
) -> None:
    def fail(folder: Path) -> None:
        parts_folder(folder).mkdir(exist_ok=True)
        (parts_folder(folder) / "first").write_text("first")
        (folder / "half").write_text("")
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        shared_folder(tmp_path, {}, fail)
    draft = tmp_path / f".{content_digest({})}"
    assert [path.relative_to(tmp_path) for path in draft.rglob("*") if path.is_file()] == [
        Path(draft.name) / "parts" / "first"
    ]
    (draft / "whole").mkdir()
    (draft / "whole" / "half").write_text("of a process that was killed")

    def go_on(folder: Path) -> None:
        assert entries(folder) == []
        (folder / "file").write_text((parts_folder(folder) / "first").read_text())

    folder = shared_folder(tmp_path, {}, go_on)
    assert (folder / "file").read_text() == "first"
    assert entries(tmp_path) == [folder]
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_what_a_process_left_that_was_killed_after_it_had_moved_the_folder_is_removed(tmp_path: Path) -> None:
    folder = shared_folder(tmp_path, {}, writing("whole"))
    (tmp_path / f".{folder.name}" / "parts").mkdir(parents=True)
    assert shared_folder(tmp_path, {}, lambda _: pytest.fail("made twice")) == folder
    assert entries(tmp_path) == [folder]
