"""The training log: its file, TensorBoard's events, what a resumed run drops, and what a crash leaves.

Not here: what the loop reports (test_trainer.py).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.policy.variants import PQ
from pqcad_qat.training.callback import Callback, StepReport, TrainState
from pqcad_qat.training.metrics_log import FIRST, LAYER, MetricsLog, log_texts, read_metrics


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def state_at(step: int) -> TrainState:
    model = nn.Linear(1, 1)
    return TrainState(model=model, optimizer=torch.optim.SGD(model.parameters()), network=model, step=step)


def report(loss: float) -> StepReport:
    return StepReport(
        loss=loss,
        terms={"teacher": loss / 4, "calibration": 3 * loss / 4},
        gradient_norm=0.5,
        learning_rate=1e-3,
        samples=8,
    )


class Widths(Callback):
    def scalars(self) -> Mapping[str, float]:
        return {"mean_bits": 6.0, f"{LAYER}conv_in/bits": 8.0}


def log_steps(log: MetricsLog, steps: range) -> None:
    log.start_at(steps.start - 1)
    with log:
        for step in steps:
            log.after_step(state_at(step), report(1.0 / step))


def test_every_step_is_a_row_with_its_terms_and_the_callbacks_scalars_but_not_single_layers(tmp_path: Path) -> None:
    log = MetricsLog(PQ, tmp_path, 3, quiet(), [Widths()])
    log_steps(log, range(1, 4))
    rows = read_metrics(tmp_path / "pq.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1] == {
        "step": 2,
        "loss": 0.5,
        "loss/teacher": 0.125,
        "loss/calibration": 0.375,
        "gradient_norm": 0.5,
        "learning_rate": 1e-3,
        "mean_bits": 6.0,
    }


def test_tensorboard_has_a_run_of_the_stage_with_what_is_read_first_and_the_rest_below_more(tmp_path: Path) -> None:
    log_steps(MetricsLog(PQ, tmp_path, 3, quiet(), [Widths()]), range(1, 4))
    events = EventAccumulator(str(tmp_path / PQ))
    events.Reload()
    first = {"loss", "loss/teacher", "loss/calibration", "gradient_norm", "learning_rate", "mean_bits"}
    assert set(events.Tags()["scalars"]) == {*first, "more/layer/conv_in/bits"}
    assert first < set(FIRST)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]


def test_a_resumed_run_drops_the_rows_it_makes_again(tmp_path: Path) -> None:
    log_steps(MetricsLog(PQ, tmp_path, 6, quiet()), range(1, 6))
    log_steps(MetricsLog(PQ, tmp_path, 6, quiet()), range(4, 7))
    assert [row["step"] for row in read_metrics(tmp_path / "pq.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_line_that_a_crash_cut_short_is_left_out_and_written_anew(tmp_path: Path) -> None:
    log_steps(MetricsLog(PQ, tmp_path, 4, quiet()), range(1, 4))
    file = tmp_path / "pq.jsonl"
    file.write_text(file.read_text()[:-20])
    assert [row["step"] for row in read_metrics(file)] == [1, 2]
    log_steps(MetricsLog(PQ, tmp_path, 4, quiet()), range(3, 5))
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3, 4]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log_steps(MetricsLog(PQ, tmp_path / "logs", 3, quiet(), enabled=False), range(1, 4))
    assert not (tmp_path / "logs").exists()


def test_where_there_is_no_terminal_a_tenth_of_the_steps_is_one_line(tmp_path: Path) -> None:
    console = quiet()
    log_steps(MetricsLog(PQ, tmp_path, 40, console, [Widths()]), range(1, 41))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"pq: step 4 of 40, loss \S+ bits 6\.00 \S+ images/s, \d+:\d\d:\d\d left", lines[0])
    assert re.fullmatch(r"pq: step 40 of 40, loss .* left", lines[-1])


def test_slow_steps_are_told_of_after_half_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("pqcad_qat.training.metrics_log.monotonic", lambda: float(next(clock)))
    console = quiet()
    log_steps(MetricsLog(PQ, tmp_path, 1000, console), range(1, 7))
    assert isinstance(console.file, io.StringIO)
    assert re.findall(r"pq: step (\d+) of 1000", console.file.getvalue()) == ["2", "4", "6"]


def test_the_progress_line_counts_the_images_of_whole_batches_and_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 3))  # a step takes three seconds
    monkeypatch.setattr("pqcad_qat.training.metrics_log.monotonic", lambda: float(next(clock)))
    console = quiet()
    log_steps(MetricsLog(PQ, tmp_path, 40, console), range(1, 5))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith(" 2.67 images/s, 0:01:48 left\n")  # batches of 8, and 36 steps to go


class Pictures(Callback):
    def images(self) -> Mapping[str, Tensor]:
        return {"samples": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}


def test_tensorboard_gets_the_callbacks_images_and_texts_once(tmp_path: Path) -> None:
    for text in ("first", "again"):
        log_texts(tmp_path, {"policy": text})
    log_steps(MetricsLog(PQ, tmp_path, 2, quiet(), [Pictures()]), range(1, 3))
    stage, run = EventAccumulator(str(tmp_path / PQ)), EventAccumulator(str(tmp_path))
    stage.Reload()
    run.Reload()
    assert [(image.step, image.height, image.width) for image in stage.Images("samples")] == [(1, 8, 32), (2, 8, 32)]
    (text,) = run.Tensors("policy/text_summary")
    assert text.tensor_proto.string_val == [b"first"]


def test_a_failing_stage_still_closes_the_log(tmp_path: Path) -> None:
    def broken_stage(log: MetricsLog) -> None:
        with log:
            log.after_step(state_at(1), report(1.0))
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken_stage(MetricsLog(PQ, tmp_path, 3, quiet()))
    assert json.loads((tmp_path / "pq.jsonl").read_text())["step"] == 1
    with MetricsLog(PQ, tmp_path, 3, quiet()):  # a second progress line of a console that still has one would raise
        pass


def test_a_progress_bar_shows_itself_only_on_a_terminal() -> None:
    assert progress_bar(quiet()).disable
    assert not progress_bar(Console(file=io.StringIO(), force_terminal=True)).disable
