"""Files that are written whole or not at all, and what is told where a disk has no room for one.

Not here: what is in them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pqcad_qat.errors import DiskError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""A disk that is full, over its quota, or read-only, and a file that may not grow so large."""


@contextmanager
def whole_file(path: Path, size: int | None = None) -> Iterator[Path]:
    """The name of a draft, moved into place once the block has written it; where the block fails, what was there stays
    and no draft does.

    Raises:
        DiskError: as `room_for`.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with room_for(path, size):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name and move it into place."""
    with whole_file(path, len(text)) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def room_for(path: Path, size: int | None = None) -> Iterator[None]:
    """Around what writes a file or folder, of so many bytes where that is known.

    Raises:
        DiskError: its disk refuses it; the message has the path, the bytes wanted and those that are free.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := disk_refusal(error)) is None:
            raise
        named = Path(os.fsdecode(error.filename)) if isinstance(error, OSError) and error.filename is not None else path
        where, wanted = (
            (path, size) if named.parent == path.parent else (named, None)
        )  # a draft goes by the name of what it is of
        raise DiskError(f"{where}: cannot be written: {reason}: {_wanted(where, wanted)}") from error


def disk_refusal(error: BaseException) -> str | None:
    """What a disk has refused, or None where the error is of another kind."""
    if isinstance(error, OSError):
        number = error.errno
    elif isinstance(error, SafetensorError):  # it has the number in its text alone
        number = int(known[1]) if (known := re.search(r"os error (\d+)", str(error))) else None
    else:  # OpenVINO writes by streams of C++, which do not say why they fail
        number = errno.ENOSPC if isinstance(error, RuntimeError) and "iostream error" in str(error) else None
    return os.strerror(number) if number in REFUSALS else None


def free_bytes(path: Path) -> int:
    """Bytes that are free where a file or folder is, or is to be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _wanted(path: Path, size: int | None) -> str:
    free = free_bytes(path)
    return (
        f"more than the {free:,} bytes that are free are wanted"
        if size is None
        else f"{size:,} bytes are wanted, {free:,} are free"
    )
