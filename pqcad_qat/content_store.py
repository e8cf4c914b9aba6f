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


def content_digest(decides: Mapping[str, object]) -> str:
    """The name of what `decides`, JSON values by name, leads to."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def kept(store: Path, decides: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder of what `decides`: there already, or filled by `make` under a temporary name and moved into place.

    Where another process is making it, this one waits for it rather than make the same; what a killed one left half made is dropped.
    """
    folder = store / content_digest(decides)
    draft = store / f".{folder.name}"
    while not folder.exists():
        with _held(draft) as mine:
            if not mine or folder.exists():
                continue
            try:
                for left in draft.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                make(draft)
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


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
