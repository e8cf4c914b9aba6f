"""One stage of training: the loop with its log and its checkpoints, gone on with where they end.

Not here: the loop itself (trainer.py), nor which stages there are (pipeline.py, pretrain.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from torch import nn

from pqcad_qat.training.callback import BatchSource, Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, latest_checkpoint, load_checkpoint
from pqcad_qat.training.metrics_log import MetricsLog
from pqcad_qat.training.trainer import LoopSettings, fit, new_accelerator, new_state


@dataclass(frozen=True)
class StageSettings:
    """What a stage needs beside its model.

    Attributes:
        name: heads its log and its progress line.
        loop: of its steps.
        precision: arithmetic of the forward and backward pass.
        checkpoints: where they lie, and how many are kept.
        logs: folder of TensorBoard's events and of the numbers for the report.
    """

    name: str
    loop: LoopSettings
    precision: Literal["fp32", "bf16", "fp16"]
    checkpoints: CheckpointFolder
    logs: Path


def train_stage(
    model: nn.Module,
    callbacks: Sequence[Callback],
    batches: BatchSource,
    settings: StageSettings,
    console: Console,
    warn: Callable[[str], None] = lambda _: None,
) -> TrainState:
    """Train a model in place from its newest undamaged checkpoint, or from the start; the state holds its averages.

    Args:
        callbacks: asked in this order, before the log, which takes their scalars.
        warn: told of every damaged checkpoint that was passed over.

    Raises:
        PqcadError: whatever `fit` raises, and a checkpoint of another model.
    """
    accelerator = new_accelerator(settings.precision)
    state = new_state(model, settings.loop, accelerator)
    log = MetricsLog(settings.name, settings.logs, settings.loop.steps, console, callbacks, accelerator.is_main_process)
    everything = [*callbacks, log]
    last, complaints = latest_checkpoint(settings.checkpoints.path)
    for complaint in complaints:
        warn(complaint)
    if last is not None:
        load_checkpoint(last, state, everything)
        console.print(f"{settings.name}: going on from step {state.step}")
    log.start_at(state.step)
    with log:
        fit(state, everything, batches, settings.loop, accelerator, settings.checkpoints)
    return state
