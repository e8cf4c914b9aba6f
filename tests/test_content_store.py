"""Folders that runs share: made once, whole or not at all.

Not here: what runs keep in them (test_pipeline.py, test_study.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pqcad_qat.content_store import content_digest, kept


def writing(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "file").write_text(text)

    return make


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    first = kept(tmp_path, {"seed": 1}, writing("one"))
    again = kept(tmp_path, {"seed": 1}, lambda _: pytest.fail("made twice"))
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
        kept(tmp_path, {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_the_same_at_once_one_is_kept(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        kept(tmp_path, {}, writing("first"))
        (folder / "file").write_text("second")

    assert (kept(tmp_path, {}, make) / "file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1
