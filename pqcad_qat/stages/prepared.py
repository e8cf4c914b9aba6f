"""A policy's model and its plan before anything is trained, and the recipe of its calibration set.

Not here: a run's folder (run_folder.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from pqcad_qat.data.calibration import CalibrationRecipe
from pqcad_qat.data.images import picture_files
from pqcad_qat.errors import ModelError, PlanError
from pqcad_qat.export.genai_tokenizers import MISSING, has_openvino_tokenizers
from pqcad_qat.export.int8_attention import masked_attention
from pqcad_qat.export.part_export import PartFormat, chosen_formats, opened_by_genai
from pqcad_qat.export.trial_export import try_training_and_export
from pqcad_qat.models.conditions import ConditionSet, check_choices, check_guidance, chosen_conditions, conditioned
from pqcad_qat.models.denoiser import DiffusionModel, check_time_table, recomputed_activations
from pqcad_qat.models.model_folder import DECODERS, scheduler_file
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.own_model import OwnModel, schedule_notes
from pqcad_qat.models.part_fit import check_decoder, check_text_width, picture_shape
from pqcad_qat.models.pipeline_parts import PipelineParts, pipeline_parts
from pqcad_qat.models.probing import check_predictions, constant_readers, probe_states
from pqcad_qat.models.prompts import read_prompts, too_long_prompts
from pqcad_qat.models.untrained import fixed_inputs, noise_condition, shapes_of, untrained_model
from pqcad_qat.policy.evaluation import EFFICIENTNET_LITE0
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import VARIANTS
from pqcad_qat.quality.clip_score import check_clip
from pqcad_qat.quality.feature_network import check_shape, load_features
from pqcad_qat.quantization.layer_matching import listed
from pqcad_qat.quantization.plan import LayerPlan, plan_with_remarks
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.quantization.shortcuts import rewritable, split_shortcuts
from pqcad_qat.sampling.trajectory import NoiseSchedule, check_sampler, noise_schedule
from pqcad_qat.stages.asked_widths import check_size, measurement_notes

RANGE_INPUTS = 512
"""Number of model inputs from the calibration set that activation ranges are computed on."""

CHOICES = 8
"""Number of random conditions that the states of an untrained model choose from."""

LEAST_PICTURES = 4
"""Smallest number of pictures of a reference: two for each half, so that the halves have a distance."""

CALIBRATION, SHARED = ".calibration", ".shared"
"""Names of the folders beside the runs that hold what they share: calibration sets, and results of stages."""


@dataclass(frozen=True)
class Prepared:
    """A model and its plan before anything is trained.

    Attributes:
        model: full-precision model, unchanged.
        split: denoiser with its shortcuts split, for which the plan is made; it shares the model's Parameters
            elsewhere.
        plan: one entry for every layer that will be quantized.
        conditions: conditions that trajectories and images choose from.
        pipeline: parts of the model's pipeline; None for a denoiser alone.
        part_formats: part name -> format in which it is deployed, for the parts that are deployed.
        remarks: remarks on the user's own module, and of the plan about patterns of its rules.
        prompts: the prompts behind the conditions, in their order; () where they do not come from prompts.
    """

    model: DiffusionModel
    split: nn.Module
    plan: tuple[LayerPlan, ...]
    conditions: ConditionSet = field(default_factory=ConditionSet)
    pipeline: PipelineParts | None = None
    part_formats: Mapping[str, PartFormat] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of the model's pictures, which are decoded from latents where its samples are latents."""
        latent = picture_shape(self.pipeline, self.model.sample_shape) if self.model.latent else None
        return latent or self.model.sample_shape

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise schedule of the teacher and of the full-precision model."""
        return noise_schedule(self.model.scheduler_config)

    def student_schedule(self, policy: Policy) -> NoiseSchedule:
        return self.schedule.student(policy.sampler.steps, policy.distillation.student_steps)

    def sampled_by(self, policy: Policy, variant: str) -> NoiseSchedule:
        """Return the schedule of a variant; variants that take the student's steps, full precision among them, use its
        schedule.
        """
        return self.student_schedule(policy) if VARIANTS[variant].student_steps else self.schedule


def with_own_model(policy: Policy, own: OwnModel | None) -> Policy:
    """Return the policy with the user's own module in place of its model, if such a module is given."""
    if own is None:
        return policy
    return policy.model_copy(update={"model": policy.model.model_copy(update={"source": own.source})})


def prepare(policy: Policy, store: Path | None = None, own: OwnModel | None = None) -> Prepared:
    """Load the policy's model and plan its layers.

    Nothing is written except encoded prompts, into `store` if it is given. `own` is the module that the policy's
    `module:NAME` names.

    Raises:
        ModelError: the model cannot be loaded, or the policy's sampler, conditions, guidance or pipeline parts do not
            fit it.
        PlanError: the rules do not fit the model.
    """
    with located(policy):
        check_compared(policy)
        model = load_model(policy.model.source, policy.model.sample_size, own)
        split, plan, remarks = _planned(policy, model)
        conditions = chosen_conditions(conditioned(model), policy.conditions, store)
        check_guidance(policy.sampler.guidance_scale, conditions)
        pipeline = pipeline_parts(model.folder)
        formats = chosen_formats(pipeline, policy.pipeline.model_dump(), model.source)
        prompts = policy.conditions.prompts
        lines = () if prompts is None else tuple(read_prompts(Path(prompts)))
        return Prepared(model, split, plan, conditions, pipeline, formats, remarks, lines)


def prepare_untrained(policy: Policy) -> Prepared | None:
    """Do the same as `prepare` with random weights and random conditions; return None unless the policy names an
    architecture without weights.

    Raises:
        ModelError, PlanError: as for `prepare`.
    """
    with located(policy):
        check_compared(policy)
        model = untrained_model(policy.model.source, policy.model.sample_size)
        if model is None:
            return None
        conditions = ConditionSet(noise_condition(fixed_inputs(model.condition_inputs), CHOICES))
        split, plan, remarks = _planned(policy, model)
        return Prepared(model, split, plan, conditions, remarks=remarks)


def planned_shapes(
    policy: Policy, own: OwnModel | None = None
) -> tuple[nn.Module, tuple[LayerPlan, ...], tuple[str, ...]]:
    """Return the denoiser on the meta device, the plan that is made for it, and the plan's remarks.

    Only configs are read, also for an architecture that ships with the package. `own` is the module that the policy's
    `module:NAME` names; it is built, and deployed on trial.

    Raises:
        ModelError: the config does not exist, or the policy's sampler or conditions do not fit the model.
        PlanError: the rules do not fit the model.
    """
    with located(policy):
        check_compared(policy)
        model = shapes_of(policy.model.source, policy.model.sample_size, own)
        planned = _planned(policy, model)
        alone = model.own is None and (model.folder is None or not scheduler_file(model.folder).is_file())
        if not alone:  # an architecture without a scheduler cannot be run, and its conditions are random
            check_choices(conditioned(model), policy.conditions, policy.sampler.guidance_scale)
        return planned


def _planned(policy: Policy, model: DiffusionModel) -> tuple[nn.Module, tuple[LayerPlan, ...], tuple[str, ...]]:
    """Make the plan after every check that is possible before training; `plan` and `run` both report these errors."""
    check_features(policy, model)
    check_time_table(model, check_steps(policy, model).train_timesteps)
    pipeline = pipeline_parts(model.folder)
    check_text_width(pipeline, model.condition_inputs)
    formats = chosen_formats(pipeline, policy.pipeline.model_dump(), model.source, weights=False)
    if any(part in formats for part in DECODERS):
        check_decoder(pipeline, model.sample_shape[0])
    with recomputed_activations(model.denoiser, policy.training.activation_checkpointing):
        pass  # the call raises an error if the model cannot recompute activations
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
    plan, remarks = plan_with_remarks(
        split, policy.quantization.layers, policy.progressive.ladder, model.example, constant=constant
    )
    check_size(policy, split, plan)
    if model.own and policy.deployed:
        try_training_and_export(model, split, plan, policy.quantization.attention == "int8")
    notes = schedule_notes(model.source, model.scheduler_config) if model.own else ()
    if pipeline is not None and opened_by_genai(pipeline, formats) and not has_openvino_tokenizers():
        notes = (*notes, MISSING)
    return split, plan, (*notes, *remarks)


def notes_on(policy: Policy, plan: Sequence[LayerPlan], remarks: Sequence[str], folder: Path | None) -> tuple[str, ...]:
    """Remarks on a valid policy that its reader may not expect; `plan` prints them, and `run` does before it begins.

    Args:
        policy, plan: policy and plan that the remarks are about.
        remarks: remarks of the plan itself.
        folder: folder of the model's pipeline if it is available; its tokenizers show which prompts are cut.
    """
    section = policy.conditions
    cut = (
        ()
        if section.prompts is None or folder is None
        else too_long_prompts(Path(section.prompts), folder, section.tokens)
    )
    return (*remarks, *cut, *measurement_notes(policy))


def check_steps(policy: Policy, model: DiffusionModel) -> NoiseSchedule:
    """Return the model's noise schedule after checking the policy's sampler against it.

    Raises:
        ModelError: the schedule has no sampler of the policy's name and numbers of steps, or none from which its
            students can learn.
    """
    schedule, steps = noise_schedule(model.scheduler_config), policy.sampler.steps
    check_sampler(policy.sampler.name, schedule, model.source)
    schedule.walk(steps, "sampler.steps")
    key, count = "distillation.student_steps", policy.distillation.student_steps
    student = schedule.student(steps, count)
    if not any(student.moves(t, s) and student.informative(t) for t, s in student.walk(count, key)):
        raise ModelError(
            f"{key}: got {count}; in so few steps the model is called only where its prediction says nothing; "
            "allowed more"
        )
    return schedule


def check_compared(policy: Policy) -> None:
    """Check that the policy's feature network, reference and CLIP model can be read, before a model is downloaded or
    loaded.

    Raises:
        ModelError: they cannot; a line of the message for each.
    """
    source, reference, faults = policy.features, policy.evaluation.reference, []
    if source is not None:
        try:
            load_features(source)
        except ModelError as error:
            faults.append(f"evaluation.features: {error}")
    elif reference is not None:
        faults.append(
            f"evaluation.reference: got {reference!r} and no feature network to compare pictures; allowed with "
            f"evaluation.features, such as {EFFICIENTNET_LITE0}"
        )
    if source is not None and reference is not None:
        try:
            check_pictures(Path(reference), "evaluation.reference")
        except ModelError as error:
            faults.append(str(error))
    if policy.evaluation.clip is not None:
        try:
            check_clip(Path(policy.evaluation.clip))
        except ModelError as error:
            faults.append(f"evaluation.clip: {error}")
    if faults:
        raise ModelError("\n".join(faults))


def check_features(policy: Policy, model: DiffusionModel) -> None:
    """Check that the policy's feature network reads the pictures that the model makes, and that it makes pictures for a
    CLIP model.

    Raises:
        ModelError: it does not.
    """
    if not policy.takes_pictures:
        return
    shape = picture_shape(pipeline_parts(model.folder), model.sample_shape) if model.latent else model.sample_shape
    if policy.evaluation.clip is not None and shape is None:
        raise ModelError(
            f"evaluation.clip: got {policy.evaluation.clip!r}; {model.source} makes latents, and has no decoder; "
            "allowed null"
        )
    if (source := policy.features) is None:
        return
    if shape is None:
        raise ModelError(
            f"evaluation.features: got {source!r}; {model.source} makes latents of {model.sample_shape[0]} channels, "
            "which no feature network reads, and has no decoder; allowed none: figures against full precision only"
        )
    try:
        check_shape(source, shape)
    except ModelError as error:
        raise ModelError(f"evaluation.features: {error}") from error


def check_pictures(folder: Path, where: str) -> None:
    """Check that a folder holds enough pictures for two halves that can be compared.

    Raises:
        ModelError: it does not; the message begins with `where`, the key or argument.
    """
    try:
        count = len(picture_files(folder)[0])
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if count < LEAST_PICTURES:
        raise ModelError(f"{where}: {folder}: got {count} pictures; allowed at least {LEAST_PICTURES}")


def calibration_recipe(policy: Policy, prepared: Prepared) -> CalibrationRecipe:
    """Recipe by which the policy's calibration set is recorded."""
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
