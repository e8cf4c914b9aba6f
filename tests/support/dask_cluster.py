"""A Dask cluster on this machine, for tests.

Not here: any test. Without Dask the tests that ask for one are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def local_cluster(workers: int, *, threads: int = 1, processes: bool = True) -> Iterator[Any]:
    """A cluster of so many workers, which are processes or threads of this one."""
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    with distributed.LocalCluster(
        n_workers=workers, threads_per_worker=threads, processes=processes, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster
