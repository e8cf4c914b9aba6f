"""Two processes give what one gives with twice the batch, and end together: real processes, forked and under
`accelerate launch`.

Sums over a batch are in another order where it is split, so floating point agrees to rounding alone, and quantized
training until a value that lies between two integers is rounded the other way. Not here: one process's loop
(test_trainer.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import AT_START, POLICIES, SUPPORT, environment, tiny_overrides
from torch import Tensor
from two_processes import EVERY, MEDDLED, STEPS, stage

from pqcad_qat import cli
from pqcad_qat.errors import CheckpointError, LaunchError
from pqcad_qat.machine.processes import agreed, check_launch, exchanged
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import PQ
from pqcad_qat.stages import open_run as opening
from pqcad_qat.stages.open_run import open_run
from pqcad_qat.timing.hardware import CAPS
from pqcad_qat.training.metrics_log import read_metrics

PATIENCE = 600  # seconds; a busy machine is no failure

RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""Of weights after a stage in floating point; its losses agree to 1e-5."""

QUANTIZED = 0.05
"""Relative, of the losses of a quantized stage."""


@dataclass(frozen=True)
class Pair:
    """What two processes came to: scenario -> findings, and the tensors they ended with, of each."""

    folder: Path
    found: tuple[Mapping[str, Any], Mapping[str, Any]]
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]]

    def ended(self, scenario: str) -> tuple[Any, Any]:
        return self.found[0][scenario], self.found[1][scenario]

    def weights(self, scenario: str) -> dict[str, Tensor]:
        head = f"{scenario}/"
        return {name.removeprefix(head): value for name, value in self.tensors[0].items() if name.startswith(head)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, str(SUPPORT / "two_processes.py"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    return Pair(folder, (first, second), (load_file(folder / "0.safetensors"), load_file(folder / "1.safetensors")))


def test_both_processes_hold_the_same_weights_averages_and_decisions(pair: Pair) -> None:
    assert pair.tensors[0].keys() == pair.tensors[1].keys()
    assert [name for name, value in pair.tensors[0].items() if not torch.equal(value, pair.tensors[1][name])] == []
    for scenario in ("floating", "accumulated", "quantized", "automatic", "rollback", "resumed"):
        first, second = pair.ended(scenario)
        assert {**first, "told": []} == {**second, "told": []}


def test_the_first_process_decides_when_a_stage_ends(pair: Pair) -> None:
    """Its clock alone says that the time is up."""
    for found in pair.ended("automatic"):
        assert found["ending"]["cause"] == "minutes"
        assert found["step"] == found["ending"]["last"] == len(found["losses"])


@pytest.mark.parametrize("way", ["floating", "accumulated"])
def test_floating_point_training_is_that_of_one_process_with_the_whole_batch(
    way: str, pair: Pair, tmp_path: Path
) -> None:
    """A Parameter that gets no gradient among them; `accumulated` in two micro-batches a process."""
    alone, weights = stage(tmp_path, floating=True)
    assert pair.ended(way)[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, value in pair.weights(way).items():
        torch.testing.assert_close(value, weights[name], rtol=RELATIVE, atol=ABSOLUTE)


def test_quantized_training_makes_the_transitions_of_one_process_with_the_whole_batch_and_its_losses(
    pair: Pair, tmp_path: Path
) -> None:
    alone, weights = stage(tmp_path)
    shared = pair.ended("quantized")[0]
    decisions = [
        [
            {key: entry[key] for key in ("step", "layer", "from_bits", "to_bits", "cause")}
            for entry in run["transitions"]
        ]
        for run in (alone, shared)
    ]
    assert decisions[0] == decisions[1]
    assert len(decisions[0]) == 2
    assert shared["losses"][:5] == pytest.approx(alone["losses"][:5], rel=1e-5)
    assert shared["losses"] == pytest.approx(alone["losses"], rel=QUANTIZED)
    for name, value in pair.weights("quantized").items():
        torch.testing.assert_close(value, weights[name], rtol=0.05, atol=2e-3)


def test_what_is_not_finite_on_one_process_sends_both_back_to_the_same_step(pair: Pair) -> None:
    first, second = pair.ended("rollback")
    assert [entry["step"] for entry in first["rollbacks"]] == [MEDDLED]
    assert first["step"] == second["step"] == STEPS
    assert (len(first["told"]), second["told"]) == (1, [])


def test_a_request_to_end_that_one_process_gets_ends_both_after_the_step_with_one_checkpoint_and_the_run_goes_on(
    pair: Pair,
) -> None:
    first, second = pair.ended("interrupted")
    assert first["error"] == second["error"] == "InterruptedByUserError"
    assert first["kept"] == [EVERY, MEDDLED + 1]
    assert (first["speaks"], second["speaks"]) == (True, False)
    whole, resumed = pair.weights("quantized"), pair.weights("resumed")
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []


@pytest.mark.parametrize(("rank", "scenario"), [(0, "first fails"), (1, "second fails")])
def test_an_error_of_one_process_ends_both_and_is_told_once(rank: int, scenario: str, pair: Pair) -> None:
    ended = pair.ended(scenario)
    assert ended[rank]["message"] == f"the disk of process {rank} is full"
    assert ended[1 - rank]["error"] == "OtherProcessError"
    assert [found["speaks"] for found in ended] == [rank == 0, rank == 1]


def test_processes_that_came_apart_are_an_error_at_the_next_checkpoint_and_none_is_written(pair: Pair) -> None:
    for found in pair.ended("drift"):
        assert found["error"] == "LaunchError"
        assert "step 20: unused differs between the processes" in found["message"]
        assert found["kept"] == [EVERY]


def test_what_is_gathered_is_made_by_both_and_goes_on_where_one_of_them_failed(pair: Pair) -> None:
    first, second = pair.ended("gathered")
    # batches in turn; the one behind the batch that failed is made again, now by the other process
    assert first["made"] == [0, 4, 8, 6]
    assert second["made"] == [2, 8]
    assert (first["errors"], second["errors"]) == (["OtherProcessError"], ["PqcadError"])
    assert torch.equal(pair.weights("gathered")["rows"], torch.arange(9))


# ---- the command line under a launcher
# -------------------------------------------------------------------------------------------


def launcher(*arguments: str | Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--main_process_port={port}",
    ]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "pqcad_qat", *map(str, arguments)]


def flags(model: Path, *more: str) -> list[str]:
    only = (f"evaluation.variants=[{PQ}]", "evaluation.images=3", "evaluation.batch_size=2", "evaluation.features=none")
    return [f"--set={override}" for override in tiny_overrides(model, *only, *more)]


@pytest.mark.long
def test_a_launched_run_of_which_one_process_is_killed_goes_on_to_the_result_of_one_process_with_twice_the_batch(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Under one cap of instructions, so that kernels do not depend on how many states a process computes at once."""
    capped = environment() | CAPS["avx2"]
    path = tmp_path / "two"
    command = launcher("run", POLICIES / "smoke.yaml", "--out", path, *flags(tiny_folder))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=capped, **pipes) as process:
        wait_for(path / "checkpoints/pq/step_000003/digests.json", process)
        os.kill(second_process(process.pid), signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "RuntimeError" not in output, output
    again = subprocess.run(
        [*command, "--resume"], env=capped, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("pq: going on from step ") == 1
    assert again.stdout.count("report: ") == 1
    assert "accelerate launch --multi_gpu --num_processes 2 -m pqcad_qat run" in (path / "report.json").read_text()
    assert len(load_file(path / "samples" / f"{PQ}.safetensors")["images"]) == 3

    alone = [sys.executable, "-m", "pqcad_qat", "run", str(POLICIES / "smoke.yaml"), "--out", str(tmp_path / "one")]
    alone += flags(tiny_folder, "training.batch_size=8")
    with subprocess.Popen(alone, env=capped, **pipes) as process:
        wait_for(tmp_path / "one/stages/pq.json", process)
        process.kill()  # what comes after its training is not compared
        output, _ = process.communicate(timeout=PATIENCE)
    assert (tmp_path / "one/stages/pq.json").exists(), output
    one, two = (read_metrics(tmp_path / name / "logs" / "pq.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    # of the first step alone: at which one a value is rounded the other way depends on the CPU
    for name in ("loss", "gradient_norm"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-5)
    assert [row["weight_distance"] for row in two] == pytest.approx([row["weight_distance"] for row in one], rel=1e-3)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=QUANTIZED)
    decided = [json.loads((tmp_path / name / "models" / "pq.json").read_text()) for name in ("one", "two")]
    assert [(row["step"], row["layer"], row["to_bits"]) for row in decided[0]] == [
        (row["step"], row["layer"], row["to_bits"]) for row in decided[1]
    ]
    weights = [load_file(tmp_path / name / "models" / "pq.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=5e-4)


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not file.exists():
        assert time.monotonic() < deadline, f"no {file} after {PATIENCE} s"
        time.sleep(0.01)


def second_process(parent: int) -> int:
    """The process that the launcher started as the second."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    ranks = {
        re.search(r"(?:^|\0)RANK=(\d)", Path(f"/proc/{child}/environ").read_text())[1]: int(child) for child in children
    }  # type: ignore[index]
    return ranks["1"]


@pytest.mark.long
def test_a_launched_pretraining_has_the_losses_and_gradients_of_one_process_with_twice_the_batch(
    tmp_path: Path,
) -> None:
    small = [
        "model.block_out_channels=[16, 16, 16]",
        "model.attention_head_dim=16",
        "training.steps=3",
        "training.warmup=1",
        "training.checkpoint_every=3",
    ]
    flags = [f"--set={override}" for override in (*small, "training.sample_every=3")]
    policy = POLICIES / "pretrain-digits.yaml"
    command = launcher("pretrain", policy, "--out", tmp_path / "two", *flags, "--set=training.batch_size=4")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: ") == 1
    cli.main(["pretrain", str(policy), "--out", str(tmp_path / "one"), *flags, "--set=training.batch_size=8"])
    one, two = (read_metrics(tmp_path / name / "logs" / "pretrain.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    assert [row["gradient_norm"] for row in two] == pytest.approx([row["gradient_norm"] for row in one], rel=1e-4)
    assert (tmp_path / "two" / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("late", [None, 0, 1])
def test_a_users_error_is_one_message_of_a_process_that_ends_with_code_2(late: int | None, tmp_path: Path) -> None:
    """Whichever process comes to it first: the launcher terminates a second one that is still loading."""
    (tmp_path / "sitecustomize.py").write_text(
        f"{(AT_START / 'sitecustomize.py').read_text()}\n"
        f"import os, time\nif os.environ.get('RANK') == '{late}':\n    time.sleep(1)\n"
    )
    command = launcher("run", POLICIES / "smoke.yaml", "--out", tmp_path / "run", "--set=progressive.steps=0")
    found = environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])}
    done = subprocess.run(command, env=found, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode != 0
    assert done.stderr.count("progressive.steps: got 0") == 1
    codes = {
        int(rank): int(code) for rank, code in re.findall(r"\n +rank +: (\d) .*\n +exitcode +: (-?\d+)", done.stderr)
    }
    assert codes[0] == 2
    assert codes[1] in (2, 130, -signal.SIGTERM)
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_terminated_while_another_tells_of_an_error_does_not_wait() -> None:
    """In a process of its own: signals to one that has run OpenVINO end in a segmentation fault."""
    lines = (
        "import os, signal",
        "from pqcad_qat.machine import program",
        "program.wait_for_report = lambda code: print('waits')",
        "with program.reported_endings(['run']):",
        "    os.kill(os.getpid(), signal.SIGTERM)",
    )
    second = environment() | {"WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=second,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_shares_no_work_is_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended:
        cli.main(["sample", "embedded:digits"])
    assert ended.value.code == 2
    assert "sample: got 2 processes; allowed 1" in capsys.readouterr().err


def test_a_launcher_that_started_one_process_where_several_were_asked_for_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launch()
    monkeypatch.setenv("MASTER_PORT", "29500")  # as `accelerate launch --cpu --num_processes 2` does
    with pytest.raises(LaunchError, match=r"allowed --multi_gpu --num_processes N, which needs no GPU"):
        check_launch()


def test_a_run_goes_on_with_as_many_processes_as_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(POLICIES / "smoke.yaml")
    with open_run(tmp_path / "run", policy, resume=False):
        pass
    monkeypatch.setattr(opening, "process_count", lambda: 2)
    with (
        pytest.raises(
            CheckpointError, match=r"launch\.json: processes: got 2; allowed 1, with which the run was begun"
        ),
        open_run(tmp_path / "run", policy, resume=True),
    ):
        pass
    (tmp_path / "run" / "launch.json").write_text('{"processes": 2}')
    with open_run(tmp_path / "run", policy, resume=True):
        pass


def test_one_process_agrees_with_itself() -> None:
    assert exchanged(1.0, 2.0) == [[1.0, 2.0]]
    with agreed() as first:
        assert first
    with pytest.raises(ValueError, match="mine"), agreed():
        raise ValueError("mine")
