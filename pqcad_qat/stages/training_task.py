"""What all training stages have in common: training within a budget, and keeping the best weights in the run's folder.

Not here: which stages there are and what they learn (train.py), and the loop (training/).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import agreed
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import TRAINED, stages_of
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.quantization.layer_state import QuantizedLayer, blend_state, read_bits
from pqcad_qat.quantization.trained_part import TrainedPart, changing_state, end_training
from pqcad_qat.report.stage_ends import end_sentence
from pqcad_qat.stages.found_rate import RateTrials, rate_trials
from pqcad_qat.stages.held_out_images import MeasuredImages
from pqcad_qat.stages.run_folder import CHECKPOINTS, RunFolder
from pqcad_qat.stages.stage_dependencies import RATE_OF, most_steps, training_steps
from pqcad_qat.stages.stage_records import TrainingRecord
from pqcad_qat.stages.trained_files import ENDS, TRANSITIONS, WEIGHTS, make_in
from pqcad_qat.stages.trained_models import TrainedModels
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.callback import Batch, BatchSource, Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.held_out import HeldOutLoss, best_weights
from pqcad_qat.training.rate_search import TRIAL_STEPS, best
from pqcad_qat.training.stage_end import Ending, Kept, StageEnd
from pqcad_qat.training.stopping_rule import Budget
from pqcad_qat.training.trainer import LoopSettings
from pqcad_qat.training.training_stage import StageSettings, train_stage
from pqcad_qat.training.transition import Transition

_TRANSITIONS = TypeAdapter(tuple[Transition, ...])
_END = TypeAdapter(StageEnd)

LONGEST_WARM_UP = 20
"""Largest number of training steps over which the learning rate rises."""

ON_THE_WAY = 0.25
"""Largest share of the training steps for which a stage has time that may pass above the target widths.

Steps above them teach next to nothing about them. Where the clock allows few, layers therefore move faster.
"""


@dataclass(frozen=True)
class TrainingTask:
    """Training of one stage.

    Attributes:
        stage: name of the stage.
        model: the model as the stage gets it.
        loss: the callback that gives the loss, of training and of held-out states alike.
        callbacks: all further callbacks.
        batches: batches of the trained trajectories.
        held_out: fixed states of the trajectories that are held out.
        figures: measure of the model's held-out images, which decides which weights are kept.
        trained: as many states of the trajectories that are trained on.
        schedule: the bit schedule, where widths change during the stage.
        ending: end of the stage, where another stage has decided it.
        given: the model at its target widths, where `model` comes down to them; otherwise it is `model` itself.
    """

    stage: str
    model: nn.Module
    loss: Callback
    callbacks: Sequence[Callback]
    batches: BatchSource
    held_out: Batch
    trained: Batch
    figures: MeasuredImages
    schedule: MomentumBitSchedule | None = None
    ending: Ending | None = None
    given: nn.Module | None = None


def train(
    policy: Policy,
    run: RunFolder,
    console: Console,
    *,
    name: str,
    task: Callable[[], TrainingTask],
    models: TrainedModels,
    shares_training: bool,
) -> None:
    """Train the stage `name`, write its weights into the run's folder and keep its model, unless that is done.

    `task` builds the training, which takes a model of its own; it is called where the stage has to be trained.
    """
    with run.stage(name, together=True) as stage:
        if not stage.new:
            return
        fitted: list[nn.Module] = []

        def make(folder: Path) -> None:
            training = task()
            _fit(policy, run, console, training, folder=folder)
            fitted.append(training.model)

        make_in(run, name, make, shared=shares_training)
        transitions = (run.path / TRANSITIONS.format(name)).read_bytes()
        end = (run.path / ENDS.format(name)).read_bytes()
        stage.done(TrainingRecord(_TRANSITIONS.validate_json(transitions, by_name=True), _END.validate_json(end)))
        if fitted:  # not where another run has trained it
            models.keep(name, fitted[0])


def take_over(run: RunFolder, console: Console, *, name: str, trained: str) -> None:
    """Let the stage `name` keep what `trained` has trained, where both train the same model in the same way."""
    with run.stage(name, together=True) as stage:
        if not stage.new:
            return
        record = run.read_always(trained, TrainingRecord)
        end = None if record.end is None else replace(record.end, training_s=0.0)
        with agreed() as first:
            if first:
                console.print(
                    f"{name}: the model of {trained}, for no layer's width changes on the way", highlight=False
                )
                for path in (WEIGHTS, TRANSITIONS, "logs/{}.jsonl"):
                    shutil.copyfile(run.path / path.format(trained), run.path / path.format(name))
                write_file(run.path / ENDS.format(name), json.dumps(None if end is None else asdict(end)))
        stage.done(replace(record, end=end))


def _fit(policy: Policy, run: RunFolder, console: Console, task: TrainingTask, *, folder: Path) -> None:
    """Train, and write into `folder` the files that a run's folder holds for a trained stage."""
    given = task.model if task.given is None else task.given
    held_out = _held_out_loss(policy, run, task)
    rate, hold, found = _learning_rate(policy, run, console, task, given=given, held_out=held_out)
    if task.schedule is not None and found is not None and found.step_s is not None:
        hurry(task.schedule, held_out, found.step_s)
    start = given.state_dict() if given is not task.model else changing_state(given, ())
    callbacks = [*([task.schedule] if task.schedule else []), task.loss, held_out, *task.callbacks]
    settings, warn = _stage_settings(policy, run, task, rate=rate, hold=hold), partial(run.warn, console=console)
    state = train_stage(task.model, callbacks, task.batches, settings, console=console, warn=warn)
    with agreed() as first:
        if first:
            end = replace(
                _stage_end(task, state, start, held_out),
                learning_rate=rate,
                rate_trials=found.trials if found else (),
                trial_steps=hold,
            )
            console.print(Text(end_sentence(task.stage, end)), soft_wrap=True)
            _keep_trained(run, task, end, folder=folder)


def _learning_rate(
    policy: Policy, run: RunFolder, console: Console, task: TrainingTask, *, given: nn.Module, held_out: HeldOutLoss
) -> tuple[float, int, RateTrials | None]:
    """The stage's peak learning rate, the steps for which it holds, and the trials that found it, where it had trials
    of its own.
    """
    if policy.training.learning_rate != "auto":
        return policy.training.learning_rate, TRIAL_STEPS, None
    earlier = RATE_OF.get(task.stage)
    if earlier in stages_of(policy.variants):
        end = run.read_always(earlier, TrainingRecord).end
        if end is not None and end.learning_rate is not None:
            return end.learning_rate, end.trial_steps, None
    file = run.path / CHECKPOINTS / task.stage / "rates.json"
    found = rate_trials(
        policy.training,
        console,
        given,
        task.loss,
        stage=task.stage,
        batches=task.batches,
        held_out=task.held_out,
        file=file,
        stage_s=held_out.budget.seconds,
    )
    held_out.spend(found.seconds)
    return best(found.trials), found.steps, found


def hurry(schedule: MomentumBitSchedule, held_out: HeldOutLoss, step_s: float) -> None:
    """Bring the deadline of a bit schedule forward where the stage has time for few training steps."""
    if held_out.budget.seconds is not None:
        steps = max(0.0, held_out.budget.seconds - held_out.seconds) / step_s
        deadline = min(schedule.settings.deadline, max(1, round(ON_THE_WAY * steps)))
        schedule.settings = replace(schedule.settings, deadline=deadline)


def _reached(layer: QuantizedLayer) -> bool:
    """Tell whether a quantized layer is at its target width."""
    return read_bits(layer)[0] == layer.plan.weights.bits and blend_state(layer) is None


def _held_out_loss(policy: Policy, run: RunFolder, task: TrainingTask) -> HeldOutLoss:
    """The callback that measures the held-out states and, with `steps: auto`, ends the stage."""
    automatic = training_steps(policy, task.stage) is None and task.ending is None
    budget = Budget(_steps_of(policy, task), _seconds_left(policy, run, task.stage) if automatic else None)
    layers = quantized_layers(task.model).values()

    def settled() -> bool:
        return all(map(_reached, layers))

    best_file = run.path / CHECKPOINTS / task.stage / "best.safetensors"
    return HeldOutLoss(task.held_out, [task.loss], budget, automatic, settled, best_file)


def _steps_of(policy: Policy, task: TrainingTask) -> int:
    """Number of training steps of a stage, or the largest one where the stage finds it."""
    return most_steps(policy, task.stage) if task.ending is None else task.ending.last


def _seconds_left(policy: Policy, run: RunFolder, stage: str) -> float | None:
    """Wall time that a stage may take: an equal share of what earlier stages have left to it and to later ones."""
    if policy.training.minutes is None:
        return None
    stages: list[str] = [name for name in TRAINED if name in stages_of(policy.variants)]
    position = stages.index(stage)
    records = [run.read(name, TrainingRecord) for name in stages[:position]]
    spent = sum(record.end.training_s for record in records if record is not None and record.end is not None)
    waiting = [name for name in stages[position:] if training_steps(policy, name) is None]
    return max(0.0, 60 * policy.training.minutes - spent) / len(waiting)


def _stage_end(task: TrainingTask, state: TrainState, start: Mapping[str, Tensor], measures: HeldOutLoss) -> StageEnd:
    """Leave the best weights in the model, and return what the stage came to."""
    seconds = measures.seconds
    task.model.cpu()  # where images are sampled
    choice = best_weights(
        state,
        start,
        [task.loss],
        held_out=task.held_out,
        trained=task.trained,
        figures=task.figures,
        best=measures.best,
    )
    end_training(task.model, state.frozen)
    ending, kept = state.ending, choice.kept
    found = {kind: figures for kind, figures in choice.images.items() if figures is not None}
    return StageEnd(
        steps=state.step,
        cause="steps" if ending is None else ending.cause,
        kept=kept,
        held_out={kind: _finite(choice.held_out.get(kind)) for kind in get_args(Kept)},
        images={kind: _finite(found[kind].psnr) if kind in found else None for kind in get_args(Kept)},
        distances={kind: _finite(found[kind].distance) if kind in found else None for kind in get_args(Kept)},
        trained={"start": _finite(choice.trained["start"]), "kept": _finite(choice.trained[kept])},
        decay_from=None if ending is None else ending.decay_from,
        training_s=seconds,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _keep_trained(run: RunFolder, task: TrainingTask, end: StageEnd, *, folder: Path) -> None:
    name = task.stage
    transitions: Sequence[Transition] = task.schedule.transitions if task.schedule else ()
    weights = {key: value.cpu().contiguous() for key, value in changing_state(task.model, ()).items()}
    save_tensors(weights, folder / WEIGHTS.format(name))
    write_file(folder / TRANSITIONS.format(name), json.dumps([asdict(transition) for transition in transitions]))
    write_file(folder / ENDS.format(name), json.dumps(asdict(end)))
    if folder != run.path:
        (folder / "logs").mkdir()
        shutil.copy2(run.path / "logs" / f"{name}.jsonl", folder / "logs")


def _stage_settings(policy: Policy, run: RunFolder, task: TrainingTask, *, rate: float, hold: int) -> StageSettings:
    training, steps = policy.training, _steps_of(policy, task)
    automatic = training_steps(policy, task.stage) is None
    loop = LoopSettings(
        steps=steps,
        learning_rate=rate,
        warmup=min(LONGEST_WARM_UP, hold, (training.max_steps if automatic else steps) // 10),
        shape="open" if automatic else "cosine",
        ema=training.ema,
        accumulation=training.gradient_accumulation,
        max_grad_norm=training.max_grad_norm,
        ending=task.ending,
        hold=hold,
        part=TrainedPart.asked(training),
    )
    checkpoints = CheckpointFolder(
        run.path / CHECKPOINTS / task.stage, training.checkpoint_every, training.keep_checkpoints
    )
    return StageSettings(
        task.stage,
        loop,
        training.precision,
        checkpoints,
        run.path / "logs",
        training.on_divergence,
        training.activation_checkpointing,
        training.trackers,
    )
