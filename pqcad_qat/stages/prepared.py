"""A policy's model and its plan, before anything is trained; and the recipe of its calibration set.

Not here: a run's folder (run_folder.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from pqcad_qat.data.calibration import CalibrationRecipe
from pqcad_qat.errors import ModelError, PlanError
from pqcad_qat.export.int8_attention import masked_attention
from pqcad_qat.export.part_export import PartFormat, chosen_formats
from pqcad_qat.export.trial_export import try_training_and_export
from pqcad_qat.models.conditions import ConditionSet, check_choices, check_guidance, chosen_conditions, conditioned
from pqcad_qat.models.denoiser import DiffusionModel, check_time_table, load_model, recomputed_activations
from pqcad_qat.models.model_folder import scheduler_file
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.models.pipeline_parts import VAE, PipelineParts, check_decoder, check_text_width, pipeline_parts
from pqcad_qat.models.probing import check_predictions, constant_readers, probe_states
from pqcad_qat.models.prompts import prompts_cut
from pqcad_qat.models.untrained import fixed_inputs, noise_condition, shapes_of, untrained_model
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import PQ, VARIANTS, stages_of
from pqcad_qat.quality.feature_network import check_shape
from pqcad_qat.quantization.plan import LayerPlan, listed, missing_rungs, plan_layers
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.quantization.shortcuts import rewritable, split_shortcuts
from pqcad_qat.sampling.trajectory import NoiseSchedule, check_sampler, noise_schedule

RANGE_INPUTS = 512
"""Model inputs of the calibration set that activation ranges are taken from."""

CHOICES = 8
"""Conditions of noise that the states of an untrained model choose from."""

CALIBRATION, SHARED = ".calibration", ".shared"
"""Folders beside the runs: what they share."""


@dataclass(frozen=True)
class Prepared:
    """A model and its plan, before anything is trained.

    Attributes:
        model: full precision, untouched.
        split: the denoiser with its shortcuts split, on which the plan stands; all else is around the same Parameters.
        plan: of every layer that will be quantized.
        conditions: that trajectories and images choose from.
        parts: of its pipeline, None where it stands alone.
        part_formats: how they are deployed, of those that are.
    """

    model: DiffusionModel
    split: nn.Module
    plan: tuple[LayerPlan, ...]
    conditions: ConditionSet = field(default_factory=ConditionSet)
    parts: PipelineParts | None = None
    part_formats: Mapping[str, PartFormat] = field(default_factory=dict)

    @property
    def schedule(self) -> NoiseSchedule:
        """The teacher's, and full precision's."""
        return noise_schedule(self.model.scheduler_config)

    def student_schedule(self, policy: Policy) -> NoiseSchedule:
        return self.schedule.student(policy.sampler.steps, policy.distillation.student_steps)

    def sampled_by(self, policy: Policy, variant: str) -> NoiseSchedule:
        """The schedule of a variant; full precision in half the steps makes those of the student."""
        return self.student_schedule(policy) if VARIANTS[variant].student_steps else self.schedule


def with_own_model(policy: Policy, own: OwnModel | None) -> Policy:
    """The policy for a module of the user's own, where one is given in the place of the policy's model."""
    if own is None:
        return policy
    return policy.model_copy(update={"model": policy.model.model_copy(update={"source": own.source})})


def prepare(policy: Policy, store: Path | None = None, own: OwnModel | None = None) -> Prepared:
    """Load the policy's model and plan its layers; nothing is written but encoded prompts into the store, where one is
    given.

    `own` is what the policy's `module:NAME` names.

    Raises:
        ModelError: the model cannot be loaded, or the policy's sampler, conditions, guidance or parts of the pipeline
            do not fit it.
        PlanError: the rules do not fit it.
    """
    with located(policy):
        model = load_model(policy.model.source, policy.model.sample_size, own)
        planned = _planned(policy, model)
        conditions = chosen_conditions(conditioned(model), policy.conditions, store)
        check_guidance(policy.sampler.guidance_scale, conditions)
        parts = pipeline_parts(model.folder)
        formats = chosen_formats(parts, policy.pipeline.model_dump(), model.source)
        return Prepared(model, *planned, conditions, parts, formats)


def prepare_untrained(policy: Policy) -> Prepared | None:
    """As `prepare`, with random weights and conditions of noise, where the policy names an architecture alone; None
    where it does not.

    Raises:
        ModelError, PlanError: as `prepare`.
    """
    with located(policy):
        model = untrained_model(policy.model.source, policy.model.sample_size)
        if model is None:
            return None
        conditions = ConditionSet(noise_condition(fixed_inputs(model.condition_inputs), CHOICES))
        return Prepared(model, *_planned(policy, model), conditions)


def planned_shapes(policy: Policy, own: OwnModel | None = None) -> tuple[nn.Module, tuple[LayerPlan, ...]]:
    """The plan and the denoiser that it stands on, as shapes: configs alone are read, of an architecture that ships
    too.

    `own` is what the policy's `module:NAME` names; it is built, and deployed on trial.

    Raises:
        ModelError: there is no such config, or the policy's sampler or conditions do not fit it.
        PlanError: the rules do not fit it.
    """
    with located(policy):
        model = shapes_of(policy.model.source, policy.model.sample_size, own)
        planned = _planned(policy, model)
        alone = model.own is None and (model.folder is None or not scheduler_file(model.folder).is_file())
        if not alone:  # an architecture is not run, and has conditions of noise
            check_choices(conditioned(model), policy.conditions, policy.sampler.guidance_scale)
        return planned


def _planned(policy: Policy, model: DiffusionModel) -> tuple[nn.Module, tuple[LayerPlan, ...]]:
    """All that can be known of a policy and its model before anything is trained: what cannot work is told here, by
    `plan` and by `run`.
    """
    check_features(policy, model)
    check_time_table(model, check_steps(policy, model).train_timesteps)
    parts = pipeline_parts(model.folder)
    check_text_width(parts, model.condition_inputs)
    if VAE in chosen_formats(parts, policy.pipeline.model_dump(), model.source, weights=False):
        check_decoder(parts, model.sample_shape[0])
    with recomputed_activations(model.denoiser, policy.training.activation_checkpointing):
        pass  # raises where there is none
    if model.own:
        check_predictions(model)
    split = rewritable(model.denoiser, model.source)
    if policy.quantization.split_shortcuts:
        split_shortcuts(split, model.example)
    if policy.quantization.attention == "int8" and (masked := masked_attention(split, model.example)):
        raise PlanError(
            "quantization.attention: got int8; attention under a mask has no INT8 here: "
            f"{listed(masked)}; allowed float"
        )
    constant = constant_readers(split, quantizable_layers(split), probe_states(model)) if model.own else ()
    plan = plan_layers(split, policy.quantization.layers, policy.progressive.ladder, model.example, constant=constant)
    if model.own and "export" in stages_of(policy.evaluation.variants):
        try_training_and_export(model, split, plan, policy.quantization.attention == "int8")
    return split, plan


def notes_on(policy: Policy, plan: Sequence[LayerPlan], folder: Path | None) -> tuple[str, ...]:
    """What is no fault of a policy, and still not what somebody reads in it; told by `plan`, and by `run` before it
    begins.

    Args:
        policy, plan: that are told of.
        folder: of the model's pipeline, where it is at hand: its tokenizers cut long prompts.
    """
    section, walks = policy.conditions, PQ in stages_of(policy.evaluation.variants)
    cut = (
        () if section.prompts is None or folder is None else prompts_cut(Path(section.prompts), folder, section.tokens)
    )
    return (*(missing_rungs(plan, policy.progressive.ladder) if walks else ()), *cut)


def check_steps(policy: Policy, model: DiffusionModel) -> NoiseSchedule:
    """The model's schedule.

    Raises:
        ModelError: it has no sampler of the policy's name and numbers of steps, or none that its students learn by.
    """
    schedule, steps = noise_schedule(model.scheduler_config), policy.sampler.steps
    check_sampler(policy.sampler.name, schedule, model.source)
    schedule.walk(steps, "sampler.steps")
    key, count = "distillation.student_steps", policy.distillation.student_steps
    student = schedule.student(steps, count)
    if not any(student.error_weight(*step) for step in student.walk(count, key)):
        raise ModelError(
            f"{key}: got {count}; in so few steps the model is called only where its prediction says nothing; "
            "allowed more"
        )
    return schedule


def check_features(policy: Policy, model: DiffusionModel) -> None:
    """Raises ModelError where the policy's feature network cannot be read, or does not read what the model makes."""
    source = policy.features
    if source is None:
        return
    if model.latent:
        raise ModelError(
            f"evaluation.features: got {source!r}; {model.source} makes latents of {model.sample_shape[0]} channels, "
            "which no feature network reads; allowed none: figures against full precision only"
        )
    try:
        check_shape(source, model.sample_shape)
    except ModelError as error:
        raise ModelError(f"evaluation.features: {error}") from error


def calibration_recipe(policy: Policy, prepared: Prepared) -> CalibrationRecipe:
    """What the policy's calibration set is recorded by."""
    schedule, steps = noise_schedule(prepared.model.scheduler_config), policy.sampler.steps
    students = (policy.distillation.student_steps,)
    return CalibrationRecipe(
        model_digest=prepared.model.digest,
        sampler=schedule.sampler,
        steps=steps,
        trajectories=policy.calibration.trajectories,
        seed=policy.calibration.seed,
        refinement=policy.calibration.refinement,
        conditions=prepared.conditions.digest,
        guidance_scale=policy.sampler.guidance_scale,
        also=students if schedule.passing(steps, students) != schedule.walk(steps) else (),
    )
