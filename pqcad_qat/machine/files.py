"""Files that are written as a whole or not at all, their digests, and the error for a disk without room.

Not here: the content of files, and tensors (tensor_files.py). Needs the standard library alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pqcad_qat.errors import DiskError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""Error numbers of a disk that is full, over its quota or read-only, and of a file that may not grow so large."""


@contextmanager
def whole_file(path: Path, size: int | None = None) -> Iterator[Path]:
    """Yield the name of a draft, which is moved into place after the block has written it.

    If the block fails, the old file stays and the draft is removed.

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


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all: a reader never sees half of it."""
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path, len(data)) as draft:
        draft.write_bytes(data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as a whole or not at all."""
    write_file(path, json.dumps(dict(content), indent=2) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def room_for(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn a disk's refusal inside the block into a DiskError; `size` is the size in bytes, where it is known.

    Raises:
        DiskError: the disk refuses; the message names the path, the bytes needed and the bytes free.
    """
    try:
        yield
    except Exception as error:
        if (reason := disk_refusal(error)) is None:
            raise
        named = Path(os.fsdecode(error.filename)) if isinstance(error, OSError) and error.filename is not None else path
        # a draft is reported under the name of the final file
        where, wanted = (path, size) if named.parent == path.parent else (named, None)
        raise DiskError(f"{where}: cannot be written: {reason}: {_wanted(where, wanted)}") from error


def disk_refusal(error: BaseException) -> str | None:
    """The system's text for the refusal of a disk; None for any other error."""
    if isinstance(error, OSError):
        error_number = error.errno
    elif _is_of_safetensors(error):  # the error number is only in its text
        error_number = int(match[1]) if (match := re.search(r"os error (\d+)", str(error))) else None
    else:  # OpenVINO writes with C++ streams, which do not say why they fail
        error_number = errno.ENOSPC if isinstance(error, RuntimeError) and "iostream error" in str(error) else None
    return os.strerror(error_number) if error_number in REFUSALS else None


def _is_of_safetensors(error: BaseException) -> bool:
    """Whether safetensors raised the error; the library need not be installed where a folder is served."""
    module = sys.modules.get("safetensors")
    return module is not None and isinstance(error, module.SafetensorError)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds, or will hold, a file or folder."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _wanted(path: Path, size: int | None) -> str:
    """The bytes that a file needs, where they are known, and those that are free."""
    free = free_bytes(path)
    return (
        f"more than the {free:,} bytes that are free are wanted"
        if size is None
        else f"{size:,} bytes are wanted, {free:,} are free"
    )
