"""Tensors in files: written as a whole or not at all, and gathered in parts so that long work can resume.

Not here: what the tensors mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pqcad_qat.errors import InterruptedByUserError
from pqcad_qat.machine.files import whole_file

Rows = Mapping[str, Tensor]
"""Tensors by name that agree in the size of their first dimension."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with notes as its metadata, as a whole or not at all, and flush it to the disk.

    Raises:
        DiskError: the disk refuses it.
    """
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    with whole_file(path, sum(value.nbytes for value in contiguous.values())) as draft:
        save_file(contiguous, draft, dict(notes or {}))
        with draft.open("rb") as file:
            os.fsync(file.fileno())


def read_notes(path: Path) -> dict[str, str]:
    """The notes that `save_tensors` has put into a file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def gathered(folder: Path | None, rows: int, batches: Callable[[int], Iterable[Rows]], work: str) -> dict[str, Tensor]:
    """Gather a number of rows, batch by batch.

    Every new batch is saved in `folder` as a part, a file whose name states its first row. Parts of an earlier process
    are read if they follow one another from row 0 on, and making continues after the last of them.

    Args:
        folder: folder of parts, possibly with those of an earlier process that was cut off; None saves nothing.
        rows: total number of rows.
        batches: function that makes batches from the given row on.
        work: name of the work in the message of an interruption, such as "calibration: trajectories".

    Returns:
        The rows, by name.

    Raises:
        InterruptedByUserError: the user interrupts; the message says how many rows are in the folder.
        DiskError: the disk refuses a part; the parts before it stay.
    """
    collected: list[Rows] = [] if folder is None else list(_read_parts(folder))
    done = sum(map(_count, collected))
    try:
        for batch in batches(done) if done < rows else ():
            # contiguous, as rows read from files are: a model may return channels last
            collected.append({name: value.contiguous() for name, value in batch.items()})
            if folder is not None:
                save_tensors(collected[-1], folder / _name(done))
            done += _count(batch)
    except KeyboardInterrupt:
        if folder is None:
            raise
        stage, _, rest = work.partition(": ")
        raise InterruptedByUserError(f"interrupted in {stage}: {done} of {rows} {rest} are kept") from None
    return {name: torch.cat([part[name] for part in collected]) for name in collected[0]}


def _read_parts(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The parts from the first row on, up to the first that is missing or damaged.

    That part and all later ones are removed.
    """
    files, done = sorted(folder.glob("rows-*")), 0
    drafts = list(folder.glob(".*"))
    while files and files[0].name == _name(done):
        try:
            part = load_file(files[0])
        except SafetensorError:
            break
        yield part
        done += _count(part)
        files.pop(0)
    for useless in (*files, *drafts):
        useless.unlink()


def _name(first: int) -> str:
    """Name of the part that begins with this row."""
    return f"rows-{first:09d}.safetensors"


def _count(part: Rows) -> int:
    return len(next(iter(part.values())))
