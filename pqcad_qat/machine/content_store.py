"""Folders shared by processes that run side by side, each named by a hash of everything that decides its content.

Not here: what the folders hold.
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
"""Names inside a draft: the folder that is later moved into place, and the parts that it is made from."""


def content_digest(decides: Mapping[str, object]) -> str:
    """Name of a folder: a hash of `decides`, which holds JSON values by name."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def shared_folder(store: Path, decides: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder for `decides`: an existing one, or a new one that `make` fills.

    `make` fills it under a temporary name; then it is moved into place. If another process is making the same folder,
    this one waits for it. The half-made content of a killed process is dropped, except for what lies in `parts_folder`:
    `make` finds these parts and continues with them.
    """
    folder = store / content_digest(decides)
    draft = store / f".{folder.name}"
    # repeated, because another process may have held the draft and then failed
    while not folder.exists():
        with _locked(draft) as mine:
            if mine:
                _fill(draft, folder, make)
    if draft.exists():  # left by a process that was killed after it had moved the folder
        with suppress(OSError), _locked(draft) as mine:
            if mine:
                shutil.rmtree(draft)
    return folder


def parts_folder(folder: Path) -> Path:
    """Folder for intermediate results of `make`.

    They outlive a failure or a killed process, and are removed when the shared folder is complete.

    Args:
        folder: the folder that `shared_folder` passes to `make`.
    """
    return folder.with_name(PARTS)


def _fill(draft: Path, folder: Path, make: Callable[[Path], None]) -> None:
    """Fill the draft and move it into place, unless that has been done; a failure leaves nothing but the parts."""
    whole, unfinished = draft / WHOLE, draft / PARTS
    try:
        for leftover in [entry for entry in draft.iterdir() if entry != unfinished]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if not folder.exists():
            whole.mkdir()
            make(whole)
            whole.rename(folder)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
        if folder.exists() or not (unfinished.exists() and any(unfinished.iterdir())):
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _locked(draft: Path) -> Iterator[bool]:
    """Wait until no other process works in the draft; yield False if it was moved or removed meanwhile.

    Method: the lock (flock) is on the opened folder. After waiting, the folder of that name may be another one, so the
    two are compared.
    """
    draft.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # Path.mkdir(exist_ok=True) raises it too if the folder is removed meanwhile
        draft.mkdir()
    try:
        opened = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # it was moved into place meanwhile
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
