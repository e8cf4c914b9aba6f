"""Pools in which tasks run side by side: processes of this machine, or the workers of a Dask cluster.

Not here: what the tasks do (commands/sweep.py), and the processes that share one run (processes.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pqcad_qat import __version__
from pqcad_qat.errors import UsageError
from pqcad_qat.machine.cores import usable_cores
from pqcad_qat.machine.files import write_file

Task = TypeVar("Task")
Result = TypeVar("Result")

CONNECT_S = 10
"""Seconds to wait for a scheduler's answer."""

MARK = ".seen-by-workers"
"""Name of the file by which workers are asked whether they see a folder."""

WITHOUT_DASK = "--scheduler: got {}, but Dask is not installed; allowed with the extra: pip install '.[dask]'"


class LostTaskError(Exception):
    """The process that ran a task has died.

    Attributes:
        task: the task.
    """

    def __init__(self, task: Any) -> None:
        super().__init__(f"{task}")
        self.task = task


@dataclass(frozen=True)
class Pool:
    """A place where tasks run.

    Attributes:
        executor: what starts them.
        room: function that tells how many can run at once now.
        threads: function that a task calls where it runs: the number of threads that it should take.
        losses: exceptions that say that a task's process has died.
        interrupted: what becomes of the tasks at work when this process is interrupted, in words.
    """

    executor: Executor
    room: Callable[[], int]
    threads: Callable[[], int]
    losses: tuple[type[Exception], ...]
    interrupted: str


@contextmanager
def local_processes(count: int) -> Iterator[Pool]:
    """A pool of so many processes at a time on this machine, a new one for each task."""
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), max_tasks_per_child=1) as executor:
        share = max(1, usable_cores() // count)
        yield Pool(
            executor,
            room=lambda: count,
            threads=partial(int, share),
            losses=(BrokenProcessPool,),
            interrupted="waiting for the cells at work to write their checkpoints",
        )


@contextmanager
def dask_workers(address: str, folder: Path) -> Iterator[Pool]:
    """A pool of the workers of a running Dask cluster.

    A task whose worker dies is given to another one by the scheduler, until it has been lost a few times (Dask's
    `allowed-failures`).

    Args:
        address: address of its scheduler, such as tcp://10.0.0.1:8786.
        folder: folder that all of them must share.

    Raises:
        UsageError: Dask is not installed, no scheduler answers, or a worker does not fit.
    """
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise UsageError(WITHOUT_DASK.format(address)) from error
    try:
        client = Client(address, timeout=CONNECT_S)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"--scheduler: got {address!r}, where no scheduler answers in {CONNECT_S} s; allowed the address that "
            "`dask scheduler` prints, such as tcp://10.0.0.1:8786"
        ) from error
    with client:
        _check_workers(client, folder)
        workers = Counter(map(_host, client.nthreads()))
        yield Pool(
            client.get_executor(pure=False),
            room=lambda: max(1, len(client.nthreads())),
            threads=partial(_share_of_worker, workers),
            losses=(KilledWorker,),
            interrupted="the workers go on with the cells at work",
        )


def _check_workers(client: Any, folder: Path) -> None:
    """Refuse workers that cannot run the tasks.

    Raises:
        UsageError: there are none, they run several tasks in one process, have another version of this package, or do
            not see the folder.
    """
    threads: dict[str, int] = client.nthreads()
    if not threads:
        raise UsageError("--scheduler: got a cluster without workers; allowed one that has any: `dask worker ADDRESS`")
    if several := [worker for worker, count in threads.items() if count != 1]:
        raise UsageError(
            f"--scheduler: got the worker {several[0]} with {threads[several[0]]} threads; allowed one, since cells "
            "that share a process disturb each other: `dask worker ADDRESS --nworkers 2 --nthreads 1`"
        )
    own = package_version()
    for worker, found in client.run(package_version).items():
        if found != own:
            raise UsageError(f"--scheduler: got the worker {worker} with pqcad-qat {found}; allowed {own}, as here")
    mark = folder.resolve() / MARK
    write_file(mark, "")
    try:
        for worker, sees in client.run(partial(Path.is_file, mark)).items():
            if not sees:
                raise UsageError(
                    f"--scheduler: got the worker {worker}, which does not see {mark.parent}; allowed a folder that "
                    "all machines share, under one path"
                )
    finally:
        mark.unlink(missing_ok=True)


def package_version() -> str:
    """Version of this package where this is called."""
    return __version__


def _share_of_worker(workers: Mapping[str, int]) -> int:
    """Threads for a task of the Dask worker that calls this, by the number of workers on each host."""
    from distributed import get_worker

    return max(1, usable_cores() // workers.get(_host(get_worker().address), 1))


def _host(address: str) -> str:
    return urlsplit(address).hostname or ""


def side_by_side(
    pool: Pool,
    tasks: Sequence[Task],
    work: Callable[[Task], Result],
    *,
    begin: Callable[[Task], None],
    end: Callable[[Task, Result], None],
) -> None:
    """Do the work of every task in a pool, as many at once as there is room for.

    Args:
        pool: the pool.
        tasks: the tasks, in the order in which they begin.
        work: what is done with each; it is sent to other processes.
        begin, end: called here when a task begins and ends.

    Raises:
        LostTaskError: a task's process died.
    """
    waiting, running = list(reversed(tasks)), dict[Future[Result], Task]()
    while waiting or running:
        while waiting and len(running) < pool.room():
            task = waiting.pop()
            begin(task)
            running[pool.executor.submit(work, task)] = task
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            try:
                end(task, future.result())
            except pool.losses as error:
                raise LostTaskError(task) from error
