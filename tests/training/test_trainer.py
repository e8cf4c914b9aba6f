"""The loop and its checkpoints: closed forms, bitwise repeats, and real faults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pqcad_qat.errors import CheckpointError, PqcadError
from pqcad_qat.training.callback import Batch, Callback, StepReport, TrainState, averaged_weights
from pqcad_qat.training.checkpoint import (
    CheckpointFolder,
    checkpoints,
    damage,
    latest_checkpoint,
    load_checkpoint,
    step_of,
    write_checkpoint,
)
from pqcad_qat.training.stage_end import Ending
from pqcad_qat.training.trainer import LoopSettings, fit, new_state


class KilledError(Exception):
    """Stands for a process that ends in the middle of a step."""


@dataclass
class Regression(Callback):
    """Least squares, split in two terms; remembers the losses it saw."""

    stop_at: int = -1

    def __post_init__(self) -> None:
        self.name = "regression"
        self.losses: list[float] = []

    def before_step(self, state: TrainState) -> None:
        if state.step == self.stop_at:
            raise KilledError

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        error = (state.network(batch["x"]) - batch["y"]).square().mean()
        return {"a": 0.25 * error, "b": 0.75 * error}

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self.losses.append(report.loss)

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": self.losses}

    def load_state_dict(self, saved: Mapping[str, list[float]]) -> None:
        self.losses = list(saved["losses"])


def batches(step: int) -> Batch:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])}


def fresh(settings: LoopSettings) -> tuple[TrainState, Accelerator]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    return new_state(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), settings, accelerator), accelerator


def weights(state: TrainState) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


SETTINGS = LoopSettings(steps=20, learning_rate=0.05, warmup=2, ema=0.9)


def test_training_lowers_the_loss_and_the_terms_sum_to_it() -> None:
    state, accelerator = fresh(SETTINGS)
    callback = Regression()
    fit(state, [callback], batches, SETTINGS, accelerator=accelerator)
    assert state.step == 20
    assert callback.losses[-1] < 0.5 * callback.losses[0]


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole, accelerator = fresh(SETTINGS)
    seen = Regression()
    fit(whole, [seen], batches, SETTINGS, accelerator=accelerator)

    first, accelerator = fresh(SETTINGS)
    folder = CheckpointFolder(tmp_path / "checkpoints", every=5)
    with pytest.raises(KilledError):
        fit(first, [Regression(stop_at=7)], batches, SETTINGS, accelerator=accelerator, checkpoints=folder)

    second, accelerator = fresh(SETTINGS)
    resumed = Regression()
    path, complaints = latest_checkpoint(folder.path)
    assert path is not None
    assert (path.name, complaints) == ("step_000005", [])
    load_checkpoint(path, second, [resumed])
    fit(second, [resumed], batches, SETTINGS, accelerator=accelerator, checkpoints=folder)
    assert torch.equal(weights(second), weights(whole))
    assert resumed.losses == seen.losses
    assert whole.ema is not None
    assert second.ema is not None
    assert all(torch.equal(second.ema[name], value) for name, value in whole.ema.items())


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch() -> None:
    results = []
    for accumulation in (1, 4):
        settings = LoopSettings(steps=5, learning_rate=0.05, accumulation=accumulation)
        state, accelerator = fresh(settings)
        fit(state, [Regression()], batches, settings, accelerator=accelerator)
        results.append(weights(state))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_the_moving_average_is_its_closed_form_and_leaves_the_weights_as_they_were() -> None:
    settings = LoopSettings(steps=3, learning_rate=0.1, shape="constant", ema=0.5)
    state, accelerator = fresh(settings)
    seen = [weights(state)]

    class Watch(Callback):
        def after_step(self, state: TrainState, report: StepReport) -> None:
            seen.append(weights(state))

    fit(state, [Regression(), Watch()], batches, settings, accelerator=accelerator)
    wanted = seen[0]
    for n, value in enumerate(seen[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * value
    with averaged_weights(state):
        torch.testing.assert_close(weights(state), wanted)
    assert torch.equal(weights(state), seen[-1])


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = LoopSettings(steps=100, learning_rate=1.0, warmup=9)
    assert settings.learning_rate_at(0) == pytest.approx(0.1)
    assert settings.learning_rate_at(50) == pytest.approx(0.5)
    assert settings.learning_rate_at(99) < 1e-3
    assert LoopSettings(steps=100, learning_rate=1.0, shape="constant").learning_rate_at(99) == 1.0


def test_the_rate_of_a_stage_without_a_known_end_falls_with_the_root_of_its_steps_and_then_to_zero() -> None:
    settings, end = LoopSettings(steps=1000, learning_rate=1.0, shape="open"), Ending(320, 400, "plateau")
    rates = {step: settings.learning_rate_at(step - 1) for step in (1, 20, 80, 320)}
    assert rates == {1: 1.0, 20: 1.0, 80: 0.5, 320: 0.25}
    assert settings.learning_rate_at(319, ending=end) == 0.25
    assert settings.learning_rate_at(360, ending=end) == pytest.approx(0.5 * (20 / 361) ** 0.5)
    assert 0 < settings.learning_rate_at(399, ending=end) < 1e-3


def test_divergence_is_named_with_its_step() -> None:
    state, accelerator = fresh(SETTINGS)

    def broken(step: int) -> Batch:
        return {name: value * (float("nan") if step == 3 else 1.0) for name, value in batches(step).items()}

    with pytest.raises(PqcadError, match="step 3: training diverged"):
        fit(state, [Regression()], broken, SETTINGS, accelerator=accelerator)


def trained(folder: CheckpointFolder) -> None:
    state, accelerator = fresh(SETTINGS)
    fit(state, [Regression()], batches, SETTINGS, accelerator=accelerator, checkpoints=folder)


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    trained(CheckpointFolder(tmp_path, every=5, keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000015", "step_000020"]


def test_what_ctrl_c_left_is_dropped_before_the_checkpoints_at_their_own_steps(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, every=5, keep=2)
    state, _ = fresh(SETTINGS)
    left = []
    for state.step in (5, 7, 8, 10, 11, 15):
        write_checkpoint(folder, state, [])
        left.append([step_of(path) for path in checkpoints(tmp_path)])
    assert left == [[5], [5, 7], [5, 8], [5, 10], [5, 10, 11], [10, 15]]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "digests.json"]
)
@pytest.mark.parametrize("fault", ["truncated", "missing", "changed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, file: str, fault: str) -> None:
    trained(CheckpointFolder(tmp_path, every=5))
    victim = tmp_path / "step_000020" / file
    content = victim.read_bytes()
    if fault == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if fault == "truncated" else b"X" + content[1:])
    path, complaints = latest_checkpoint(tmp_path)
    assert path == tmp_path / "step_000015"
    assert len(complaints) == 1
    assert file in complaints[0]
    assert "step_000020" in complaints[0]
    state, _ = fresh(SETTINGS)
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        load_checkpoint(tmp_path / "step_000020", state, [Regression()])


def test_a_checkpoint_of_another_model_or_other_callbacks_is_refused(tmp_path: Path) -> None:
    trained(CheckpointFolder(tmp_path, every=5))
    path = tmp_path / "step_000020"
    accelerator = Accelerator(cpu=True)
    with pytest.raises(CheckpointError, match="got weights of another model"):
        load_checkpoint(path, new_state(nn.Linear(4, 1), SETTINGS, accelerator), [Regression()])
    state, _ = fresh(SETTINGS)
    with pytest.raises(CheckpointError, match="callbacks"):
        load_checkpoint(path, state, [])


def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_older_checkpoints(tmp_path: Path) -> None:
    trained(CheckpointFolder(tmp_path / "ok", every=5))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError, match="on writing this checkpoint; allowed a folder that can be written"):
        trained(CheckpointFolder(blocked, every=5))
    assert damage(tmp_path / "ok" / "step_000020") is None


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    trained(CheckpointFolder(tmp_path, every=5))
    files = sorted(path.name for path in (tmp_path / "step_000020").iterdir())
    assert files == ["digests.json", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert json.loads((tmp_path / "step_000020" / "state.json").read_text())["step"] == 20


def test_the_callback_of_the_architecture_page_logs_what_it_says() -> None:
    page = (Path(__file__).parents[2] / "pqcad_qat" / "README.md").read_text(encoding="utf-8")
    written: dict[str, Any] = {}
    exec(page.split("<!-- callback -->")[1].split("```python\n")[1].split("```")[0], written)
    state, accelerator = fresh(SETTINGS)
    callback = written["WeightNorm"]()
    fit(state, [Regression(), callback], batches, SETTINGS, accelerator=accelerator)
    assert callback.scalars() == {"weight_norm": pytest.approx(float(weights(state).norm()))}
