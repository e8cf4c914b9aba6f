"""Number of cores that this process may keep busy, which a container's share of CPU time may limit.

Threads beyond the share slow a process down: they use up the share while they wait for one another, and then all of
them are stopped.

Not here: limiting the threads of torch (program.py) and of OpenVINO (serving/compiled_graph.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, HIERARCHIES = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Files in which Linux states the process's control groups, and the folder of their hierarchies."""


def usable_cores(groups: Path = GROUPS, hierarchies: Path = HIERARCHIES) -> int:
    """Number of cores to keep busy, at least one.

    Linux's control groups, of either version, state the share. On other systems every core counts.
    """
    return max(1, min([cores_to_run_on(), *map(int, _shares(groups, hierarchies))]))


def cores_of_share() -> int | None:
    """usable_cores() if a share makes it smaller than the number that libraries count themselves, otherwise None."""
    cores = usable_cores()
    return cores if cores < cores_to_run_on() else None


def cores_to_run_on() -> int:
    """Number of cores that this process may run on, whatever share of their time it gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(groups: Path, hierarchies: Path) -> Iterator[float]:
    """Limits of the process's control group and of those around it, in cores; groups without a limit are left out."""
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (hierarchies / controllers, hierarchies / ("cpu" if controllers else "unified")):
            group = root / path.lstrip("/")
            # inside a container the path may be the host's, while the container's own group is the root
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
                if (share := _share(folder)) is not None:
                    yield share


def _share(group: Path) -> float | None:
    """Quota divided by period: in one file in version 2, in two files in version 1, where -1 means no limit."""
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((group / file).read_text(encoding="ascii") for file in files).split()
            return None if quota in ("max", "-1") else float(quota) / float(period)
        except (OSError, ValueError):
            continue
    return None
