"""Tensors in files: written whole or not at all, and gathered in parts, so that long work goes on behind the last part.

Not here: what the tensors are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pqcad_qat.errors import InterruptedByUserError
from pqcad_qat.machine.files import whole_file

Rows = Mapping[str, Tensor]
"""Tensors by name whose first dimension is one and the same."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole, onto the disk itself, or not at all.

    Raises:
        DiskError: the disk refuses it.
    """
    held = {name: value.contiguous() for name, value in tensors.items()}
    with whole_file(path, sum(value.nbytes for value in held.values())) as draft:
        save_file(held, draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())


def gathered(parts: Path | None, rows: int, batches: Callable[[int], Iterable[Rows]], what: str) -> dict[str, Tensor]:
    """So many rows, made batch by batch; those that lie in the folder `parts` already are read, and it gets every batch
    that is made.

    Args:
        parts: of an earlier process that was cut off; None where nothing is to outlive this one.
        batches: from a row on.
        what: is gathered, for whoever interrupts it, as "calibration: trajectories".

    Raises:
        InterruptedByUserError: says how many rows are in the folder.
        DiskError: the disk refuses a part; those before it stay.
    """
    held: list[Rows] = [] if parts is None else list(_read_parts(parts))
    done = sum(map(_count, held))
    try:
        for batch in batches(done) if done < rows else ():
            # as what is read is: a model may give channels last
            held.append({name: value.contiguous() for name, value in batch.items()})
            if parts is not None:
                save_tensors(held[-1], parts / _name(done))
            done += _count(batch)
    except KeyboardInterrupt:
        if parts is None:
            raise
        stage, _, rest = what.partition(": ")
        raise InterruptedByUserError(f"interrupted in {stage}: {done} of {rows} {rest} are kept") from None
    return {name: torch.cat([part[name] for part in held]) for name in held[0]}


def _read_parts(folder: Path) -> Iterator[dict[str, Tensor]]:
    """The parts from the first row on; the first that is missing or damaged ends them, and is removed with all that
    lies behind it.
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
    for left in (*files, *drafts):
        left.unlink()


def _name(first: int) -> str:
    """Of the part that begins with this row."""
    return f"rows-{first:09d}.safetensors"


def _count(part: Rows) -> int:
    return len(next(iter(part.values())))
