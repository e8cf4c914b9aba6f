"""One run that is interrupted, killed three times and resumed, against the run that was left alone.

Not here: checkpoints by themselves (test_trainer.py), the folder's rules (test_run_folder.py).

    Ctrl-C while pq trains -> killed while fixed-bit trains -> killed between two stages -> killed while images are
    sampled -> to the end
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from forked_program import ForkedProgram
from safetensors.torch import load_file
from tiny_runs import POLICIES, FinishedRun, tiny_overrides

from pqcad_qat.machine.files import file_digest
from pqcad_qat.policy.variants import FIXED_BIT, FLOAT_STEPS, FP32, PQ, PQ_DISTILLED, PQCAD, PQCAD_OPENVINO, STEP_COSTS

PATIENCE = 600  # seconds; a busy machine is no failure


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        code: its exit code.
        output, errors: what it printed.
        stages: marker of every stage finished by then -> time of writing, content.
    """

    code: int
    output: str
    errors: str
    stages: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class InterruptedRun:
    """The run's folder and its processes in order."""

    path: Path
    parts: tuple[Part, ...]


@pytest.fixture(scope="module")
def interrupted(
    start_program: Callable[..., ForkedProgram], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> InterruptedRun:
    """The tiny run as a command line in five processes."""
    path = tmp_path_factory.mktemp("resume") / "tiny"
    flags = [f"--set={override}" for override in tiny_overrides(tiny_folder)]
    begin = partial(start_program, "run", POLICIES / "smoke.yaml", "--out", path, *flags)
    go_on = partial(begin, "--resume")
    first = part(begin(), path, "checkpoints/pq/step_000003/digests.json", signal.SIGINT)
    (path / "checkpoints" / PQ / "step_000999").mkdir()  # a later one, damaged
    parts = (
        first,
        part(go_on(), path, f"checkpoints/{FIXED_BIT}/step_000003/digests.json", signal.SIGKILL),
        part(go_on(), path, f"stages/{FIXED_BIT}.json", signal.SIGKILL),
        part(go_on(), path, f"stages/samples-{FP32}.json", signal.SIGKILL),
        part(go_on(), path),
    )
    return InterruptedRun(path, parts)


def part(process: ForkedProgram, path: Path, until: str = "", sent: signal.Signals = signal.SIGKILL) -> Part:
    """Wait until a file is there, then send the signal; without a file, wait for the end."""
    deadline = time.monotonic() + PATIENCE
    while until and process.poll() is None and not (path / until).exists():
        assert time.monotonic() < deadline, f"no {until} after {PATIENCE} s"
        time.sleep(0.002)
    if until:
        process.send_signal(sent)
    output, errors = process.communicate(timeout=PATIENCE)
    markers = {
        marker.stem: (marker.stat().st_mtime_ns, marker.read_text()) for marker in (path / "stages").glob("*.json")
    }
    assert process.returncode is not None
    return Part(process.returncode, output, errors, markers)


def test_ctrl_c_ends_training_with_a_checkpoint_and_says_how_to_go_on(interrupted: InterruptedRun) -> None:
    first = interrupted.parts[0]
    assert first.code == 130
    assert "interrupted" in first.errors
    assert "--resume" in first.errors
    assert "Traceback" not in first.errors
    assert set(first.stages) == {"calibration", FLOAT_STEPS, STEP_COSTS}


def test_the_kills_came_where_they_were_meant_to(interrupted: InterruptedRun) -> None:
    _, training, between, sampling, last = interrupted.parts
    assert [training.code, between.code, sampling.code] == [-signal.SIGKILL] * 3
    assert set(training.stages) == {"calibration", FLOAT_STEPS, STEP_COSTS, PQ}
    assert FIXED_BIT in between.stages
    assert "export" not in between.stages
    assert f"samples-{FP32}" in sampling.stages
    assert "evaluation" not in sampling.stages
    assert last.code == 0, last.errors


def test_every_part_goes_on_from_the_last_checkpoint(interrupted: InterruptedRun) -> None:
    assert "pq: going on from step " in interrupted.parts[1].output
    assert f"{FIXED_BIT}: going on from step " in interrupted.parts[2].output


def test_what_an_earlier_process_was_warned_of_is_in_the_report(interrupted: InterruptedRun) -> None:
    told = json.loads((interrupted.path / "report.json").read_text())["warnings"]
    assert len(told) == 1
    assert "step_000999: got no digests.json that can be read; using the one before it" in told[0]


def test_the_resumed_run_ends_with_the_weights_of_the_uninterrupted_one_bit_for_bit(
    interrupted: InterruptedRun, tiny_run: FinishedRun
) -> None:
    for name in (PQ, FIXED_BIT, PQ_DISTILLED, PQCAD):
        resumed, whole = (
            load_file(path / "models" / f"{name}.safetensors") for path in (interrupted.path, tiny_run.path)
        )
        assert resumed.keys() == whole.keys()
        assert [key for key, value in whole.items() if not torch.equal(resumed[key], value)] == [], name


def test_the_resumed_run_made_the_same_transitions(interrupted: InterruptedRun, tiny_run: FinishedRun) -> None:
    resumed, whole = (
        json.loads((path / "stages" / "pq.json").read_text())["transitions"]
        for path in (interrupted.path, tiny_run.path)
    )
    assert resumed == whole


def test_every_training_step_is_logged_once_with_the_loss_of_the_uninterrupted_run(
    interrupted: InterruptedRun, tiny_run: FinishedRun
) -> None:
    for name in (PQ, FIXED_BIT, PQ_DISTILLED, PQCAD):
        resumed, whole = ((path / "logs" / f"{name}.jsonl").read_text() for path in (interrupted.path, tiny_run.path))
        assert [json.loads(row) for row in resumed.splitlines()] == [json.loads(row) for row in whole.splitlines()], (
            name
        )


def test_finished_stages_are_never_repeated(interrupted: InterruptedRun) -> None:
    for earlier, later in zip(interrupted.parts, interrupted.parts[1:], strict=False):
        assert {name: later.stages[name] for name in earlier.stages} == earlier.stages


def test_the_resumed_run_ships_what_the_uninterrupted_one_ships(
    interrupted: InterruptedRun, tiny_run: FinishedRun
) -> None:
    for file in (
        "openvino/unet/openvino_model.bin",
        "student/quantization/model.safetensors",
        "distillation/teacher.safetensors",
    ):
        assert file_digest(interrupted.path / file) == file_digest(tiny_run.path / file), file


def test_the_whole_run_reports_itself_on_the_command_line(interrupted: InterruptedRun) -> None:
    last = interrupted.parts[-1].output
    assert PQCAD_OPENVINO in last
    assert f"report:   {interrupted.path / 'report.html'}" in last
    assert "planned layers that executed in INT8" in last
    command = json.loads((interrupted.path / "report.json").read_text())["reproduction"]["command"]
    assert command.startswith("python -m pqcad_qat run ")
    assert "--resume" not in command
