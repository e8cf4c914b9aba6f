"""A stage of training goes on where its checkpoints end, past a damaged one, and equals the uninterrupted stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from pqcad_qat.training.callback import Batch, Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.metrics_log import read_metrics
from pqcad_qat.training.trainer import LoopSettings
from pqcad_qat.training.training_stage import StageSettings, train_stage


class KilledError(Exception):
    """Stands for a process that ends in the middle of a step."""


class Regression(Callback):
    """Least squares; dies before step `until`."""

    def __init__(self, until: int = -1) -> None:
        self.name = "regression"
        self.until = until

    def before_step(self, state: TrainState) -> None:
        if state.step == self.until:
            raise KilledError

    def scalars(self) -> Mapping[str, float]:
        return {"until": float(self.until)}

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        return {"squared": (state.network(batch["x"]) - batch["y"]).square().mean()}


def batches(step: int) -> Batch:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x.sum(dim=1, keepdim=True)}


def settings(root: Path) -> StageSettings:
    loop = LoopSettings(steps=20, learning_rate=0.05, ema=0.9)
    return StageSettings("toy", loop, "fp32", CheckpointFolder(root / "checkpoints", every=5), root / "logs")


def train(root: Path, until: int = -1, **options: object) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    train_stage(model, [Regression(until)], batches, settings(root), console=Console(quiet=True), **options)
    return model.weight.detach()


def test_a_killed_stage_goes_on_past_a_damaged_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KilledError):
        train(tmp_path / "cut", until=13)
    (tmp_path / "cut" / "checkpoints" / "step_000010" / "model.safetensors").write_bytes(b"torn")
    told: list[str] = []
    assert torch.equal(train(tmp_path / "cut", warn=told.append), whole)
    assert len(told) == 1
    assert "step_000010: got a damaged model.safetensors" in told[0]


def test_the_log_has_every_step_once_and_the_callbacks_scalars(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, until=13)
    train(tmp_path)
    rows = read_metrics(tmp_path / "logs" / "toy.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert (rows[0]["until"], rows[-1]["until"]) == (13.0, -1.0)
