"""One training stage: the loop together with its log, its checkpoints and its watch for trouble.

A stage starts from its newest undamaged checkpoint. If training diverges, the policy decides whether it goes back,
goes on at a lower learning rate, or stops.

Not here: the loop itself (trainer.py), what a divergence is (trouble_watch.py), and which stages exist (stages/,
commands/pretrain.py).
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
from pqcad_qat.policy.value_types import Precision, TrackerName
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.training.callback import BatchSource, Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, latest_checkpoint, load_checkpoint, step_of
from pqcad_qat.training.metrics_log import MetricsLog
from pqcad_qat.training.rollback import Rollback, StageStart, good_checkpoint, read_rollbacks, record_rollback
from pqcad_qat.training.trainer import LoopSettings, fit, new_accelerator, new_state, released
from pqcad_qat.training.trouble_watch import TroubleWatch

TRIES = 3
"""Number of divergences that a stage overcomes.

The learning rate is then an eighth of the policy's. What still diverges has another cause.
"""


@dataclass(frozen=True)
class StageSettings:
    """Settings of a stage, beside its model.

    Attributes:
        name: name of the stage, at the head of its log and of its progress line.
        loop: settings of its training steps.
        precision: arithmetic of the forward and backward pass.
        checkpoints: folder of its checkpoints, and how many are kept.
        logs: folder of TensorBoard's events and of the numbers for the report.
        on_divergence: what follows a divergence. "rollback" goes back to the last good checkpoint and begins no
            transition before the step that diverged, or before half of the stage if that is earlier. "lower_rate" goes
            on from the present step, or after one whose loss or gradient is not finite. Both halve the learning rate,
            at most `TRIES` times. "stop" raises the error.
        activation_checkpointing: whether activations are computed again in the backward pass, for less memory and more
            time.
        trackers: where scalars and images go as they come.
    """

    name: str
    loop: LoopSettings
    precision: Precision
    checkpoints: CheckpointFolder
    logs: Path
    on_divergence: Literal["rollback", "lower_rate", "stop"] = "stop"
    activation_checkpointing: bool = False
    trackers: Sequence[TrackerName] = ("tensorboard",)


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
    """Train a model in place, from its newest undamaged checkpoint or from the start; the state holds its averages.

    Args:
        model: the model to train.
        callbacks: callbacks in the order in which they are called; the log follows and takes their scalars.
        batches: batch source.
        settings: settings of the stage.
        console: where progress is shown.
        warn: function that receives a message for every damaged checkpoint passed over, and for all trouble.

    Raises:
        DivergedError: training diverged, and the policy is to stop or its tries are used up.
        PqcadError: an error of `fit`, or a checkpoint of another model.
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
    """Run the loop to the stage's end, and handle every divergence as the policy says."""
    log = MetricsLog(
        settings.name,
        settings.logs,
        settings.loop.steps,
        console,
        callbacks,
        accelerator.is_main_process,
        automatic=settings.loop.shape == "open",
        trackers=settings.trackers,
    )
    watch = TroubleWatch(settings.name, quantized_layers(state.model), warn)
    everything = [*callbacks, log, watch]
    start = StageStart.copied(state, everything)
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
    """Load the newest undamaged checkpoint, or the stage's start, and apply the recorded rollbacks.

    Every process reads them by itself. The number of rollbacks gives the learning rate, and the last one gives the
    step before which no transition begins.
    """
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
    """The training step before which no transition begins.

    A blend takes at most half of the stage, so one that begins by then still ends in time.
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
    """Record where training goes back to; the first process decides it for all.

    Raises:
        DivergedError: the tries are used up.
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
    """Choose the checkpoint to go back to, warn, and record the rollback."""
    rollbacks = read_rollbacks(settings.checkpoints.path)
    checkpoint = good_checkpoint(settings.checkpoints, watch.good)
    entered = step_of(checkpoint) if checkpoint else 0
    where = f"the checkpoint of step {entered}" if checkpoint else "the start of the stage"
    rate = settings.loop.learning_rate * 0.5 ** (len(rollbacks) + 1)
    first_transition = _held_until(trouble.step, settings)
    warn(
        f"{settings.name}: {trouble}. Gone back to {where}, learning rate {rate:g}, no change of width "
        f"before step {first_transition}"
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
    """Go on at half the learning rate; a step that changed no weight is skipped, since its batch would diverge again.

    Raises:
        DivergedError: the tries are used up.
    """
    if state.setbacks == TRIES:
        raise _used_up(trouble, f"lowered the learning rate {TRIES} times", settings)
    state.setbacks += 1
    rate = settings.loop.learning_rate * 0.5**state.setbacks
    warn(f"{settings.name}: {trouble}. Gone on at the learning rate {rate:g}")
    if not trouble.stepped:
        state.step += 1
    watch.pause_judging(state.step)


def _used_up(trouble: DivergedError, tried: str, settings: StageSettings) -> DivergedError:
    """The error where all tries have failed, with what was tried."""
    rate = settings.loop.learning_rate * 0.5**TRIES
    advice = "set training.learning_rate lower than that"
    return DivergedError(
        trouble.step, f"{settings.name}: {trouble}. Tried: {tried}, down to a learning rate of {rate:g}; {advice}"
    )
