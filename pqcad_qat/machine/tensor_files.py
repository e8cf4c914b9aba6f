"""Tensors in files: written as a whole or not at all, and gathered in parts so that long work can resume.

Not here: what the tensors mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pqcad_qat.errors import InterruptedByUserError
from pqcad_qat.machine.files import whole_file
from pqcad_qat.machine.processes import agreed, process_count, process_number

Rows = Mapping[str, Tensor]
"""Tensors by name that agree in the size of their first dimension."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with notes as its metadata, as a whole or not at all, and flush it to the disk.

    Raises:
        DiskError: the disk refuses it.
    """
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    with whole_file(path, sum(value.nbytes for value in contiguous.values())) as draft:
        save_file(contiguous, draft, None if notes is None else dict(notes))
        with draft.open("rb") as file:
            os.fsync(file.fileno())


def read_notes(path: Path) -> dict[str, str]:
    """The notes that `save_tensors` has put into a file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def gathered(
    folder: Path | None,
    rows: int,
    batch_size: int,
    make: Callable[[int, int], Rows],
    *,
    work: str,
    advance: Callable[[int], None] = lambda _: None,
    together: bool = False,
) -> dict[str, Tensor]:
    """Gather a number of rows, batch by batch.

    Every new batch is saved in `folder` as a part, a file whose name states its first row. Parts of an earlier process
    are read if they follow one another from row 0 on, and making continues after the last of them.

    Args:
        folder: folder of parts, possibly with those of an earlier process that was cut off; None saves nothing.
        rows: total number of rows.
        batch_size: number of rows of a batch; the last one may have fewer.
        make: function (first, count) that makes the rows of one batch.
        work: name of the work in the message of an interruption, such as "calibration: trajectories".
        advance: called with the number of rows that earlier processes have left.
        together: whether all processes of the run call this, with a folder that they share; each makes a part of the
            batches, in turn.

    Returns:
        The rows, by name.

    Raises:
        InterruptedByUserError: the user interrupts; the message says how many rows are in the folder.
        DiskError: the disk refuses a part; the parts before it stay.
    """

    def batch(first: int) -> Rows:
        # contiguous, as rows read from files are: a model may return channels last
        made = {name: value.contiguous() for name, value in make(first, min(batch_size, rows - first)).items()}
        if folder is not None:
            save_tensors(made, folder / _name(first))
        return made

    collected: list[Rows] = [] if folder is None else _earlier(folder, together)
    done = sum(map(_count, collected))
    if done:
        advance(done)
    firsts = range(done, rows, batch_size)
    try:
        if folder is None or not together or process_count() == 1:
            for first in firsts:
                collected.append(batch(first))
                done += _count(collected[-1])
        else:
            with agreed():
                for first in firsts[process_number() :: process_count()]:
                    done += _count(batch(first))
            collected = list(_read_parts(folder))
    except KeyboardInterrupt:
        if folder is None:
            raise
        stage, _, rest = work.partition(": ")
        raise InterruptedByUserError(f"interrupted in {stage}: {done} of {rows} {rest} are kept") from None
    return {name: torch.cat([part[name] for part in collected]) for name in collected[0]}


def _earlier(folder: Path, together: bool) -> list[Rows]:
    """Parts of earlier processes; of processes that work together, the first one removes what is of no use."""
    if not together:
        return list(_read_parts(folder))
    with agreed() as first:
        collected: list[Rows] = list(_read_parts(folder)) if first else []
    with agreed() as first:
        return collected if first else list(_read_parts(folder))


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
