"""Trackers beside the run's own files: what reaches them, what is refused before a run, and one that fails.

Those that are optional are tested where they are installed: `tox -e trackers`. Not here: which scalars there are
(test_metrics_log.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from tiny_runs import POLICIES, environment, program, tiny_overrides

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import PQ
from pqcad_qat.training import trackers
from pqcad_qat.training.trackers import Accelerates, TensorBoard, check_trackers, opened_trackers


class Fragile(GeneralTracker):
    """A tracker whose second step fails."""

    name, requires_logging_directory, tracker = "fragile", False, None

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def start(self) -> None:
        self.heard.append("start")

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if step == 2:
            raise ConnectionError("no network")
        self.heard.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.heard.append((step, {name: [picture.shape for picture in value] for name, value in values.items()}))

    def finish(self) -> None:
        self.heard.append("finish")


def test_a_tracker_that_fails_is_told_of_once_and_no_step_fails_with_it() -> None:
    tracker, told = Fragile(), list[str]()
    ours = Accelerates(tracker, told.append)
    ours.images({"samples": torch.zeros(2, 3, 8, 4, dtype=torch.uint8)}, 1)
    for step in (1, 2, 3):
        ours.scalars({"loss": 1.0}, step)
    ours.close()
    assert tracker.heard == ["start", (1, {"samples": [(8, 4, 3)] * 2}), (1, {"loss": 1.0})]
    assert told == ["fragile gets nothing any more: ConnectionError: no network"]


def test_a_tracker_that_works_is_finished() -> None:
    tracker, told = Fragile(), list[str]()
    Accelerates(tracker, told.append).close()
    assert (tracker.heard, told) == (["start", "finish"], [])


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else name)
    check_trackers(["tensorboard"])
    with pytest.raises(PolicyError, match=r"got mlflow, not installed here; allowed after: pip install mlflow"):
        check_trackers(["tensorboard", "mlflow"])


def test_weights_and_biases_without_a_login_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(api=SimpleNamespace(api_key=None))
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "import_module", lambda _: module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(PolicyError, match=r"training\.trackers: got wandb, and nobody is logged in; allowed after"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def test_no_tracker_is_a_choice(tmp_path: Path) -> None:
    assert opened_trackers([], PQ, tmp_path / "run" / "logs", print) == []
    (board,) = opened_trackers(["tensorboard"], PQ, tmp_path / "run" / "logs", print)
    assert isinstance(board, TensorBoard)
    board.close()
    assert load_policy(POLICIES / "w4a8.yaml").training.trackers == ("tensorboard",)
    with pytest.raises(PolicyError, match=r"training\.trackers\[0\]: got .*aim"):
        load_policy(POLICIES / "w4a8.yaml", ["training.trackers=[aim]"])


def test_a_run_is_sent_to_the_optional_trackers_without_a_network(tiny_folder: Path, tmp_path: Path) -> None:
    """As the command line does it, with what each of them keeps on the disk."""
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    only = ("training.trackers=[wandb, mlflow]", f"evaluation.variants=[{PQ}]", "evaluation.features=none")
    flags = [f"--set={override}" for override in tiny_overrides(tiny_folder, *only)]
    store = (tmp_path / "mlruns").as_uri()
    offline = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_FILE_STORE": "true"}
    command = program(["run", POLICIES / "smoke.yaml", "--out", tmp_path / "runs" / "mine", *flags])
    done = subprocess.run(command, env=environment() | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gets nothing any more" not in done.stdout
    assert list((tmp_path / "runs" / "mine" / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    script = (
        "import json, sys, mlflow\nclient = mlflow.MlflowClient()\n"
        "(mine,) = [found for found in client.search_experiments() if found.name == 'mine']\n"
        "(run,) = client.search_runs([mine.experiment_id])\n"
        "print(json.dumps([run.info.run_name, run.info.status, run.data.metrics]))"
    )
    read = subprocess.run(
        [sys.executable, "-c", script], env=environment() | offline, capture_output=True, text=True, check=True
    )
    name, status, metrics = json.loads(read.stdout.splitlines()[-1])
    rows = [json.loads(row) for row in (tmp_path / "runs/mine/logs/pq.jsonl").read_text().splitlines()]
    assert (name, status, metrics["loss"]) == (PQ, "FINISHED", rows[-1]["loss"])
    assert mlflow.__version__
