"""Runs that are cut off in every stage, by either signal and by a full disk: they say so, lose nothing, and end with
the same bits.

By default every stage is cut off once, by the three in turns; PQCAD_KILLS=all tries 30 moments of each, spread over the
stages.

Not here: checkpoints by themselves (test_trainer.py), the folder's rules (test_run_folder.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_program import ForkedProgram
from killed_runs import DAMAGED, REPORT, STAGES
from safetensors import SafetensorError
from tiny_runs import POLICIES, SUPPORT, environment, fixed_batch_graph, program, tiny_overrides

from pqcad_qat import cli
from pqcad_qat.machine.content_store import LOCKS
from pqcad_qat.policy.variants import FIXED_BIT, PQ, PQCAD_OPENVINO, TRAINED
from pqcad_qat.training.checkpoint import CheckpointFolder, checkpoints, damage

PATIENCE = 3000  # seconds; a busy machine is no failure
CHAINS = (
    [("SIGKILL", 1), ("SIGINT", 2), ("full", 3)]
    if os.environ.get("PQCAD_KILLS") == "all"
    else [("SIGKILL+SIGINT+full", 0)]
)

RESULTS = (
    "calibration/trajectories.safetensors",
    "models/*.safetensors",
    "distillation/*.safetensors",
    "samples/*.safetensors",
    "student/**/*",
    "openvino/**/*",
    "baselines/**/openvino_model.bin",
    "policy.yaml",
    "plan.json",
)
"""What a run leaves that has no timings in it."""


@dataclass(frozen=True)
class Chain:
    """A run in one process or many: how each ended (killed_runs.Ending)."""

    root: Path
    endings: list[dict[str, Any]]

    @property
    def digests(self) -> dict[str, str]:
        files = (path for pattern in RESULTS for path in (self.root / "run").glob(pattern) if path.is_file())
        return {str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    @property
    def left_over(self) -> list[str]:
        """Drafts and parts that no one will want."""
        stores = [self.root / ".calibration", self.root / ".shared"]
        hidden = [path for folder in (self.root / "run", *stores) for path in folder.rglob(".*")]
        return [str(path) for path in hidden if path != self.root / "run" / ".lock" and path.name != LOCKS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all chains, and of their model."""
    return tmp_path_factory.mktemp("chains")


@pytest.fixture(scope="module")
def disk(base: Path) -> Iterator[str | None]:
    """A small file system of its own, by its name below the folder of all chains; None where none can be mounted."""
    (base / "disk").mkdir()
    mounted = False
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(base / "disk")], check=True, capture_output=True
        )
        mounted = True
    yield "disk" if mounted else None
    if mounted:
        subprocess.run(["umount", str(base / "disk")], check=True)
    (base / "disk").rmdir()


@pytest.fixture(scope="module")
def chains(base: Path, disk: str | None, start_program: Callable[..., ForkedProgram]) -> dict[str, Chain]:
    """All runs by what cuts them off, made by one program; `none` is the run that is left alone. A disk is filled where
    one can be mounted.
    """
    cut_off = [(kinds, seed) for kinds, seed in CHAINS if disk or kinds != "full"]
    roots = {kinds: base / (disk if disk and "full" in kinds else kinds) for kinds, _ in (("none", 0), *cut_off)}
    arguments = [str(base / "model")]
    for kinds, seed in (("none", 0), *cut_off):
        roots[kinds].mkdir(exist_ok=True)
        arguments += [str(roots[kinds]), kinds if disk else kinds.removesuffix("+full"), str(seed)]
    program = start_program(*arguments, program="killed_runs")
    output, errors = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0, errors
    endings = json.loads(output.splitlines()[-1])
    return {kinds: Chain(roots[kinds], found) for kinds, found in zip(roots, endings, strict=True)}


@pytest.fixture(scope="module")
def whole(chains: dict[str, Chain]) -> Chain:
    """The run that is left alone."""
    found = chains["none"]
    assert [ending["code"] for ending in found.endings] == [0], found.endings[0]["said"]
    return found


@pytest.fixture(scope="module", params=[kinds for kinds, _ in CHAINS])
def cut(request: pytest.FixtureRequest, chains: dict[str, Chain]) -> Chain:
    """The run that is cut off in every stage."""
    if request.param not in chains:
        pytest.skip("no file system can be mounted here")
    return chains[request.param]


@pytest.mark.long
def test_a_run_that_is_cut_off_in_every_stage_ends_with_the_bits_of_one_left_alone(cut: Chain, whole: Chain) -> None:
    *endings, last = cut.endings
    assert last["code"] == 0, last["said"]
    assert {ending["stage"] for ending in endings} == {*STAGES, REPORT}
    for ending in endings:
        check_ending(ending, cut.root)
    assert cut.digests == whole.digests
    assert cut.left_over == []


@pytest.mark.long
def test_finished_stages_are_never_repeated(cut: Chain) -> None:
    for before, after in zip(cut.endings, cut.endings[1:], strict=False):
        assert {name: after["finished"][name] for name in before["finished"]} == before["finished"]


@pytest.mark.long
def test_training_goes_on_from_the_last_good_checkpoint(cut: Chain) -> None:
    pairs = list(zip(cut.endings, cut.endings[1:], strict=False))
    went_on = {before["stage"] for before, after in pairs if f"{before['stage']}: going on from step " in after["said"]}
    assert went_on
    if os.environ.get("PQCAD_KILLS") != "all":  # then the newest checkpoint of `pq` was damaged
        assert went_on == {*TRAINED}
        told = json.loads((cut.root / "run" / "report.json").read_text())["warnings"]
        damaged = f"{Path(DAMAGED).name}: got no digests.json that can be read; using the one before it"
        assert len([warning for warning in told if damaged in warning]) == 1


@pytest.mark.long
def test_transitions_and_logs_are_those_of_the_run_left_alone(cut: Chain, whole: Chain) -> None:
    resumed, alone = (
        json.loads((found.root / "run" / "stages" / f"{PQ}.json").read_text())["transitions"] for found in (cut, whole)
    )
    assert resumed == alone
    for name in TRAINED:
        rows, others = (
            [json.loads(row) for row in (found.root / "run" / "logs" / f"{name}.jsonl").read_text().splitlines()]
            for found in (cut, whole)
        )
        assert rows == others, name


@pytest.mark.long
def test_the_whole_run_reports_itself_on_the_command_line(cut: Chain) -> None:
    last, folder = cut.endings[-1]["said"], cut.root / "run"
    assert PQCAD_OPENVINO in last
    assert f"report:   {folder / 'report.html'}" in last
    assert "planned layers that executed in INT8" in last
    command = json.loads((folder / "report.json").read_text())["reproduction"]["command"]
    assert command.startswith("python -m pqcad_qat run ")
    assert "--resume" not in command


def check_ending(ending: Mapping[str, Any], root: Path) -> None:
    """What a process said that was cut off: nothing where it was killed."""
    code, said = ending["code"], ending["said"]
    assert code in (-signal.SIGKILL, 130, 2), ending
    assert "Traceback" not in said, said
    if code == 130:
        assert re.search(r"^interrupted.*; --resume goes on from there$", said, re.MULTILINE), said
    if code == 2:
        told = re.search(
            r"error: (\S+): cannot be written: No space left on device: (more than the )?[\d,]+ bytes", said
        )
        assert told is not None, said
        assert Path(told[1]).is_relative_to(root)
        assert "what is finished is kept; --resume goes on from there" in said


@pytest.mark.long
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_an_error_and_the_run_goes_on_from_the_one_before(
    start_program: Callable[..., ForkedProgram], tiny_folder: Path, tmp_path: Path
) -> None:
    """The kernel refuses to let a file grow over a limit that is set while the run trains, as it does on a full
    disk.
    """
    path = tmp_path / "run"
    only = [
        f"evaluation.variants=[{FIXED_BIT}]",
        "progressive.steps=21",
        "training.checkpoint_every=10",
        "training.samples_every=0",
        "evaluation.images=2",
        "evaluation.features=none",
    ]
    flags = [f"--set={override}" for override in tiny_overrides(tiny_folder, *only)]
    command = ["run", POLICIES / "smoke.yaml", "--out", path, *flags]
    process = start_program(*command)
    folder = CheckpointFolder(path / "checkpoints" / FIXED_BIT, 10)
    wait_for(folder.path / "step_000010" / "digests.json", process)
    size = (folder.path / "step_000010" / "model.safetensors").stat().st_size
    # the weights still fit, as those of the lowest held-out loss are written too; the optimizer's two moments do not
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size * 3 // 2, size * 3 // 2))
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, errors
    assert re.search(
        r"step_000020: cannot be written: File too large: [\d,]+ bytes are wanted, [\d,]+ are free", errors
    ), errors
    assert "Traceback" not in errors
    assert [path.name for path in sorted(folder.path.iterdir())] == ["best.safetensors", "step_000010"]
    assert damage(checkpoints(folder.path)[0]) is None
    again = start_program(*command, "--resume")
    output, errors = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, errors
    assert f"{FIXED_BIT}: going on from step 10" in output


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
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


@pytest.mark.long
def test_ctrl_c_after_a_benchmark_is_no_segmentation_fault(tmp_path: Path) -> None:
    """Compiled graphs that go in the order in which they came leave a stack for signals behind; see shared_core."""
    script = (
        "import no_usage_reports, gc, signal, sys\nfrom pathlib import Path\n"
        "from pqcad_qat.timing.latency import compile_for_latency\n"
        "graphs = [compile_for_latency(Path(sys.argv[1]), {}) for _ in range(2)]\n"
        "while graphs: del graphs[0]; gc.collect()\n"
        "try: signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt: print('told')\n"
    )
    command = [sys.executable, "-c", script, str(fixed_batch_graph(1, (1, 8, 8), tmp_path))]
    done = subprocess.run(
        command, cwd=SUPPORT, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


def wait_for(file: Path, process: ForkedProgram) -> None:
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
    assert f"{path}: got a folder that cannot be written" in done.stderr
