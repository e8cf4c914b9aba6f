"""What is told where a disk has no room: the file, the bytes wanted and those that are free; before a run, what it
takes.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tiny_runs import POLICIES, tiny_overrides

from pqcad_qat.errors import DiskError
from pqcad_qat.machine.files import free_bytes, room_for, whole_file, write_file
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.report.run_preview import bytes_wanted
from pqcad_qat.stages import disk_use
from pqcad_qat.stages.disk_use import room_warning
from pqcad_qat.stages.prepared import prepare
from pqcad_qat.stages.stage_dependencies import recipes


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("basic_ios::clear: iostream error"),  # OpenVINO's
    ],
)
def test_a_full_disk_is_told_with_the_path_the_bytes_wanted_and_those_that_are_free(
    error: Exception, tmp_path: Path
) -> None:
    path = tmp_path / "no" / "such" / "folder" / "x.safetensors"
    with (
        pytest.raises(DiskError, match=rf"^{path}: cannot be written: .*: 12,345 bytes are wanted, [\d,]+ are free$"),
        room_for(path, 12_345),
    ):
        raise error
    with (
        pytest.raises(
            DiskError, match=rf"^{path}: cannot be written: .*: more than the [\d,]+ bytes that are free are wanted$"
        ),
        room_for(path),
    ):
        raise error


def test_the_file_that_the_system_names_is_the_one_that_is_told(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "logs" / "events"))
    with pytest.raises(DiskError, match=rf"^{tmp_path}/logs/events: cannot be written"), room_for(tmp_path, 5):
        raise error


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), RuntimeError("bad shape"), ValueError("no")]
)
def test_any_other_error_passes_as_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, room_for(tmp_path):
        raise error
    assert caught.value is error


def test_a_file_is_there_whole_or_as_it_was_and_no_draft_is_left(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "file", "one")

    def fill(path: Path) -> None:
        with whole_file(path, 3) as draft:
            draft.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))

    with pytest.raises(DiskError, match=rf"^{tmp_path}/deep/file: .*: 3 bytes are wanted"):
        fill(tmp_path / "deep" / "file")
    assert (tmp_path / "deep" / "file").read_text() == "one"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_what_a_run_takes_is_told_where_less_is_free_and_only_of_stages_that_are_to_do(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))
    prepared = prepare(policy)
    table = recipes(policy, prepared)
    assert free_bytes(tmp_path / "not" / "there") > 0
    monkeypatch.setattr(disk_use, "free_bytes", lambda _path: 1_000_000)
    told = room_warning(policy, prepared, table, list(table), path=tmp_path)
    assert told is not None
    assert f"{tmp_path}: the stages to do take about 0.0" in told
    assert "0.001 GB are free" in told
    assert room_warning(policy, prepared, table, ["evaluation", "benchmark"], path=tmp_path) is None


def test_the_estimate_covers_what_a_run_leaves_and_is_no_more_than_four_times_that(tiny_run: object) -> None:
    policy, path = tiny_run.policy, tiny_run.path  # type: ignore[attr-defined]
    prepared = prepare(policy)
    table = recipes(policy, prepared)
    left = sum(
        file.stat().st_size for file in [*path.rglob("*"), *(path.parent / ".calibration").rglob("*")] if file.is_file()
    )
    stages = [disk_use.stage_bytes(policy, prepared, table, stage) for stage in table]
    estimate = sum(stage.kept for stage in stages)
    assert left < 1.5 * estimate
    assert estimate < 4 * left
    assert estimate < bytes_wanted(stages)
