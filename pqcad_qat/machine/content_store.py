"""Folders of work that runs side by side share, each named by the hash of all that decides its contents.

Not here: what is kept in them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

WHOLE, PARTS = "whole", "parts"
"""What a draft holds: what is moved into place, and what it is made of."""


def content_digest(decides: Mapping[str, object]) -> str:
    """The name of what `decides`, JSON values by name, leads to."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def kept(store: Path, decides: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder of what `decides`: there already, or filled by `make` under a temporary name and moved into place.

    Where another process is making it, this one waits for it rather than make the same. What a killed one left half
    made is dropped, but
    for what lies in `parts_of` the folder that it filled: `make` finds that there, and goes on with it.
    """
    folder = store / content_digest(decides)
    draft = store / f".{folder.name}"
    while not folder.exists():
        with _held(draft) as mine:
            if mine:
                _fill(draft, folder, make)
    if draft.exists():  # of a process that was killed after it had moved the folder
        with suppress(OSError), _held(draft) as mine:
            if mine:
                shutil.rmtree(draft)
    return folder


def parts_of(folder: Path) -> Path:
    """Where what `kept` fills a folder with lays what is to outlive a failure and a killed process, until the folder is
    whole.
    """
    return folder.with_name(PARTS)


def _fill(draft: Path, folder: Path, make: Callable[[Path], None]) -> None:
    """Fill the draft and move it into place, unless that has been done; of a failure nothing is left but its parts."""
    whole, parts = draft / WHOLE, draft / PARTS
    try:
        for left in [entry for entry in draft.iterdir() if entry != parts]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not folder.exists():
            whole.mkdir()
            make(whole)
            whole.rename(folder)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
        if folder.exists() or not (parts.exists() and any(parts.iterdir())):
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _held(draft: Path) -> Iterator[bool]:
    """Wait until no other process works in the folder; False where it was moved or removed meanwhile."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # Path.mkdir(exist_ok=True) raises it where the folder is removed right then
        draft.mkdir()
    try:
        opened = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # moved into place since
        yield False
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        same = False
        with suppress(FileNotFoundError):
            same = os.path.samestat(os.fstat(opened), draft.stat())
        yield same
    finally:
        os.close(opened)
