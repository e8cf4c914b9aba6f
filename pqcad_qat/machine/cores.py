"""The cores that this process may keep busy: those that it may run on, and of a container's share of their time whole
ones.

Threads beyond the share are worse than none: they wait for one another with time that the share counts, until all of
them are stopped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, HIERARCHIES = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores(groups: Path = GROUPS, hierarchies: Path = HIERARCHIES) -> int:
    """At least one. Linux's control groups, of either version, say what share there is; elsewhere every core counts."""
    return max(1, min([cores_to_run_on(), *map(int, _shares(groups, hierarchies))]))


def cores_of_share() -> int | None:
    """usable_cores() where a share makes them fewer than libraries count by themselves, otherwise None."""
    cores = usable_cores()
    return cores if cores < cores_to_run_on() else None


def cores_to_run_on() -> int:
    """Cores that this process may run on, whatever share of their time it gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(groups: Path, hierarchies: Path) -> Iterator[float]:
    """What the process's control group and those around it may take, in cores, where they are limited."""
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (hierarchies / controllers, hierarchies / ("cpu" if controllers else "unified")):
            group = root / path.lstrip("/")
            # inside a container the path may be the host's, and its own group the root
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
                if (share := _share(folder)) is not None:
                    yield share


def _share(group: Path) -> float | None:
    """Quota by period: one file of version 2; two of version 1, where -1 is no limit."""
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((group / file).read_text(encoding="ascii") for file in files).split()
            return None if quota in ("max", "-1") else float(quota) / float(period)
        except (OSError, ValueError):
            continue
    return None
