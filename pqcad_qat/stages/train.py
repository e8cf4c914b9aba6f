"""The stages that train, and the calibration set that they learn from: progressive quantization, its fixed-bit control,
and distillation.

Not here: how each of them works (data/, training/), and what all training stages have in common (training_task.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_qat.data.calibration import CalibrationSet, calibration_set
from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.machine.processes import is_first, process_count
from pqcad_qat.machine.progress import counting
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.models.conditions import save_conditions
from pqcad_qat.models.guidance import Guidance
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.training_sections import AUTO_DEADLINE_STEPS, TrainingPolicy
from pqcad_qat.policy.variants import FIXED_BIT, FLOAT_STEPS, PQ, PQCAD, STEP_COSTS, stages_of
from pqcad_qat.quantization.conversion import frozen_weights, quantized_layers, take_weights
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.trained_part import TrainedPart
from pqcad_qat.sampling.precision_by_time import float_steps, in_parts
from pqcad_qat.sampling.trajectory import initial_noise, landing
from pqcad_qat.stages.held_out_images import MeasuredImages, measured_images
from pqcad_qat.stages.post_train import to_train, within_levels
from pqcad_qat.stages.prepared import CALIBRATION, Prepared, calibration_recipe
from pqcad_qat.stages.run_folder import EMBEDDINGS, RunFolder
from pqcad_qat.stages.stage_dependencies import control_is_pq, loss_weights, most_steps
from pqcad_qat.stages.stage_records import CalibrationRecord, FloatStepsRecord, StepCostsRecord, TrainingRecord
from pqcad_qat.stages.step_costs import step_costs, weights_by_time
from pqcad_qat.stages.trained_models import TrainedModels
from pqcad_qat.stages.training_task import TrainingTask, take_over, train
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.callback import Batch, BatchSource, Callback
from pqcad_qat.training.distillation import (
    CalibrationAssistedDistillation,
    DistillationSet,
    distillation_batches,
    distillation_set,
    distillation_states,
)
from pqcad_qat.training.held_out import divided, fixed_states
from pqcad_qat.training.quantization_aware import FullPrecisionMatching, calibration_batches, calibration_states
from pqcad_qat.training.quantizer_log import QuantizerLog
from pqcad_qat.training.stage_end import Ending
from pqcad_qat.training.training_samples import TrainingSamples
from pqcad_qat.training.transition_decision import BitScheduleSettings
from pqcad_qat.training.weight_distance import WeightDistance

SHOWN = 4
"""Number of images in the grid that shows the progress of training."""

_TARGETS = "distillation/teacher.safetensors"


def calibrate(policy: Policy, prepared: Prepared, run: RunFolder, console: Console) -> CalibrationSet:
    """Record the full-precision trajectories that all training learns from, or load them if they lie beside the run."""
    recipe = calibration_recipe(policy, prepared)
    fine = prepared.schedule.finer(prepared.schedule.passing(recipe.steps, recipe.also), recipe.refinement)
    calls = recipe.trajectories * sum(map(len, fine))
    with run.stage("calibration", together=True) as stage, counting(console, "calibration", calls) as advance:
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
            together=True,
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
    models: TrainedModels,
    shares_training: bool,
) -> None:
    """Stage `pq`: train down the ladder to the target widths against the full-precision prediction.

    It begins with the weights of `ptq`, moved onto the levels of the target widths, at the ladder's first widths. Where
    a layer reaches its target, they go back to where they were within their levels.
    """

    def task() -> TrainingTask:
        given, model = to_train(policy, models), models.untrained.at_first_widths()
        within = within_levels(policy, prepared.plan, given)
        take_weights(model, given, within)
        matching = _matching(policy, prepared, run, model, name=PQ, calibration=calibration)
        return replace(matching, given=given, schedule=bit_schedule(policy, prepared.plan, model, within))

    train(policy, run, console, name=PQ, task=task, models=models, shares_training=shares_training)


def fixed_bit(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    calibration: CalibrationSet,
    models: TrainedModels,
    shares_training: bool,
) -> None:
    """Train the fixed-bit control: the same seed, steps and data, at the target widths from the first training step,
    beginning with the model of `ptq`.

    Where `pq` has found its number of steps by itself, the control takes as many, at the same learning rates. Where no
    layer's width changes on the way, as at 8 bits, `pq` is this very training.
    """
    if control_is_pq(policy, prepared):
        take_over(run, console, name=FIXED_BIT, trained=PQ)
        return

    def task() -> TrainingTask:
        model = copy.deepcopy(to_train(policy, models))
        matching = _matching(policy, prepared, run, model, name=FIXED_BIT, calibration=calibration)
        return replace(matching, ending=_ending_of_pq(policy, run))

    train(policy, run, console, name=FIXED_BIT, task=task, models=models, shares_training=shares_training)


def _matching(
    policy: Policy, prepared: Prepared, run: RunFolder, model: nn.Module, *, name: str, calibration: CalibrationSet
) -> TrainingTask:
    """The training of a quantized model against the full-precision prediction."""
    part = TrainedPart.asked(policy.training)
    return TrainingTask(
        name,
        model,
        FullPrecisionMatching(),
        [
            WeightDistance(quantized_layers(model), part.freezes_weights),
            *_shown(policy, prepared, run, model, name=name),
        ],
        *matched_states(policy, calibration, run.read_always(STEP_COSTS, StepCostsRecord).costs),
        _figures(policy, prepared, run, calibration=calibration, variant=name),
    )


def distill(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    name: str,
    calibration: CalibrationSet,
    models: TrainedModels,
    shares_training: bool,
) -> None:
    """Train the student, which starts from its teacher, the model of `pq`, and keeps the teacher's quantizers."""

    def task() -> TrainingTask:
        student = copy.deepcopy(models.of(PQ))
        scale = policy.guidance_scale(name)
        targets = DistillationSet(**load_file(run.path / _TARGETS))
        return TrainingTask(
            name,
            student,
            CalibrationAssistedDistillation(*loss_weights(policy, name), scale, calibration.unconditional),
            _shown(policy, prepared, run, student, name=name),
            *distilled_states(policy, targets, calibration),
            _figures(policy, prepared, run, calibration=calibration, variant=name),
        )

    train(policy, run, console, name=name, task=task, models=models, shares_training=shares_training)


def teach(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    calibration: CalibrationSet,
    models: TrainedModels,
) -> None:
    """Stage `teacher`: the targets that all students learn from; the frozen model of `pq` runs once for all of them.

    Of several processes each makes a part of them.
    """
    name = "teacher"
    with run.stage(name, together=True) as stage:
        if not stage.new:
            return
        teacher, steps = models.of(PQ), policy.sampler.steps
        start = run.read_always(FLOAT_STEPS, FloatStepsRecord).time
        calls = policy.calibration.trajectories * (steps - float_steps(prepared.schedule.walk(steps), start))
        costs = step_costs(policy, prepared, teacher.eval(), variant=PQCAD)
        with counting(console, name, calls) as advance, on_accelerator(teacher), frozen_weights(teacher):
            targets = distillation_set(
                teacher,
                calibration,
                prepared.schedule,
                steps,
                student_steps=policy.distillation.student_steps,
                weights=partial(weights_by_time, costs),
                batch_size=policy.calibration.batch_size,
                advance=advance,
                guidance_scale=policy.guidance_scale(PQ),
                start=start,
                parts_folder=run.unfinished(name),
                stage=name,
                together=True,
            )
        if is_first():
            save_tensors({key: value for key, value in vars(targets).items() if value is not None}, run.path / _TARGETS)
        stage.done()


def bit_schedule(
    policy: Policy, plan: Sequence[LayerPlan], model: nn.Module, within: Mapping[str, Tensor] | None = None
) -> MomentumBitSchedule:
    """Build the policy's bit schedule for a quantized model; `within` is as its attribute."""
    progressive, cap = policy.progressive, policy.training.max_steps
    # the last training step runs at the target widths; in a stage that ends by itself at least half of them do
    if isinstance(progressive.steps, int):
        deadline = min(round(progressive.deadline * progressive.steps), progressive.steps - 1)
    else:
        deadline = min(round(progressive.deadline * AUTO_DEADLINE_STEPS), cap // 2)
    settings = BitScheduleSettings(
        momentum=progressive.momentum,
        perturbation=progressive.perturbation,
        deadline=deadline,
        blends=progressive.transition == "blend",
        fixed=progressive.schedule == "fixed",
    )
    return MomentumBitSchedule(layers=quantized_layers(model), plan=plan, settings=settings, within=within or {})


def whole_batch(training: TrainingPolicy) -> int:
    """Number of states that one optimizer step learns from, over all processes and accumulated batches."""
    return training.batch_size * training.gradient_accumulation * process_count()


def matched_states(
    policy: Policy, calibration: CalibrationSet, costs: Sequence[tuple[float, float]]
) -> tuple[BatchSource, Batch, Batch]:
    """Batches of the trained trajectories, and fixed states of the held-out and of the trained ones.

    States are weighted by the costs of sampling steps, (t, cost).
    """
    weights = weights_by_time(costs, calibration.timesteps)
    trained, held_out = (calibration.of(rows) for rows in divided(len(calibration.states)))
    batches = calibration_batches(trained, whole_batch(policy.training), policy.training.seed, weights)
    measured, compared = (
        calibration_states(part, *fixed_states(len(part.states), len(part.timesteps)), weights=weights)
        for part in (held_out, trained)
    )
    return batches, measured, compared


def distilled_states(
    policy: Policy, targets: DistillationSet, calibration: CalibrationSet
) -> tuple[BatchSource, Batch, Batch]:
    """As `matched_states`, with the students' targets."""
    parts = [(targets.of(rows), calibration.of(rows).condition) for rows in divided(len(targets.states))]
    (trained, condition), _ = parts
    batches = distillation_batches(trained, whole_batch(policy.training), policy.training.seed, condition)
    measured, compared = (
        distillation_states(part, *fixed_states(len(part.states), len(part.timesteps)), condition)
        for part, condition in reversed(parts)
    )
    return batches, measured, compared


def _figures(
    policy: Policy, prepared: Prepared, run: RunFolder, *, calibration: CalibrationSet, variant: str
) -> MeasuredImages:
    """The measure of a variant's held-out images, with the run's float steps."""
    in_float = run.read_always(FLOAT_STEPS, FloatStepsRecord).of(variant)
    return measured_images(policy, prepared, calibration, variant=variant, in_float=in_float)


def _ending_of_pq(policy: Policy, run: RunFolder) -> Ending | None:
    """The end that `pq` has found, for its control; None where the steps are given or the run has no `pq`."""
    if isinstance(policy.progressive.steps, int) or PQ not in stages_of(policy.variants):
        return None
    end = run.read_always(PQ, TrainingRecord).end
    assert end is not None
    assert end.decay_from is not None
    return Ending(end.decay_from, end.steps, "steps")


def _shown(policy: Policy, prepared: Prepared, run: RunFolder, model: nn.Module, *, name: str) -> list[Callback]:
    """Callbacks that log quantizers and sample images of the variant `name`, beside the loss and the schedule.

    A latent model gets no images. Float steps do not change while a model is trained, so they are done here, once. A
    run without images has the callback nevertheless, since a checkpoint has a place for every callback.
    """
    log, every = QuantizerLog(quantized_layers(model)), policy.training.samples_every
    if prepared.model.latent:
        return [log]
    noise = torch.from_numpy(initial_noise(policy.evaluation.seed, 0, SHOWN, prepared.model.sample_shape))
    chosen = prepared.conditions.drawn(policy.evaluation.seed, 0, SHOWN)
    guidance = Guidance(chosen, prepared.conditions.unconditional, policy.guidance_scale(name))
    schedule = prepared.sampled_by(policy, name)
    walk = schedule.walk(policy.sampling_steps(name))
    in_float = run.read_always(FLOAT_STEPS, FloatStepsRecord).of(name)
    first = tuple(step for step in walk if step[0] >= in_float.start) if every else ()
    with torch.no_grad():
        full = guidance.follow(prepared.model.denoiser.eval(), noise.device)
        states = landing(first, in_parts(full, schedule, in_float.parts), noise, schedule)
    last = most_steps(policy, name)
    return [log, TrainingSamples(states, schedule, walk[len(first) :], every, guidance, last)]
