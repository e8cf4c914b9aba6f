"""What follows from a divergence: stop, on at a lower rate, or back to the last good checkpoint; the same however often
the run is cut off.

Not here: how a divergence is found (test_trouble_watch.py).
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from small_stage import STEPS, Matching, batches, network, weight_range
from torch import Tensor

from pqcad_qat.errors import CheckpointError, DivergedError, InterruptedByUserError
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.quantization.layer_state import QuantizedLayer, read_bits, set_weight_bits
from pqcad_qat.training.callback import Batch, Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.metrics_log import read_metrics
from pqcad_qat.training.rollback import RECORD
from pqcad_qat.training.trainer import LoopSettings
from pqcad_qat.training.training_stage import StageSettings, train_stage

pytestmark = pytest.mark.slow

Way = Literal["rollback", "lower_rate", "stop"]

DROP = 20
"""Step of the bit drop."""


class KilledError(Exception):
    """Stands for a process that ends in the middle of a step."""


class FragileDrop(Callback):
    """A bit schedule that goes to 4 bits at a step, or when it may; the first time it leaves a range a hundred times
    too wide.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        self.name, self.layer, self.dropped_at = "drop", layer, -1

    def before_step(self, state: TrainState) -> None:
        if self.dropped_at < 0 and state.step >= max(DROP, state.held_until):
            set_weight_bits(self.layer, 4)
            self.dropped_at = state.step
            with torch.no_grad():
                weight_range(self.layer).mul_(1 if state.setbacks else 100)

    def state_dict(self) -> dict[str, Any]:
        return {"dropped_at": self.dropped_at}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.dropped_at = saved["dropped_at"]


class Ends(Callback):
    """Kills before some steps, presses Ctrl-C before others."""

    def __init__(self, kill: int = -1, interrupt: int = -1) -> None:
        self.name, self.kill, self.interrupt = "ends", kill, interrupt

    def before_step(self, state: TrainState) -> None:
        if state.step == self.kill:
            raise KilledError
        if state.step == self.interrupt:
            # called by hand: test_kills.py sends a real signal, to a process of its own
            handler = signal.getsignal(signal.SIGINT)
            assert callable(handler)
            handler(signal.SIGINT, None)


class Result:
    """A stage after training: its layer that drops, all its numbers, and what was told."""

    def __init__(
        self,
        folder: Path,
        way: Way,
        ends: Ends | None = None,
        rate: float = 1e-3,
        source: Callable[[int], Batch] = batches,
    ) -> None:
        model = network()
        layers = quantized_layers(model)
        self.layer, self.told = layers["2"], list[str]()
        self.drop = FragileDrop(self.layer)
        loop = LoopSettings(steps=STEPS, learning_rate=rate, ema=0.9)
        settings = StageSettings(
            "toy", loop, "fp32", CheckpointFolder(folder / "checkpoints", every=10), folder / "logs", way
        )
        callbacks = [self.drop, Matching(layers), ends or Ends()]
        self.state = train_stage(model, callbacks, source, settings, console=Console(quiet=True), warn=self.told.append)
        self.numbers: dict[str, Tensor] = {
            **model.state_dict(),
            **{f"ema {name}": value for name, value in (self.state.ema or {}).items()},
        }
        self.rows = read_metrics(folder / "logs" / "toy.jsonl")
        self.rate_at = loop.learning_rate_at


def same(one: Result, other: Result) -> bool:
    return (
        all(torch.equal(value, other.numbers[name]) for name, value in one.numbers.items()) and one.rows == other.rows
    )


def cut_off(folder: Path, way: Way, ends: Sequence[Ends]) -> Result:
    for end in ends:
        with pytest.raises(KilledError if end.kill >= 0 else InterruptedByUserError):
            Result(folder, way, end)
    return Result(folder, way)


def test_a_rollback_enters_again_before_the_drop_holds_it_back_and_goes_on_to_the_end_at_half_the_rate(
    tmp_path: Path,
) -> None:
    result = Result(tmp_path, "rollback")
    (record,) = json.loads((tmp_path / "checkpoints" / RECORD).read_text())
    assert (record["entered"], result.state.step, read_bits(result.layer)[0]) == (DROP, STEPS, 4)
    assert DROP < record["step"] == result.drop.dropped_at
    assert len(result.told) == 1
    assert "layer 2 from 8 to 4 bits" in result.told[0]
    assert f"Gone back to the checkpoint of step {DROP}, learning rate 0.0005" in result.told[0]
    assert [row["step"] for row in result.rows] == list(range(1, STEPS + 1))
    rates = [row["learning_rate"] for row in result.rows]
    assert rates == [result.rate_at(step, setbacks=int(step >= DROP)) for step in range(STEPS)]


@pytest.mark.parametrize(
    "ends",
    [
        [],
        [Ends(kill=21)],
        [Ends(kill=29), Ends(kill=45)],
        [Ends(interrupt=13), Ends(interrupt=16), Ends(interrupt=19), Ends(kill=29), Ends(interrupt=33)],
        [Ends(interrupt=STEPS - 1)],
    ],
    ids=["again", "before the divergence", "after it", "with Ctrl-C in between", "with Ctrl-C in the last step"],
)
@pytest.mark.parametrize("way", ["rollback", "lower_rate"])
def test_what_follows_a_divergence_is_bitwise_the_same_however_the_run_is_cut_off(
    tmp_path: Path, way: Way, ends: list[Ends]
) -> None:
    assert same(cut_off(tmp_path / "cut", way, ends), Result(tmp_path / "whole", way))


def test_without_a_checkpoint_training_goes_back_to_the_start_and_ends_with_an_error_that_says_what_was_tried(
    tmp_path: Path,
) -> None:
    with pytest.raises(DivergedError) as caught:
        Result(tmp_path, "rollback", rate=1e3)
    assert f"step {caught.value.step}: training diverged" in str(caught.value)
    assert "Tried: gone back 3 times (from step 0 after step " in str(caught.value)
    assert "down to a learning rate of 125; set training.learning_rate lower" in str(caught.value)
    assert [entry["entered"] for entry in json.loads((tmp_path / "checkpoints" / RECORD).read_text())] == [0, 0, 0]


def test_a_lower_rate_goes_on_from_where_it_is(tmp_path: Path) -> None:
    result = Result(tmp_path, "lower_rate")
    assert (result.state.step, result.drop.dropped_at) == (STEPS, DROP)
    assert result.state.setbacks == sum("Gone on at the learning rate" in told for told in result.told) >= 1
    assert result.told[0].endswith("Gone on at the learning rate 0.0005")
    assert not (tmp_path / "checkpoints" / RECORD).exists()


def test_at_a_lower_rate_a_step_whose_loss_is_not_finite_is_left_out(tmp_path: Path) -> None:
    def source(step: int) -> Batch:
        return {name: value * (math.nan if step in (3, 7) else 1.0) for name, value in batches(step).items()}

    result = Result(tmp_path, "lower_rate", source=source)
    assert [row["step"] for row in result.rows if row["step"] < 12] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert ["step 3: training diverged" in result.told[0], "step 7: training diverged" in result.told[1]] == [
        True,
        True,
    ]


def test_stop_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="layer 2 from 8 to 4 bits"):
        Result(tmp_path, "stop")


def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / RECORD).write_text("[{")
    with pytest.raises(CheckpointError, match=r"rollbacks\.json: got a damaged record: .* delete"):
        Result(tmp_path, "rollback")
