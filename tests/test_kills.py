"""Runs whose processes are killed at two dozen random moments, and a disk that is full: nothing is lost, and the weights are the same.

Not here: runs that are killed at chosen moments (test_resume.py).
"""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import POLICIES, environment, program, tiny_overrides
from safetensors import SafetensorError
from safetensors.torch import load_file

from pqcad_qat import cli
from pqcad_qat.training.checkpoint import CheckpointFolder, checkpoints, damage

PATIENCE = 600  # seconds; a busy machine is no failure


def test_runs_killed_at_random_moments_end_with_the_weights_of_one_left_alone_bit_for_bit(tiny_folder: Path, tmp_path: Path) -> None:
    ends = {}
    for name, kills in (("killed", 24), ("whole", 0)):
        command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(tiny_folder), str(tmp_path / name), "7", str(kills)]
        (tmp_path / name).mkdir()
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        ends[name] = int(done.stdout)
    for stage in ("pq", "fixed-bit"):
        whole, *killed = (
            load_file(tmp_path / name / str(number) / "run" / "models" / f"{stage}.safetensors")
            for name in ("whole", "killed")
            for number in range(ends[name])
        )
        for other in killed:
            assert [key for key, value in whole.items() if not torch.equal(value, other[key])] == []
    for number in range(ends["killed"]):
        assert not (tmp_path / "killed" / str(number) / "run" / "warnings.json").exists()


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_an_error_and_the_run_goes_on_from_the_one_before(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The kernel refuses to let a file grow over a limit that is set while the run trains, as it does on a full disk."""
    path = tmp_path / "run"
    only = ["evaluation.variants=[fixed-bit]", "progressive.steps=60", "training.checkpoint_every=20", "evaluation.images=2"]
    flags = [f"--set={override}" for override in tiny_overrides(tiny_folder, *only)]
    command = program(["run", POLICIES / "smoke.yaml", "--out", path, *flags])
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        folder = CheckpointFolder(path / "checkpoints" / "fixed-bit", 20)
        wait_for(folder.path / "step_000020" / "digests.json", process)
        size = (folder.path / "step_000020" / "model.safetensors").stat().st_size
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, errors
    assert re.search(r"step_000040: cannot be written: File too large: [\d,]+ bytes are wanted, [\d,]+ are free", errors), errors
    assert "Traceback" not in errors
    assert [path.name for path in sorted(folder.path.iterdir())] == ["step_000020"]
    assert damage(checkpoints(folder.path)[0]) is None
    again = subprocess.run([*command, "--resume"], env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert again.returncode == 0, again.stderr
    assert "fixed-bit: going on from step 20" in again.stdout


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_a_message_and_no_traceback_wherever_it_is_met(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def schema() -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "schema", schema)
    with pytest.raises(SystemExit) as ended:
        cli.main(["schema"])
    assert ended.value.code == 2
    assert "No space left on device" in capfd.readouterr().err


def test_any_other_fault_of_the_machine_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def schema() -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setitem(cli.COMMANDS, "schema", schema)
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["schema"])


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not file.exists():
        assert time.monotonic() < deadline, f"no {file} after {PATIENCE} s"
        time.sleep(0.002)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes to read-only folders too")
def test_a_read_only_folder_is_an_error_before_anything_is_trained(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(0o500)
    flags = [f"--set={override}" for override in tiny_overrides(tiny_folder)]
    command = program(["run", POLICIES / "smoke.yaml", "--out", path, *flags])
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert f"{path}: cannot be written" in done.stderr
