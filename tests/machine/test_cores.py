"""How many cores count where a control group limits them, and what is told of it: files laid out as Linux lays them
out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import environment

from pqcad_qat.machine import cores, program
from pqcad_qat.machine.cores import usable_cores

SECOND_VERSION = "0::/slice/unit\n"
FIRST_VERSION = "9:memory:/\n4:cpu,cpuacct:/docker/a1\n1:cpuset:/\n"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cores_to_run_on", lambda: 8)


def counted(folder: Path, groups: str, files: dict[str, str]) -> int:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "groups").write_text(groups)
    return usable_cores(folder / "groups", folder)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 8),
        ({"slice/unit/cpu.max": "max 100000\n"}, 8),
        ({"slice/unit/cpu.max": "300000 100000\n"}, 3),
        ({"unified/slice/unit/cpu.max": "300000 100000\n"}, 3),
        ({"slice/unit/cpu.max": "350000 100000\n"}, 3),
        ({"slice/unit/cpu.max": "50000 100000\n"}, 1),
        ({"slice/unit/cpu.max": "6400000 100000\n"}, 8),
        ({"slice/unit/cpu.max": "max 100000\n", "slice/cpu.max": "200000 50000\n"}, 4),
        ({"slice/unit/cpu.max": "500000 100000\n", "slice/cpu.max": "200000 50000\n"}, 4),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"elsewhere/cpu.max": "200000 100000\n"}, 8),
        ({"slice/unit/cpu.max": "\n"}, 8),
    ],
)
def test_a_group_of_the_second_version_and_those_around_it_limit_the_cores(
    files: dict[str, str], wanted: int, tmp_path: Path
) -> None:
    assert counted(tmp_path, SECOND_VERSION, files) == wanted


@pytest.mark.parametrize("hierarchy", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(
    ("group", "quota", "wanted"),
    [("docker/a1/", 200000, 2), ("", 250000, 2), ("docker/a1/", -1, 8), ("b2/", 200000, 8)],
)
def test_a_group_of_the_first_version_does_too(
    hierarchy: str, group: str, quota: int, wanted: int, tmp_path: Path
) -> None:
    files = {f"{hierarchy}/{group}cpu.cfs_quota_us": f"{quota}\n", f"{hierarchy}/{group}cpu.cfs_period_us": "100000\n"}
    assert counted(tmp_path, FIRST_VERSION, files) == wanted


def test_without_control_groups_every_core_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "groups", tmp_path) == 8


@pytest.mark.parametrize(("count", "given", "wanted"), [(3, None, "3"), (3, "5", "5"), (8, None, None)])
def test_a_program_starts_as_many_threads_as_it_has_a_share_for(
    count: int, given: str | None, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: count)
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    program.keep_to_share_of_cores()
    assert os.environ.get("OMP_NUM_THREADS") == wanted


def test_torch_is_imported_after_the_command_line_has_counted() -> None:
    code = "import sys; import pqcad_qat.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
