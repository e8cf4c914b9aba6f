"""Processes that a launcher started for one run: which of them writes, what they agree on, and how all end together.

With one process, the usual case, nothing is exchanged.

Not here: how the processes share a batch and its gradients (training/trainer.py).
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
"""Environment variables in which launchers state the number of processes; Accelerate reads the same."""

RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Environment variables in which launchers state this process's number; Accelerate reads the same."""

LOST = re.compile("closed by peer|reset by peer|closed the connection|remote process exited", re.IGNORECASE)
"""Messages of torch's transports when the other end is gone."""

PATIENCE = timedelta(days=7)
"""Longest time that processes wait for one another: the first one calibrates, exports and samples alone."""

REPORT_S = 30
"""Seconds that a process waits for the one that reports an error.

The launcher ends all processes as soon as one has ended, and would cut the report off.
"""


def launched() -> tuple[int, int]:
    """(this process's number, number of processes), from the environment alone, so before any library is loaded."""
    count = _whole_number(WORLD, 1)
    return (_whole_number(RANK, 0) if count > 1 else 0), count


def check_launch() -> None:
    """Raise LaunchError if `accelerate launch` was asked for several processes and started one.

    It does so on CPUs without mpirun.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if by_accelerate and not any(name in os.environ for name in (*WORLD, "LOCAL_RANK")):
        raise LaunchError(
            "accelerate launch: got several processes to start, and has started one (with --cpu it "
            "leaves them to mpirun); allowed --multi_gpu --num_processes N, which needs no GPU, or --num_processes 1"
        )


def process_count() -> int:
    """Number of processes that share the run."""
    return int(_state().num_processes)


def process_number() -> int:
    """Number of this process among them, from 0."""
    return int(_state().process_index)


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return bool(_state().is_main_process)


def exchanged(*values: float) -> list[list[float]]:
    """The values of every process, in the order of the processes; each waits for the others.

    Raises:
        LaunchError: another process has ended.
    """
    state = _state()
    if state.num_processes == 1:
        return [list(values)]
    import torch
    from accelerate.utils import gather

    with all_alive():
        rows: list[list[float]] = gather(torch.tensor([values], dtype=torch.float64, device=state.device)).tolist()
    return rows


@contextmanager
def all_alive() -> Iterator[None]:
    """Guard for what processes do together: if one of them ends, a LaunchError replaces the transport's own error."""
    try:
        yield
    except RuntimeError as error:
        if launched()[1] > 1 and LOST.search(str(error)):
            raise LaunchError(
                "another process of this run has ended; --resume goes on from the last checkpoint"
            ) from error
        raise


_reported_here: list[BaseException] = []
"""Errors that this process, though not the first one, reports for all."""


@contextmanager
def agreed() -> Iterator[bool]:
    """Guard for a block that must succeed on every process or on none; it yields whether this process is the first one.

    If the block fails on all processes, each has its own error. If it fails on some, the others raise
    OtherProcessError, and the first process that failed reports the error, even if it is not the first of all.
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
            _reported_here.append(error)
        raise error
    if any(failed):
        raise OtherProcessError(f"process {failed.index(True)} of this run has failed")


def any_process(value: bool) -> bool:
    """Whether the value is true on any process; all get the same answer."""
    return any(row[0] for row in exchanged(value))


def refuse_drift(when: str, values: Mapping[str, float]) -> None:
    """Raise LaunchError if the processes hold different values of something that they must share.

    Each process computes these values for itself.

    Args:
        when: start of the message.
        values: the values of this process, by name.
    """
    rows = exchanged(*values.values())
    apart = [(name, sums) for name, *sums in zip(values, *rows, strict=True) if any(value != sums[0] for value in sums)]
    if apart:
        (name, sums), more = apart[0], len(apart) - 1
        raise LaunchError(
            f"{when}: {name} differs between the processes: got sums {sums}, and {more} more such; "
            "allowed machines of one kind, with the same libraries"
        )


def is_reporter(error: BaseException) -> bool:
    """Whether this process is the one that reports to the user an error that ends the run."""
    return not isinstance(error, OtherProcessError) and (
        launched()[0] == 0 or any(reported is error for reported in _reported_here)
    )


def wait_for_report(code: int) -> None:
    """Wait for the process that reports the error, because a launcher ends all processes as soon as one has ended."""
    signal.signal(signal.SIGTERM, lambda _signal, _frame: os._exit(code))
    time.sleep(REPORT_S)


def close_group() -> None:
    """Close the group of processes, if there is one."""
    if launched()[1] > 1:
        _state().destroy_process_group()


def _state() -> Any:
    """Accelerate's state of this process; the first call waits for the other processes."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from torch import accelerator

    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerator.is_available(), timeout=PATIENCE
    )


def _whole_number(names: Sequence[str], default: int) -> int:
    """The first of these environment variables that is set, as a number."""
    return next((int(os.environ[name]) for name in names if name in os.environ), default)
