"""Folders shared by processes that run side by side, each named by a hash of everything that decides its content.

Not here: what the folders hold.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

WHOLE, PARTS = "whole", "parts"
"""Names inside a draft: the folder that is later moved into place, and the parts that it is made from."""

LOCKS = ".locks"
"""Folder of the files by which processes wait for each other. They are empty, and stay: a file that is removed while
another process waits for it locks nothing.
"""


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
    if not folder.exists() or draft.exists():
        locks = store / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / folder.name):
            if not folder.exists():  # by another process, meanwhile
                draft.mkdir(exist_ok=True)
                _fill(draft, folder, make)
            elif draft.exists():  # left by a process that was killed after it had moved the folder
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
    """Fill the draft and move it into place; a failure leaves nothing but the parts."""
    whole, unfinished = draft / WHOLE, draft / PARTS
    try:
        for leftover in [entry for entry in draft.iterdir() if entry != unfinished]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        whole.mkdir()
        make(whole)
        whole.rename(folder)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
        if folder.exists() or not (unfinished.exists() and any(unfinished.iterdir())):
            shutil.rmtree(draft, ignore_errors=True)
