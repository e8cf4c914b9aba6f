"""One stage of training: the loop with its log, checkpoints and watch, gone on with where they end, gone back where it
diverged.

Not here: the loop itself (trainer.py), what a divergence is (divergence.py), nor which stages there are (stages/,
pretrain.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from rich.console import Console
from torch import nn

from pqcad_qat.errors import DivergedError
from pqcad_qat.machine.processes import agreed
from pqcad_qat.models.denoiser import recomputed_activations
from pqcad_qat.policy.schema import Precision
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.training.callback import BatchSource, Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, latest_checkpoint, load_checkpoint, step_of
from pqcad_qat.training.divergence import TroubleWatch
from pqcad_qat.training.metrics_log import MetricsLog
from pqcad_qat.training.rollback import Rollback, StageStart, good_checkpoint, read_rollbacks, record_rollback
from pqcad_qat.training.trainer import LoopSettings, fit, new_accelerator, new_state, released

TRIES = 3
"""Divergences that a stage overcomes; the learning rate is an eighth by then, and what still diverges has another
cause.
"""


@dataclass(frozen=True)
class StageSettings:
    """What a stage needs beside its model.

    Attributes:
        name: heads its log and its progress line.
        loop: of its steps.
        precision: arithmetic of the forward and backward pass.
        checkpoints: where they lie, and how many are kept.
        logs: folder of TensorBoard's events and of the numbers for the report.
        on_divergence: "rollback" goes back to the last good checkpoint and holds bit transitions until the step of the
            divergence (no longer than half of the stage), "lower_rate" goes on from where it is, past a step whose loss
            or gradient is not finite; both at half the learning rate, and `TRIES` times at most. "stop" is an error.
        activation_checkpointing: less memory for more time.
    """

    name: str
    loop: LoopSettings
    precision: Precision
    checkpoints: CheckpointFolder
    logs: Path
    on_divergence: Literal["rollback", "lower_rate", "stop"] = "stop"
    activation_checkpointing: bool = False


def _silent(_message: str) -> None: ...


def train_stage(
    model: nn.Module,
    callbacks: Sequence[Callback],
    batches: BatchSource,
    settings: StageSettings,
    *,
    console: Console,
    warn: Callable[[str], None] = _silent,
) -> TrainState:
    """Train a model in place from its newest undamaged checkpoint, or from the start; the state holds its averages.

    Args:
        callbacks: asked in this order, before the log, which takes their scalars.
        warn: told of every damaged checkpoint that was passed over, and of all trouble.

    Raises:
        DivergedError: training diverged, and the policy is to stop or its tries are used up.
        PqcadError: whatever `fit` raises, and a checkpoint of another model.
    """
    accelerator = new_accelerator(settings.precision)
    state = new_state(model, settings.loop, accelerator)
    try:
        with recomputed_activations(model, settings.activation_checkpointing):
            _train(
                state,
                callbacks,
                batches,
                settings,
                console=console,
                warn=warn if accelerator.is_main_process else _silent,
                accelerator=accelerator,
            )
    finally:
        released(state, accelerator)
    return state


def _train(
    state: TrainState,
    callbacks: Sequence[Callback],
    batches: BatchSource,
    settings: StageSettings,
    *,
    console: Console,
    warn: Callable[[str], None],
    accelerator: Accelerator,
) -> None:
    log = MetricsLog(settings.name, settings.logs, settings.loop.steps, console, callbacks, accelerator.is_main_process)
    watch = TroubleWatch(settings.name, quantized_layers(state.model), warn)
    everything = [*callbacks, log, watch]
    start = StageStart.of(state, everything)
    _enter(state, start, everything, settings, console=console, warn=warn)
    while True:
        with agreed():
            log.start_at(state.step)
        try:
            with log:
                fit(
                    state, everything, batches, settings.loop, accelerator=accelerator, checkpoints=settings.checkpoints
                )
            return
        except DivergedError as trouble:
            state.optimizer.zero_grad()
            match settings.on_divergence:
                case "stop":
                    raise
                case "lower_rate":
                    _lower_rate(state, watch, trouble, settings, warn=warn)
                case "rollback":
                    _roll_back(state, watch, trouble, settings, warn=warn)
                    _enter(state, start, everything, settings, console=console, warn=warn)


def _enter(
    state: TrainState,
    start: StageStart,
    callbacks: Sequence[Callback],
    settings: StageSettings,
    *,
    console: Console,
    warn: Callable[[str], None],
) -> None:
    """Put the state where the stage's checkpoints end, under what its rollbacks decided; every process reads them."""
    with agreed():
        last, complaints = latest_checkpoint(settings.checkpoints.path)
        for complaint in complaints:
            warn(complaint)
        if last is not None:
            load_checkpoint(last, state, callbacks)
            console.print(f"{settings.name}: going on from step {state.step}")
        else:
            start.restore(state, callbacks)
        if rollbacks := read_rollbacks(settings.checkpoints.path):
            state.setbacks = len(rollbacks)
            state.held_until = _held_until(rollbacks[-1].step, settings)


def _held_until(diverged: int, settings: StageSettings) -> int:
    """The step before which no transition begins; a blend takes at most half of the stage, so one that begins by then
    ends in time.
    """
    return min(diverged, (settings.loop.steps - 1) // 2)


def _roll_back(
    state: TrainState,
    watch: TroubleWatch,
    trouble: DivergedError,
    settings: StageSettings,
    *,
    warn: Callable[[str], None],
) -> None:
    """Raise DivergedError where the tries are used up; otherwise the first process decides where to go back to, and
    writes it down.
    """
    if state.setbacks == TRIES:
        past = read_rollbacks(settings.checkpoints.path)
        tried = ", ".join(f"from step {rollback.entered} after step {rollback.step}" for rollback in past)
        raise _used_up(trouble, f"gone back {TRIES} times ({tried})", settings)
    with agreed() as first:
        if first:
            _record_way_back(watch, trouble, settings, warn)


def _record_way_back(
    watch: TroubleWatch, trouble: DivergedError, settings: StageSettings, warn: Callable[[str], None]
) -> None:
    rollbacks = read_rollbacks(settings.checkpoints.path)
    checkpoint = good_checkpoint(settings.checkpoints, watch.good)
    entered = step_of(checkpoint) if checkpoint else 0
    where = f"the checkpoint of step {entered}" if checkpoint else "the start of the stage"
    rate, held = settings.loop.learning_rate * 0.5 ** (len(rollbacks) + 1), _held_until(trouble.step, settings)
    warn(
        f"{settings.name}: {trouble}. Gone back to {where}, learning rate {rate:g}, no change of width "
        f"before step {held}"
    )
    record_rollback(settings.checkpoints, [*rollbacks, Rollback(trouble.step, entered, str(trouble))])


def _lower_rate(
    state: TrainState,
    watch: TroubleWatch,
    trouble: DivergedError,
    settings: StageSettings,
    *,
    warn: Callable[[str], None],
) -> None:
    if state.setbacks == TRIES:
        raise _used_up(trouble, f"lowered the learning rate {TRIES} times", settings)
    state.setbacks += 1
    rate = settings.loop.learning_rate * 0.5**state.setbacks
    warn(f"{settings.name}: {trouble}. Gone on at the learning rate {rate:g}")
    if not trouble.stepped:
        state.step += 1
    watch.forgive(state.step)


def _used_up(trouble: DivergedError, tried: str, settings: StageSettings) -> DivergedError:
    rate = settings.loop.learning_rate * 0.5**TRIES
    advice = "set training.learning_rate lower than that"
    return DivergedError(
        trouble.step, f"{settings.name}: {trouble}. Tried: {tried}, down to a learning rate of {rate:g}; {advice}"
    )
