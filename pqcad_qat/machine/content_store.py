"""Folders shared by processes that run side by side, each named by a hash of everything that decides its content.

Not here: what the folders hold.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock

from pqcad_qat.machine.processes import agreed, any_process, is_first, process_count

WHOLE, PARTS = "whole", "parts"
"""Names inside a draft: the folder that is later moved into place, and the parts that it is made from."""

LOCKS = ".locks"
"""Folder of the files by which processes wait for each other. They are empty, and stay: a file that is removed while
another process waits for it locks nothing.
"""


def content_digest(decides: Mapping[str, object]) -> str:
    """Name of a folder: a hash of `decides`, which holds JSON values by name."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def shared_folder(
    store: Path, decides: Mapping[str, object], make: Callable[[Path], None], *, together: bool = False
) -> Path:
    """The folder for `decides`: an existing one, or a new one that `make` fills.

    `make` fills it under a temporary name; then it is moved into place. If another process is making the same folder,
    this one waits for it. The half-made content of a killed process is dropped, except for what lies in `parts_folder`:
    `make` finds these parts and continues with them.

    With `together`, all processes of a run call this, and `make` is called in all of them or in none.
    """
    folder = store / content_digest(decides)
    draft = store / f".{folder.name}"
    alone = not together or process_count() == 1
    if alone and folder.exists() and not draft.exists():
        return folder
    locks = store / LOCKS
    locks.mkdir(parents=True, exist_ok=True)
    decides_for_all = alone or is_first()
    with FileLock(locks / folder.name) if decides_for_all else nullcontext():
        missing = decides_for_all and not folder.exists()  # another run may have made it meanwhile
        if missing if alone else any_process(missing):
            draft.mkdir(exist_ok=True)
            _fill(draft, folder, make, together=not alone)
        elif decides_for_all and draft.exists():  # left by a process that was killed after it had moved the folder
            shutil.rmtree(draft)
    return folder


def parts_folder(folder: Path) -> Path:
    """Folder for intermediate results of `make`.

    They outlive a failure or a killed process, and are removed when the shared folder is complete.

    Args:
        folder: the folder that `shared_folder` passes to `make`.
    """
    return folder.with_name(PARTS)


def _fill(draft: Path, folder: Path, make: Callable[[Path], None], *, together: bool) -> None:
    """Fill the draft and move it into place; a failure leaves nothing but the parts."""
    whole, unfinished = draft / WHOLE, draft / PARTS
    first, step = not together or is_first(), agreed if together else nullcontext
    try:
        with step():
            if first:
                for leftover in [entry for entry in draft.iterdir() if entry != unfinished]:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                whole.mkdir()
        with step():
            make(whole)
        with step():
            if first:
                whole.rename(folder)
    finally:
        if first:
            shutil.rmtree(whole, ignore_errors=True)
            if folder.exists() or not (unfinished.exists() and any(unfinished.iterdir())):
                shutil.rmtree(draft, ignore_errors=True)
