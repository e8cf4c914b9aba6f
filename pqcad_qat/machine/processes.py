"""The processes that share one run, as a launcher started them: which of them writes, what they agree on, and one end
for all.

Not here: how they share a batch and its gradients (training/trainer.py). With one process, the usual case, nothing is
exchanged.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from pqcad_qat.errors import LaunchError, OtherProcessError

WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""What launchers say in the environment: the names that Accelerate reads."""

LOST = re.compile("closed by peer|reset by peer|closed the connection|remote process exited", re.IGNORECASE)
"""What torch's transports say where the other end is gone."""

PATIENCE = timedelta(days=7)
"""How long processes wait for one another: the first calibrates, exports and samples alone."""


WORD_S = 30
"""Seconds that a silent process gives the one that tells of an error, which ends it by ending."""


def launched() -> tuple[int, int]:
    """(this process's number, number of processes), from the environment alone: before anything is loaded."""
    count = _number(WORLD, 1)
    return (_number(RANK, 0) if count > 1 else 0), count


def check_launch() -> None:
    """Raise LaunchError where `accelerate launch` was asked for several processes and started one, as it does on CPUs
    without mpirun.
    """
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if asked and not any(name in os.environ for name in (*WORLD, "LOCAL_RANK")):
        raise LaunchError(
            "accelerate launch: got several processes to start, and has started one (with --cpu it "
            "leaves them to mpirun); allowed --multi_gpu --num_processes N, which needs no GPU, or --num_processes 1"
        )


def process_count() -> int:
    """Processes that share the run."""
    return int(_state().num_processes)


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return bool(_state().is_main_process)


def exchanged(*values: float) -> list[list[float]]:
    """The values of every process, in the processes' order; each waits for the others.

    Raises:
        LaunchError: one has ended.
    """
    state = _state()
    if state.num_processes == 1:
        return [list(values)]
    import torch
    from accelerate.utils import gather

    with others_alive():
        rows: list[list[float]] = gather(torch.tensor([values], dtype=torch.float64, device=state.device)).tolist()
    return rows


@contextmanager
def others_alive() -> Iterator[None]:
    """Around what processes do together: where one has ended meanwhile, a LaunchError says so in place of the
    transport's own words.
    """
    try:
        yield
    except RuntimeError as error:
        if launched()[1] > 1 and LOST.search(str(error)):
            raise LaunchError(
                "another process of this run has ended; --resume goes on from the last checkpoint"
            ) from error
        raise


_told_here: list[BaseException] = []
"""The errors of this process, not the first one, that it tells for all."""


@contextmanager
def agreed() -> Iterator[bool]:
    """A block that ends well on every process or on none; yields whether this is the first one.

    Where it fails on all, each has its own error; where it fails on some, the others get OtherProcessError, and the
    first of those that failed speaks, also where it is not the first of all.
    """
    error: BaseException | None = None
    try:
        yield is_first()
    except GeneratorExit:
        raise
    except BaseException as raised:
        error = raised
    failed = [bool(row[0]) for row in exchanged(error is not None)]
    if error is not None:
        if 0 < _state().process_index == failed.index(True):
            _told_here.append(error)
        raise error
    if any(failed):
        raise OtherProcessError(f"process {failed.index(True)} of this run has failed")


def any_process(value: bool) -> bool:
    """Whether it is so on any process: then on all."""
    return any(row[0] for row in exchanged(value))


def refuse_drift(when: str, values: Mapping[str, float]) -> None:
    """Raise LaunchError where the processes hold different values, by name, of what each computes for itself and what
    they must share.
    """
    rows = exchanged(*values.values())
    apart = [
        (name, found) for name, *found in zip(values, *rows, strict=True) if any(value != found[0] for value in found)
    ]
    if apart:
        (name, found), more = apart[0], len(apart) - 1
        raise LaunchError(
            f"{when}: {name} differs between the processes: got sums {found}, and {more} more such; "
            "allowed machines of one kind, with the same libraries"
        )


def speaks(error: BaseException) -> bool:
    """Whether it is this process that tells the user of an error that ends the run."""
    return not isinstance(error, OtherProcessError) and (
        launched()[0] == 0 or any(told is error for told in _told_here)
    )


def leave_the_word(code: int) -> None:
    """Where another process tells of the error: wait for it, since a launcher ends all processes as soon as one has
    ended.
    """
    signal.signal(signal.SIGTERM, lambda _signal, _frame: os._exit(code))
    time.sleep(WORD_S)


def leave() -> None:
    """End the group of processes in good order, where there is one."""
    if launched()[1] > 1:
        _state().destroy_process_group()


def _state() -> Any:
    """Accelerate's state of this process; the first call meets the others."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from torch import accelerator

    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerator.is_available(), timeout=PATIENCE
    )


def _number(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)
