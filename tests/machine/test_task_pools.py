"""Tasks side by side: in processes of this machine, and on the workers of a Dask cluster.

Not here: the cells of a study that run there (commands/test_sweep.py).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dask_cluster import local_cluster

from pqcad_qat.errors import UsageError
from pqcad_qat.machine import task_pools
from pqcad_qat.machine.cores import usable_cores
from pqcad_qat.machine.task_pools import LostTaskError, Pool, dask_workers, local_processes, side_by_side


def process(_task: int) -> int:
    return os.getpid()


def die(task: int) -> int:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def die_once(mark: Path) -> bool:
    """The process in which this is called first dies."""
    if mark.exists():
        return True
    mark.write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
    return False


def done(pool: Pool, tasks: list[Any], work: Any) -> dict[Any, Any]:
    """What the tasks return, and that each is told to begin before it ends."""
    begun: list[Any] = []
    results: dict[Any, Any] = {}

    def end(task: Any, result: Any) -> None:
        assert task in begun
        results[task] = result

    side_by_side(pool, tasks, work, begin=begun.append, end=end)
    assert begun == tasks
    return results


def test_each_task_has_a_process_of_its_own_and_a_share_of_the_cores() -> None:
    with local_processes(2) as pool:
        assert pool.room() == 2
        assert pool.threads() == max(1, usable_cores() // 2)
        processes = done(pool, [0, 1, 2], process)
    assert len({*processes.values(), os.getpid()}) == 4


def test_a_task_whose_process_dies_is_named() -> None:
    with local_processes(1) as pool, pytest.raises(LostTaskError, match=r"^1$"):
        done(pool, [0, 1, 2], die)


# ---- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with local_cluster(workers=2) as started:
        yield started


def test_tasks_run_on_all_workers_of_a_cluster(cluster: Any, tmp_path: Path) -> None:
    with dask_workers(cluster.scheduler_address, tmp_path) as pool:
        assert pool.room() == 2
        processes = done(pool, [*range(8)], process)
        threads = done(pool, [0], Threads(pool))
    assert os.getpid() not in processes.values()
    assert len({*processes.values()}) == 2
    assert threads == {0: max(1, usable_cores() // 2)}
    assert not [*tmp_path.iterdir()]


class Threads:
    """What a pool's `threads` says where a task runs."""

    def __init__(self, pool: Pool) -> None:
        self.threads = pool.threads

    def __call__(self, _task: int) -> int:
        return self.threads()


def test_the_task_of_a_worker_that_dies_is_done_by_another(cluster: Any, tmp_path: Path) -> None:
    with dask_workers(cluster.scheduler_address, tmp_path) as pool:
        assert done(pool, [tmp_path / "mark"], die_once) == {tmp_path / "mark": True}


def test_clusters_that_do_not_fit_are_refused(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = cluster.scheduler_address
    monkeypatch.setattr(task_pools, "CONNECT_S", 1)
    with (
        pytest.raises(UsageError, match="where no scheduler answers in 1 s"),
        dask_workers("tcp://127.0.0.1:9", tmp_path),
    ):
        pass
    with pytest.raises(UsageError, match="got 'nowhere', where no"), dask_workers("nowhere", tmp_path):
        pass
    monkeypatch.setattr(task_pools, "CONNECT_S", 10)
    with monkeypatch.context() as patch:
        patch.setattr(task_pools, "write_file", lambda *_: None)  # as if the workers' disk were another
        with pytest.raises(UsageError, match=f"which does not see {tmp_path}"), dask_workers(address, tmp_path):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(task_pools, "__version__", "0.0.1")  # of this process alone
        with pytest.raises(UsageError, match=r"allowed 0\.0\.1, as here"), dask_workers(address, tmp_path):
            pass


@pytest.mark.parametrize(
    ("workers", "threads", "why"), [(1, 2, "with 2 threads; allowed one"), (0, 1, "without workers")]
)
def test_workers_that_share_a_process_and_a_cluster_without_any_are_refused(
    workers: int, threads: int, why: str, tmp_path: Path
) -> None:
    with (
        local_cluster(workers, threads=threads, processes=False) as started,
        pytest.raises(UsageError, match=why),
        dask_workers(started.scheduler_address, tmp_path),
    ):
        pass


def test_without_dask_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    why = r"Dask is not installed; allowed with the extra: pip install '\.\[dask\]'"
    with pytest.raises(UsageError, match=why), dask_workers("tcp://10.0.0.1:8786", tmp_path):
        pass
