"""A program for test_processes.py: small training stages in two processes, forked by Accelerate; each process reports
its results.

    python two_processes.py FOLDER

leaves FOLDER/RANK.json (scenario -> findings) and FOLDER/RANK.safetensors. Not here: any test, or the command line
under a launcher.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState, debug_launcher
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_stage import Matching, batches, network
from torch import Tensor, nn

from pqcad_qat.errors import PqcadError
from pqcad_qat.machine.content_store import parts_folder, shared_folder
from pqcad_qat.machine.processes import is_first, is_reporter, launched, process_count
from pqcad_qat.machine.tensor_files import gathered, save_tensors
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.callback import Batch, Callback, StepReport, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, checkpoints, step_of
from pqcad_qat.training.held_out import HeldOutLoss
from pqcad_qat.training.rollback import RECORD
from pqcad_qat.training.stopping_rule import Budget
from pqcad_qat.training.trainer import LoopSettings
from pqcad_qat.training.training_stage import StageSettings, train_stage
from pqcad_qat.training.transition_decision import BitScheduleSettings

STEPS, EVERY, MEDDLED = 40, 10, 17
RATE = 1e-3

Meddle = Callable[[TrainState], None]


class Meddling(Callback):
    """Callback that calls a function before or after training step `MEDDLED`."""

    def __init__(self, before: Meddle | None = None, after: Meddle | None = None) -> None:
        self.name, self.before, self.after = "meddling", before, after

    def before_step(self, state: TrainState) -> None:
        if self.before and state.step == MEDDLED:
            self.before(state)

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if self.after and state.step == MEDDLED:
            self.after(state)


class Losses(Callback):
    """Callback that keeps the loss of every training step."""

    def __init__(self) -> None:
        self.name = "losses"
        self.seen: list[float] = []

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self.seen.append(report.loss)


def stage(
    folder: Path,
    floating: bool = False,
    accumulation: int = 1,
    meddling: Meddling | None = None,
    source: Callable[[int], Batch] = batches,
    automatic: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run a stage of progressive quantization, or in floating point, on a network with an unused Parameter; return its
    findings and weights.
    """
    model = floating_network() if floating else network()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    layers, losses = quantized_layers(model), Losses()
    schedule = MomentumBitSchedule(
        layers, [layer.plan for layer in layers.values()], BitScheduleSettings(0.5, 0.01, 30)
    )
    loss = Matching(layers)
    budget = Budget(STEPS * 10, seconds=1e5) if automatic else Budget(STEPS)
    held_out = HeldOutLoss(batches(10**6), [loss], budget, automatic)
    if automatic and launched()[0] == 0:  # each process has a clock of its own; the first one's says that time is up
        held_out.load_state_dict({**held_out.state_dict(), "seconds": 1e6})
    callbacks = [*([] if floating else [schedule]), loss, held_out, losses, meddling or Meddling()]
    shape: Literal["cosine", "open"] = "open" if automatic else "cosine"
    loop = LoopSettings(budget.steps, RATE, shape=shape, ema=0.9, accumulation=accumulation)
    settings = StageSettings(
        "toy", loop, "fp32", CheckpointFolder(folder / "checkpoints", EVERY), folder / "logs", "rollback"
    )
    found: dict[str, Any] = {"error": None}
    told: list[str] = []
    try:
        state = train_stage(model, callbacks, source, settings, console=Console(quiet=True), warn=told.append)
        found["step"] = state.step
        found["ending"] = None if state.ending is None else asdict(state.ending)
        found["held_out"] = held_out.state_dict()["latest"]
        weights = {**model.state_dict(), **{f"ema {name}": value for name, value in (state.ema or {}).items()}}
    except PqcadError as error:
        found |= {"error": type(error).__name__, "message": str(error), "speaks": is_reporter(error)}
        weights = {}
    decided = [asdict(transition) for transition in schedule.transitions]
    found |= {
        "losses": losses.seen,
        "told": told,
        "transitions": decided,
        "kept": [step_of(path) for path in checkpoints(folder / "checkpoints")],
    }
    found["rollbacks"] = (
        json.loads((folder / "checkpoints" / RECORD).read_text()) if (folder / "checkpoints" / RECORD).exists() else []
    )
    return found, {name: value.detach().clone().contiguous() for name, value in weights.items()}


def floating_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))


def failing(rank: int) -> Meddling:
    def fail(_state: TrainState) -> None:
        if launched()[0] == rank:
            raise PqcadError(f"the disk of process {rank} is full")

    return Meddling(after=fail)


def interrupting(rank: int) -> Meddling:
    """Callback by which a termination request reaches one process alone."""

    def terminate(_state: TrainState) -> None:
        if launched()[0] == rank:
            signal.raise_signal(signal.SIGTERM)

    return Meddling(before=terminate)


def drifting(rank: int) -> Meddling:
    def drift(state: TrainState) -> None:
        if launched()[0] == rank:
            with torch.no_grad():
                next(state.model.parameters()).mul_(1.001)

    return Meddling(after=drift)


def broken_once(folder: Path) -> Callable[[int], Batch]:
    """Batch source with a non-finite batch in one process's part alone, until training has rolled back."""

    def source(step: int) -> Batch:
        batch = dict(batches(step))
        if step == MEDDLED and not (folder / "checkpoints" / RECORD).exists():
            batch["target"] = batch["target"].clone()
            batch["target"][1] = torch.nan
        return batch

    return source


def gathering(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A shared folder that both fill: the first attempt fails at a batch of one process, and the next goes on."""
    made: list[int] = []
    errors = []

    def rows(fails_at: int | None) -> Callable[[Path], None]:
        def batch(first: int, count: int) -> dict[str, Tensor]:
            if first == fails_at:
                raise PqcadError("the disk is full")
            made.append(first)
            return {"rows": torch.arange(first, first + count)}

        def make(draft: Path) -> None:
            found = gathered(parts_folder(draft), 9, 2, batch, work="making: rows", together=True)
            if is_first():
                save_tensors(found, draft / "rows.safetensors")

        return make

    for fails_at in (6, None, 0):  # what is there is not made again
        try:
            shared = shared_folder(folder, {"rows": 9}, rows(fails_at), together=True)
        except PqcadError as error:
            errors.append(type(error).__name__)
    return {"made": made, "errors": errors}, load_file(shared / "rows.safetensors")


def scenarios(folder: Path) -> Mapping[str, Callable[[Path], tuple[dict[str, Any], dict[str, Tensor]]]]:
    return {
        "floating": lambda path: stage(path, floating=True),
        "accumulated": lambda path: stage(path, floating=True, accumulation=2),
        "quantized": stage,
        "automatic": lambda path: stage(path, floating=True, automatic=True),
        "rollback": lambda path: stage(path, source=broken_once(path)),
        "interrupted": lambda path: stage(path, meddling=interrupting(1)),
        "resumed": lambda path: stage(path.with_name("interrupted")),
        "first fails": lambda path: stage(path, meddling=failing(0)),
        "second fails": lambda path: stage(path, meddling=failing(1)),
        "gathered": gathering,
        "drift": lambda path: stage(path, meddling=drifting(1)),
    }


def main(folder: str) -> None:
    """Run all scenarios in this process, one of two."""
    torch.set_num_threads(1)
    os.environ["RANK"] = str(PartialState(cpu=True).process_index)  # launchers set it too
    assert process_count() == 2
    found: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    for name, scenario in scenarios(Path(folder)).items():
        found[name], values = scenario(Path(folder) / name)
        weights |= {f"{name}/{key}": value for key, value in values.items()}
    rank = launched()[0]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    save_file(weights, Path(folder) / f"{rank}.safetensors")


if __name__ == "__main__":
    debug_launcher(main, (sys.argv[1],), num_processes=2)
