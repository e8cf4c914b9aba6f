"""The log of a training stage: its trackers, a file of numbers for the report, and a progress line.

Not here: what the numbers mean; callbacks supply them by name. Nor the trackers (trackers.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from torch.utils.tensorboard import SummaryWriter

from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.policy.value_types import TrackerName
from pqcad_qat.training.callback import Callback, StepReport, TrainState
from pqcad_qat.training.trackers import Tracker, opened_trackers

LAYER = "layer/"
"""Prefix of scalars of single layers, which go to trackers but not to the file that the report reads."""

FIRST = (
    "loss",
    "held_out",
    "learning_rate",
    "gradient_norm",
    "mean_bits",
    "blend_lambda",
    "weight_change",
    "weight_distance",
    "loss/teacher",
    "loss/calibration",
)
"""Scalars that a person reads first."""

MORE = "more/"
"""Prefix of all other scalars in trackers."""

LINE_EVERY = 50
"""Training steps between two lines of a stage that has not decided yet when it ends."""

LINE_SECONDS = 30.0
"""Seconds after which a line is printed at the latest, where training steps are slow."""


@dataclass
class MetricsLog(Callback):
    """Sends loss terms, scalars and images of a stage to its trackers, and the numbers also to `FOLDER/STAGE.jsonl`.

    In TensorBoard every stage is a run, `FOLDER/STAGE`, so that stages lie in one chart. Scalars and images come from
    the other callbacks. The log is a context manager around `fit`. When a run is resumed, the rows of later steps are
    dropped.

    Attributes:
        stage: name of the stage, which names the file and the run in TensorBoard.
        folder: where TensorBoard's events and the file are written.
        steps: training steps of the stage, for the progress line; the largest number where it ends by itself.
        console: where the progress line is shown.
        callbacks: callbacks whose scalars and images are logged after every step.
        enabled: whether anything is written; False on all processes but the first.
        automatic: whether the stage ends by itself.
        trackers: where scalars and images go besides.
        loss: smoothed loss that the progress line shows.
    """

    stage: str
    folder: Path
    steps: int
    console: Console
    callbacks: Sequence[Callback] = ()
    enabled: bool = True
    automatic: bool = False
    trackers: Sequence[TrackerName] = ("tensorboard",)
    loss: float = math.nan
    _held_out: float | None = field(default=None, init=False)
    _trackers: Sequence[Tracker] = field(default=(), init=False)
    _progress: Progress | None = field(default=None, init=False)
    _task: TaskID = field(default=TaskID(0), init=False)
    _began: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)
    _told: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.name = f"log-{self.stage}"

    @property
    def file(self) -> Path:
        """The file of numbers: one JSON object per training step."""
        return self.folder / f"{self.stage}.jsonl"

    def __enter__(self) -> MetricsLog:
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._trackers = opened_trackers(self.trackers, self.stage, self.folder, self._warn)
            self._progress = progress_bar(self.console, lines=False)
            self._progress.start()
            self._task = self._progress.add_task(self.stage, total=self.steps, note="")
            self._began = self._told = monotonic()
            self._steps = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
            # closing writes: on a full disk it would fail again, and hide the error that is under way
            with suppress(OSError) if error else nullcontext():
                for tracker in self._trackers:
                    tracker.close()

    def start_at(self, step: int) -> None:
        """Drop the rows of steps that will be made again."""
        if self.enabled and self.file.exists():
            earlier = [row for row in read_metrics(self.file) if row["step"] <= step]
            write_file(self.file, "".join(json.dumps(row) + "\n" for row in earlier))

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if not self._progress:
            return
        row: dict[str, float] = {"loss": report.loss, **{f"loss/{name}": value for name, value in report.terms.items()}}
        row |= {"gradient_norm": report.gradient_norm, "learning_rate": report.learning_rate}
        for callback in self.callbacks:
            row |= callback.scalars()
            if pictures := callback.images():
                for tracker in self._trackers:
                    tracker.images(pictures, state.step)
        shown = {name if name in FIRST else MORE + name: value for name, value in row.items()}
        for tracker in self._trackers:
            tracker.scalars(shown, state.step)
        with self.file.open("a", encoding="utf-8") as file:
            stage_scalars = {name: value for name, value in row.items() if not name.startswith(LAYER)}
            file.write(json.dumps({"step": state.step, **stage_scalars}) + "\n")
        self._show(state, report, row)

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {self.stage}: {text}", markup=False, soft_wrap=True)

    def _show(self, state: TrainState, report: StepReport, row: Mapping[str, float]) -> None:
        """Update the progress line; where there is no terminal, print a line from time to time.

        That is at every tenth of the stage, or at every `LINE_EVERY` steps until its number of steps is decided, and
        after `LINE_SECONDS`.
        """
        assert self._progress is not None
        now = monotonic()
        step, steps = state.step, self.steps if state.ending is None else state.ending.last
        self.loss = report.loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * report.loss
        bits = f" bits {row['mean_bits']:.2f}" if "mean_bits" in row else ""
        self._steps += 1
        seconds = (now - self._began) / self._steps  # per step
        self._held_out = row.get("held_out", self._held_out)
        held_out = "" if self._held_out is None else f" held out {self._held_out:.3g}"
        note = f"loss {self.loss:.3g}{held_out}{bits} {report.samples / seconds:.3g} images/s"
        self._progress.update(self._task, completed=step, total=steps, note=note)
        if not self._progress.disable:
            return
        if self.automatic and state.ending is None:
            due, text = step % LINE_EVERY == 0, f"step {step} of at most {steps}, {note}"
        else:
            time_left = timedelta(seconds=round((steps - step) * seconds))
            due = step * 10 // steps > (step - 1) * 10 // steps
            text = f"step {step} of {steps}, {note}, {time_left} left"
        if due or now - self._told >= LINE_SECONDS:
            self._told = now
            self.console.print(f"{self.stage}: {text}")


def log_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write Markdown texts to TensorBoard, by name.

    A folder that has events of its own is left alone, so that a resumed run does not show them twice.
    """
    if not any(folder.glob("events.*")):
        with SummaryWriter(str(folder)) as writer:
            for name, text in texts.items():
                writer.add_text(name, text)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a stage's file, up to the first that is not complete, as a crash may leave the last one."""
    rows: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
