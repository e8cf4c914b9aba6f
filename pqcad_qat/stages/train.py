"""The stages that train, and the calibration set that they learn from: progressive quantization, its fixed-bit control,
and distillation.

Not here: how each of them works (data/, training/).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet, calibration_set
from pqcad_qat.machine.content_store import shared_folder
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import agreed, is_first, process_count
from pqcad_qat.machine.progress import counting
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.models.conditions import save_conditions
from pqcad_qat.models.guidance import Guidance
from pqcad_qat.policy.schema import Policy, TrainingPolicy
from pqcad_qat.policy.variants import FIXED_BIT, FLOAT_STEPS, PQ
from pqcad_qat.quantization.conversion import frozen_weights, quantized_layers
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.sampling.precision_by_time import float_steps
from pqcad_qat.sampling.trajectory import along, initial_noise
from pqcad_qat.stages.prepared import CALIBRATION, SHARED, Prepared, calibration_recipe
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.run_folder import EMBEDDINGS, RunFolder
from pqcad_qat.stages.stage_dependencies import TRANSITIONS, WEIGHTS, loss_weights
from pqcad_qat.stages.stage_records import CalibrationRecord, FloatStepsRecord, TrainingRecord
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.callback import BatchSource, Callback, TrainState, averaged_weights
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.distillation import (
    CalibrationAssistedDistillation,
    DistillationSet,
    distillation_batches,
    distillation_set,
)
from pqcad_qat.training.quantization_aware import FullPrecisionMatching, calibration_batches
from pqcad_qat.training.quantizer_log import QuantizerLog
from pqcad_qat.training.trainer import LoopSettings
from pqcad_qat.training.training_samples import TrainingSamples
from pqcad_qat.training.training_stage import StageSettings, train_stage
from pqcad_qat.training.transition import Transition
from pqcad_qat.training.transition_decision import BitScheduleSettings, rungs
from pqcad_qat.training.weight_distance import WeightDistance

_TRANSITIONS = TypeAdapter(tuple[Transition, ...])

SHOWN = 4
"""Number of images in the grid that shows the progress of training."""


@dataclass(frozen=True)
class _Task:
    """Training of one stage: its model, callbacks, batches and number of training steps."""

    stage: str
    model: nn.Module
    callbacks: Sequence[Callback]
    batches: BatchSource
    steps: int


def calibrate(policy: Policy, prepared: Prepared, run: RunFolder, console: Console) -> CalibrationSet:
    """Record the full-precision trajectories that all training learns from, or load them if they lie beside the run."""
    recipe = calibration_recipe(policy, prepared)
    fine = prepared.schedule.finer(prepared.schedule.passing(recipe.steps, recipe.also), recipe.refinement)
    calls = recipe.trajectories * sum(map(len, fine))
    with run.stage("calibration") as stage, counting(console, "calibration", calls) as advance:
        if is_first():
            _keep_embeddings(policy, prepared, run, stage.new)
        store = run.path.parent / CALIBRATION
        calibration, folder = calibration_set(
            prepared.model,
            recipe,
            policy.calibration.batch_size,
            store,
            advance=advance,
            conditions=prepared.conditions,
        )
        if is_first():
            run.link("calibration", folder)
        stage.done(CalibrationRecord(folder.name))
    return calibration


def _keep_embeddings(policy: Policy, prepared: Prepared, run: RunFolder, anew: bool) -> None:
    """Store the conditions of a text-conditioned model in the run's own folder, since the files that a policy names may
    move.
    """
    file, section = run.path / EMBEDDINGS, policy.conditions
    if (section.prompts, section.embeddings) != (None, None) and (anew or not file.exists()):
        save_conditions(prepared.conditions, file)


def progressive(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    calibration: CalibrationSet,
    models: QuantizedModels,
    shares_training: bool,
) -> nn.Module:
    """Stage `pq`: train down the ladder to the target widths against the full-precision prediction."""
    model = models.at_first_widths(calibrated=not run.finished(PQ))
    schedule = bit_schedule(policy, prepared.plan, model)
    callbacks = [
        schedule,
        FullPrecisionMatching(),
        WeightDistance(schedule.layers),
        *_shown(policy, prepared, run, model, name=PQ),
    ]
    task = _Task(PQ, model, callbacks, _training_batches(policy, calibration), policy.progressive.steps)
    _train(policy, run, console, task, shares_training=shares_training)
    return model


def fixed_bit(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    calibration: CalibrationSet,
    models: QuantizedModels,
    shares_training: bool,
) -> nn.Module:
    """Train the fixed-bit control: the same seed, steps and data, at the target widths from the first training step."""
    model = models.at_targets(calibrated=not run.finished(FIXED_BIT))
    callbacks = [
        FullPrecisionMatching(),
        WeightDistance(quantized_layers(model)),
        *_shown(policy, prepared, run, model, name=FIXED_BIT),
    ]
    task = _Task(FIXED_BIT, model, callbacks, _training_batches(policy, calibration), policy.progressive.steps)
    _train(policy, run, console, task, shares_training=shares_training)
    return model


def distill(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    name: str,
    calibration: CalibrationSet,
    teacher: nn.Module,
    shares_training: bool,
) -> nn.Module:
    """Train the student, which starts from its teacher, the model of `pq`, and keeps the teacher's quantizers."""
    scale = policy.guidance_scale(name)
    loss = CalibrationAssistedDistillation(*loss_weights(policy, name), scale, calibration.unconditional)
    targets = _targets(policy, prepared, run, console, calibration=calibration, teacher=teacher)
    student = copy.deepcopy(teacher)
    batches = distillation_batches(targets, whole_batch(policy.training), policy.training.seed, calibration.condition)
    callbacks = [loss, *_shown(policy, prepared, run, student, name=name)]
    task = _Task(name, student, callbacks, batches, policy.distillation.steps)
    _train(policy, run, console, task, shares_training=shares_training)
    return student


def _targets(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    calibration: CalibrationSet,
    teacher: nn.Module,
) -> DistillationSet:
    """Targets that all students learn from; the frozen teacher runs once for all of them."""
    name = "teacher"
    steps, student_steps = policy.sampler.steps, policy.distillation.student_steps
    file = run.path / "distillation" / f"{name}.safetensors"
    with run.stage(name) as stage:
        if stage.new:
            scale, start = policy.guidance_scale(PQ), run.read_always(FLOAT_STEPS, FloatStepsRecord).time
            taught = steps - float_steps(prepared.schedule.walk(steps), start)
            calls = policy.calibration.trajectories * taught
            with counting(console, name, calls) as advance, frozen_weights(teacher.eval()):
                batch, batch_folder = policy.calibration.batch_size, run.unfinished(name)
                targets = distillation_set(
                    teacher,
                    calibration,
                    prepared.schedule,
                    steps,
                    student_steps=student_steps,
                    batch_size=batch,
                    advance=advance,
                    guidance_scale=scale,
                    start=start,
                    parts_folder=batch_folder,
                    stage=name,
                )
            save_tensors({key: value for key, value in vars(targets).items() if value is not None}, file)
            stage.done()
    return DistillationSet(**load_file(file))


def bit_schedule(policy: Policy, plan: Sequence[LayerPlan], model: nn.Module) -> MomentumBitSchedule:
    """Build the policy's bit schedule for a quantized model."""
    progressive = policy.progressive
    settings = BitScheduleSettings(
        momentum=progressive.momentum,
        plateau=progressive.plateau,
        perturbation=progressive.perturbation,
        layers_per_transition=progressive.layers_per_transition,
        # the last training step runs at the target widths
        deadline=min(round(progressive.deadline * progressive.steps), progressive.steps - 1),
        blends=progressive.transition == "blend",
        rungs=rungs(plan),
        fixed=progressive.schedule == "fixed",
    )
    return MomentumBitSchedule(layers=quantized_layers(model), plan=plan, settings=settings)


def whole_batch(training: TrainingPolicy) -> int:
    """Number of states that one optimizer step learns from, over all processes and accumulated batches."""
    return training.batch_size * training.gradient_accumulation * process_count()


def _training_batches(policy: Policy, calibration: CalibrationSet) -> BatchSource:
    return calibration_batches(calibration, whole_batch(policy.training), policy.training.seed)


def _shown(policy: Policy, prepared: Prepared, run: RunFolder, model: nn.Module, *, name: str) -> list[Callback]:
    """Callbacks that log quantizers and sample images of the variant `name`, beside the loss and the schedule.

    A latent model gets no images. Float steps do not change while a model is trained, so they are done here, once.
    """
    log = QuantizerLog(quantized_layers(model))
    if prepared.model.latent or not policy.training.samples_every:
        return [log]
    noise = torch.from_numpy(initial_noise(policy.evaluation.seed, 0, SHOWN, prepared.model.sample_shape))
    chosen = prepared.conditions.drawn(policy.evaluation.seed, 0, SHOWN)
    guidance = Guidance(chosen, prepared.conditions.unconditional, policy.guidance_scale(name))
    schedule = prepared.sampled_by(policy, name)
    walk = schedule.walk(policy.sampling_steps(name))
    in_float = float_steps(walk, run.read_always(FLOAT_STEPS, FloatStepsRecord).time)
    states = noise
    with torch.no_grad():
        follow = guidance.follow(prepared.model.denoiser.eval(), noise.device)
        for step in along(walk[:in_float], follow, noise, schedule):
            states = step.x_s
    return [log, TrainingSamples(states, schedule, walk[in_float:], policy.training.samples_every, guidance)]


def _train(policy: Policy, run: RunFolder, console: Console, task: _Task, *, shares_training: bool) -> None:
    """Train a stage in place, or read back its results; afterwards the model holds its averaged weights, on the CPU."""
    with run.stage(task.stage, together=True) as stage:
        if stage.new:

            def make(folder: Path) -> None:
                _fit(policy, run, console, task, folder=folder)

            if shares_training:
                trained = shared_folder(run.path.parent / SHARED, run.decides(task.stage), make)
                shutil.copytree(trained, run.path, dirs_exist_ok=True)
            else:
                make(run.path)
            transitions = (run.path / TRANSITIONS.format(task.stage)).read_bytes()
            stage.done(TrainingRecord(_TRANSITIONS.validate_json(transitions, by_name=True)))
        task.model.load_state_dict(load_file(run.path / WEIGHTS.format(task.stage)), strict=True)
        task.model.cpu()


def _fit(policy: Policy, run: RunFolder, console: Console, task: _Task, *, folder: Path) -> None:
    """Train, and write into `folder` the files that a run's folder holds for a trained stage."""
    settings, warn = _stage_settings(policy, run, task.stage, task.steps), partial(run.warn, console=console)
    state = train_stage(task.model, task.callbacks, task.batches, settings, console=console, warn=warn)
    schedules = [callback for callback in task.callbacks if isinstance(callback, MomentumBitSchedule)]
    transitions = [transition for schedule in schedules for transition in schedule.transitions]
    with agreed() as first:
        if first:
            _keep_trained(run, task.stage, state, transitions, folder=folder)


def _keep_trained(
    run: RunFolder, name: str, state: TrainState, transitions: Sequence[Transition], *, folder: Path
) -> None:
    with torch.no_grad(), averaged_weights(state) as model:
        weights = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    save_tensors(weights, folder / WEIGHTS.format(name))
    write_file(folder / TRANSITIONS.format(name), json.dumps([asdict(transition) for transition in transitions]))
    if folder != run.path:
        (folder / "logs").mkdir()
        shutil.copy2(run.path / "logs" / f"{name}.jsonl", folder / "logs")


def _stage_settings(policy: Policy, run: RunFolder, name: str, steps: int) -> StageSettings:
    training = policy.training
    loop = LoopSettings(
        steps=steps,
        learning_rate=training.learning_rate,
        warmup=min(20, steps // 10),
        ema=training.ema,
        accumulation=training.gradient_accumulation,
        max_grad_norm=training.max_grad_norm,
    )
    checkpoints = CheckpointFolder(
        run.path / "checkpoints" / name, training.checkpoint_every, training.keep_checkpoints
    )
    return StageSettings(
        name,
        loop,
        training.precision,
        checkpoints,
        run.path / "logs",
        training.on_divergence,
        training.activation_checkpointing,
    )
