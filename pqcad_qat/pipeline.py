"""The stages of a run in order: the only place where a whole Policy is taken apart.

Not here: how any stage works, nor the report's rows (evaluation/results.py). A finished stage is never repeated: what it made is read back.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pqcad_qat.content_store import kept
from pqcad_qat.deployment.export import export_model
from pqcad_qat.deployment.modules import needs_vnni
from pqcad_qat.deployment.runtime import OVUNet2DModel
from pqcad_qat.deployment.verification import INT8, end_to_end_psnr, execution_precision, layer_parity
from pqcad_qat.diffusion.calibration import CalibrationRecipe, CalibrationSet, calibration_set
from pqcad_qat.diffusion.conditions import (
    GUIDANCE,
    NULL_CLASS,
    ConditionSet,
    Guidance,
    check_guidance,
    chosen_conditions,
    conditioned,
    exported_inputs,
)
from pqcad_qat.diffusion.denoiser import DenoiserInput, DiffusionModel, load_model, predict
from pqcad_qat.diffusion.images import to_uint8
from pqcad_qat.diffusion.sampling import initial_noise, noise_schedule
from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.evaluation.benchmark import (
    XML_FILE,
    convert_float,
    example_inputs,
    nncf_baseline,
    node_profile,
    size_bytes,
)
from pqcad_qat.evaluation.features import load_features
from pqcad_qat.evaluation.fidelity import evaluate_images, evaluate_latents
from pqcad_qat.evaluation.hardware import hardware
from pqcad_qat.evaluation.report import write_report
from pqcad_qat.evaluation.results import RunFacts, curves_of, report_of
from pqcad_qat.evaluation.speed import time_denoisers
from pqcad_qat.evaluation.variant import Variant, openvino_file_variant, openvino_variant, pytorch_variant, sample_states
from pqcad_qat.policy.loading import dump_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import HALF_STEPS, TRAINED, UNTRAINED, made, round_name, stages_of
from pqcad_qat.processes import agreed, is_first, process_count
from pqcad_qat.quantization.conversion import calibrate_ranges, frozen_weights, integer_layers, quantize_model, quantized_layers
from pqcad_qat.quantization.plan import LayerPlan, plan_json, plan_layers, plan_text
from pqcad_qat.quantization.shortcut import split_shortcuts
from pqcad_qat.quantization.student_folder import STEPS, save_quantized
from pqcad_qat.run_folder import RunFolder, open_run, write_atomically
from pqcad_qat.training.bit_schedule import BitScheduleSettings, MomentumBitSchedule, rungs
from pqcad_qat.training.callback import BatchSource, Callback, TrainState, averaged_weights
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.distillation import CalibrationAssistedDistillation, DistillationSet, distillation_batches, distillation_set
from pqcad_qat.training.metrics_log import log_texts, progress_bar
from pqcad_qat.training.quantization_aware import FullPrecisionMatching, calibration_batches
from pqcad_qat.training.quantizer_log import QuantizerLog
from pqcad_qat.training.stage import StageSettings, train_stage
from pqcad_qat.training.trainer import LoopSettings, new_accelerator
from pqcad_qat.training.training_samples import TrainingSamples
from pqcad_qat.training.weight_distance import WeightDistance

RANGE_INPUTS = 512
"""Model inputs of the calibration set that activation ranges are taken from."""

BASELINE_INPUTS = 300
"""Model inputs that NNCF's post-training baseline is calibrated on: its own default."""

CALIBRATION, SHARED = ".calibration", ".shared"
"""Folders beside the runs: what they share."""

UNSAMPLED = ("ov-fp32", "ov-bf16")
"""Timed only: they compute what `fp32` computes."""

PROFILED = ("nncf-int8", "pqcad-openvino")

SHOWN = 4
"""Images of a grid that shows how training goes."""

WEIGHTS, TRANSITIONS = "models/{}.safetensors", "models/{}.json"
"""What a trained stage leaves in a run's folder, beside its log."""

WARNINGS = "warnings.json"
"""What was told while the run trained, kept for the report of the process that ends it."""

PARITY_INPUTS = 64
"""States on which the deployed model is compared end to end with the quantized PyTorch model."""


NO_FEATURES = "none"
"""As evaluation.features: nothing is compared with real images."""

NO_FID = "No FID: evaluation.features is none, so there are figures against full precision only."
OF_LATENTS = (
    " The model makes latents: PSNR is of latents, its peak the range of full precision's, and there is no SSIM; pictures show their first "
    "channels."
)


@dataclass(frozen=True)
class Prepared:
    """A model and its plan, before anything is trained.

    Attributes:
        model: full precision, untouched.
        split: a copy of the denoiser with its shortcuts split, on which the plan stands.
        plan: of every layer that will be quantized.
        conditions: that trajectories and images choose from.
    """

    model: DiffusionModel
    split: nn.Module
    plan: tuple[LayerPlan, ...]
    conditions: ConditionSet = field(default_factory=ConditionSet)


def prepare(policy: Policy) -> Prepared:
    """Load the policy's model and plan its layers; nothing is written.

    Raises:
        ModelError: the model cannot be loaded, or the policy's conditions or guidance do not fit it.
        PlanError: the rules do not fit it.
    """
    model = load_model(policy.model.source)
    conditions = chosen_conditions(conditioned(model), policy.conditions)
    check_guidance(policy.sampler.guidance_scale, conditions)
    split = copy.deepcopy(model.denoiser)
    if policy.quantization.split_shortcuts:
        split_shortcuts(split, model.example)
    plan = plan_layers(split, policy.quantization.layers, policy.progressive.ladder, model.example)
    return Prepared(model, split, plan, conditions)


def _check_features(policy: Policy, model: DiffusionModel) -> None:
    if model.latent and policy.evaluation.features != NO_FEATURES:
        raise ModelError(
            f"evaluation.features: got {policy.evaluation.features!r}; {model.source} makes latents of {model.sample_shape[0]} channels, "
            "which no feature network reads; allowed none: figures against full precision only"
        )


def calibration_recipe(policy: Policy, prepared: Prepared) -> CalibrationRecipe:
    """What the policy's calibration set is recorded by."""
    return CalibrationRecipe(
        model_digest=prepared.model.digest,
        sampler=policy.sampler.name,
        steps=policy.sampler.steps,
        trajectories=policy.calibration.trajectories,
        seed=policy.calibration.seed,
        refinement=policy.calibration.refinement,
        conditions=prepared.conditions.digest,
        guidance_scale=policy.sampler.guidance_scale,
    )


def run(policy: Policy, path: Path, command: str, console: Console, resume: bool = False, shares_training: bool = False) -> Path:
    """Take a policy from its full-precision model to a deployed folder and its report; returns the report's page.

    With `shares_training` a stage that a run beside this one has trained, with all that decides it equal, is taken from there.

    Raises:
        PqcadError: whatever a stage finds wrong; with `resume` the run goes on from there.
    """
    with agreed():
        new_accelerator(policy.training.precision)
        prepared = prepare(policy)
        _check_features(policy, prepared.model)
    with open_run(path, policy, resume) as folder:
        return _Run(policy, prepared, folder, console, shares_training).all_stages(command)


def bit_schedule(policy: Policy, plan: Sequence[LayerPlan], model: nn.Module) -> MomentumBitSchedule:
    """The policy's way down, for a quantized model."""
    progressive = policy.progressive
    settings = BitScheduleSettings(
        momentum=progressive.momentum,
        plateau=progressive.plateau,
        perturbation=progressive.perturbation,
        layers_per_transition=progressive.layers_per_transition,
        deadline=min(round(progressive.deadline * progressive.steps), progressive.steps - 1),  # the last step is made at the targets
        blends=progressive.transition == "blend",
        rungs=rungs(plan),
        fixed=progressive.schedule == "fixed",
    )
    return MomentumBitSchedule(layers=quantized_layers(model), plan=plan, settings=settings)


@dataclass
class _Run:
    """One run: its policy, its folder, and what stages hand on."""

    policy: Policy
    prepared: Prepared
    folder: RunFolder
    console: Console
    shares_training: bool = False

    def __post_init__(self) -> None:
        self.schedule = noise_schedule(self.prepared.model.scheduler_config)
        self.shape = self.prepared.model.sample_shape
        told = self.path / WARNINGS
        self.warnings: list[str] = json.loads(told.read_text(encoding="utf-8")) if told.exists() else []
        self.made = made(self.policy.evaluation.variants)

    @property
    def path(self) -> Path:
        return self.folder.path

    def all_stages(self, command: str) -> Path:
        """The stages that the policy's variants take, in order."""
        stages = stages_of(self.policy.evaluation.variants)
        with agreed() as first:
            if first:
                write_atomically(self.path / "plan.json", json.dumps(plan_json(self.prepared.plan, self.prepared.split), indent=1))
                texts = {"policy": dump_policy(self.policy), "plan": plan_text(self.prepared.plan, self.prepared.split)}
                log_texts(self.path / "logs", {name: indent(text, "    ") for name, text in texts.items()})  # Markdown's plain text
        calibration = self._calibrate()
        models: dict[str, nn.Module] = {}
        if "pq" in stages:
            models["pq"] = self._progressive(calibration)
        if "fixed-bit" in stages:
            models["fixed-bit"] = self._fixed_bit(calibration)
        if "teacher" in stages:
            weights = {"pq-distilled": 0.0, "pqcad": self.policy.distillation.calibration_weight}
            for name in (name for name in weights if name in stages):
                models[name] = self._distill(name, calibration, models["pq"], weights[name])
        if "export" in stages:
            self._export(calibration, models["pqcad"])
        if "baselines" in stages:
            self._baselines(calibration)
        if "benchmark" in stages:
            self._benchmark()
        self._sample(calibration, models)
        self._evaluate()
        return self._report(command)

    # ---- stages ------------------------------------------------------------------------------------------------------------------

    def _calibrate(self) -> CalibrationSet:
        policy, recipe = self.policy, calibration_recipe(self.policy, self.prepared)
        calls = recipe.trajectories * recipe.steps * recipe.refinement
        with self.folder.stage("calibration") as stage, self._bar("calibration", calls) as advance:
            store = self.path.parent / CALIBRATION
            found, folder = calibration_set(
                self.prepared.model, recipe, policy.calibration.batch_size, store, advance, self.prepared.conditions
            )
            if is_first():
                self._link("calibration", folder)
            stage.done(set=folder.name)
        return found

    def _progressive(self, calibration: CalibrationSet) -> nn.Module:
        model = self._quantized(calibration, self.prepared.plan)
        schedule = bit_schedule(self.policy, self.prepared.plan, model)
        callbacks = [
            schedule,
            FullPrecisionMatching(),
            WeightDistance(schedule.layers),
            *self._shown(model, self.policy.sampler.steps, self.policy.sampler.guidance_scale),
        ]
        self._train("pq", model, callbacks, self._training_batches(calibration), self.policy.progressive.steps)
        return model

    def _at_targets(self, calibration: CalibrationSet) -> nn.Module:
        """The model at its target widths, ranges calibrated: where fixed-bit training starts, and the variant `ptq`."""
        return self._quantized(calibration, [replace(layer, ladder=(layer.weights.bits,)) for layer in self.prepared.plan])

    def _fixed_bit(self, calibration: CalibrationSet) -> nn.Module:
        """The control: the same seed, steps and data, at the target widths from the first step."""
        model = self._at_targets(calibration)
        callbacks = [
            FullPrecisionMatching(),
            WeightDistance(quantized_layers(model)),
            *self._shown(model, self.policy.sampler.steps, self.policy.sampler.guidance_scale),
        ]
        self._train("fixed-bit", model, callbacks, self._training_batches(calibration), self.policy.progressive.steps)
        return model

    def _distill(self, name: str, calibration: CalibrationSet, teacher: nn.Module, calibration_weight: float) -> nn.Module:
        """The last round's student; each starts from its teacher and keeps its quantizers, the first teacher is the model of PQ."""
        distillation = self.policy.distillation
        teacher_weight = distillation.teacher_weight or float(calibration_weight == 0)
        scale = self.policy.guidance_scale(name)
        loss = CalibrationAssistedDistillation(teacher_weight, calibration_weight, scale, calibration.unconditional)
        rounds = distillation.rounds
        for number in range(1, rounds + 1):
            stage = name if number == rounds else round_name(name, number)
            targets = self._targets("teacher" if number == 1 else f"teacher-{round_name(name, number - 1)}", calibration, teacher, number)
            student = copy.deepcopy(teacher)
            batches = distillation_batches(targets, self._whole_batch, self.policy.training.seed, calibration.condition)
            callbacks = [loss, *self._shown(student, self.policy.student_steps_by_round[number - 1], scale)]
            self._train(stage, student, callbacks, batches, max(1, distillation.steps // rounds))
            teacher = student
        return teacher

    def _targets(self, name: str, calibration: CalibrationSet, teacher: nn.Module, number: int) -> DistillationSet:
        """What the students of a round learn from; the frozen teacher runs once."""
        policy, steps = self.policy, (self.policy.sampler.steps, *self.policy.student_steps_by_round)
        kept = self.path / "distillation" / f"{name}.safetensors"
        with self.folder.stage(name) as stage:
            if stage.new:
                calls = policy.calibration.trajectories * steps[number - 1]
                scale = policy.guidance_scale("pq" if number == 1 else "pqcad")  # of the teacher
                with self._bar(name, calls) as advance, frozen_weights(teacher.eval()):
                    batch, (taught, learned) = policy.calibration.batch_size, steps[number - 1 : number + 1]
                    found = distillation_set(teacher, calibration, self.schedule, taught, learned, batch, advance, scale)
                kept.parent.mkdir(exist_ok=True)
                save_file(vars(found), kept)
                stage.done()
        return DistillationSet(**load_file(kept))

    def _export(self, calibration: CalibrationSet, student: nn.Module) -> None:
        with self.folder.stage("export") as stage:
            if not stage.new:
                return
            policy, model = self.policy, self.prepared.model
            steps = policy.distillation.student_steps
            scheduler = {**model.scheduler_config, STEPS: steps, **self._guidance()}
            save_quantized(self.path / "student", student, self.prepared.plan, policy.quantization.split_shortcuts, scheduler, steps)
            layers = integer_layers(student)
            conditions = exported_inputs(model.condition_inputs, self.prepared.conditions)
            provenance = {
                "policy": policy.name,
                "model": model.source,
                "model_digest": model.digest,
                "sampler": policy.sampler.name,
                "sampling_steps": steps,
                "full_precision_steps": policy.sampler.steps,
                "training_seed": policy.training.seed,
                **self._guidance(),
            }

            def write(folder: Path, weights: Any) -> None:
                export_model(student, scheduler, layers, self.shape, policy.export.batch_size, weights, folder, provenance, conditions)

            shipped = self.path / "openvino"
            with self.console.status("export: writing and verifying the OpenVINO folder"):
                write(shipped, policy.export.weights)
                write(self.path / "baselines" / "packed", "packed")
                executed = execution_precision(shipped, layers)
                self._refuse_float(executed.precisions)
                inputs = next(calibration.inputs(policy.export.batch_size, policy.export.batch_size))
                parity = layer_parity(shipped, layers, _layer_inputs(student, inputs))
                psnr = self._end_to_end(shipped, student, calibration)
            stage.done(
                precisions=dict(executed.precisions),
                inference_precision=executed.inference_precision,
                needs_vnni=[name for name, layer in layers.items() if needs_vnni(layer)],
                parity={
                    "layers_checked": parity.layers_checked,
                    "layers_exact": parity.layers_exact,
                    "worst_layer": parity.worst_layer,
                    "worst_error": parity.worst_error,
                    "exact": {layer.name: layer.exact for layer in parity.layers},
                },
                end_to_end_psnr=psnr,
                packed_bytes=size_bytes(self.path / "baselines" / "packed"),
            )

    def _guidance(self) -> dict[str, Any]:
        """How the student of a conditional model samples: its guidance, and the label of the other pass where there is one."""
        if not self.prepared.conditions.choices:
            return {}
        scale, null = self.policy.guidance_scale("pqcad"), self.prepared.conditions.null_class
        return {GUIDANCE: scale} | ({} if null is None else {NULL_CLASS: null})

    def _refuse_float(self, precisions: Mapping[str, str]) -> None:
        """A planned layer that left INT8 is an error, unless the policy lists it as an exception."""
        excepted = {layer.name for layer in self.prepared.plan if layer.int8_exception}
        floating = {name: precision for name, precision in precisions.items() if precision not in INT8}
        left = [f"{name} ran in {precision}" for name, precision in floating.items() if name not in excepted]
        if left:
            raise ExportError(
                f"{self.path / 'openvino'}: planned for INT8 but executed in floating point: {', '.join(left)}; "
                "change the rule of these layers, or list them with execution: float"
            )

    @torch.no_grad()
    def _end_to_end(self, folder: Path, student: nn.Module, calibration: CalibrationSet) -> float:
        """PSNR in dB of the deployed predictions against the quantized PyTorch model's, on states of the calibration set."""
        deployed = OVUNet2DModel.from_pretrained(folder)
        ours, theirs = [], []
        with frozen_weights(student.eval()):
            for x, t, condition in calibration.inputs(PARITY_INPUTS, 32):
                theirs.append(predict(student, x, t, condition).numpy())
                ours.append(deployed.predict(x.numpy(), t.numpy(), {name: value.numpy() for name, value in condition.items()}))
        return end_to_end_psnr(np.concatenate(ours), np.concatenate(theirs))

    def _baselines(self, calibration: CalibrationSet) -> None:
        with self.folder.stage("baselines") as stage:
            if not stage.new:
                return
            with self.console.status("baselines: OpenVINO float32, NNCF post-training INT8"):
                self._link(
                    "baselines/plain", kept(self.path.parent / SHARED, self._baseline_recipe(), partial(self._make_baselines, calibration))
                )
            stage.done()

    def _baseline_recipe(self) -> dict[str, Any]:
        """All that decides the baselines' files."""
        versions = {name: version(name) for name in ("nncf", "openvino")}
        calibration = self.folder.finished("calibration") or {}
        return {"baselines": versions, "calibration": calibration["set"], "inputs": BASELINE_INPUTS, "batch": self.policy.export.batch_size}

    def _make_baselines(self, calibration: CalibrationSet, folder: Path) -> None:
        batch, denoiser = self.policy.export.batch_size, self.prepared.model.denoiser
        condition = self.prepared.conditions.of(0, 0, batch)
        plain = convert_float(denoiser, self.shape, batch, folder / "float", self.schedule.train_timesteps, condition)
        inputs = [
            {"sample": x.numpy(), "timestep": t.numpy(), **{name: value.numpy() for name, value in given.items()}}
            for x, t, given in calibration.inputs(BASELINE_INPUTS * batch, batch)
        ]
        nncf_baseline(plain, inputs, folder / "nncf")

    def _openvino_files(self) -> dict[str, Path]:
        """Variant -> what OpenVINO runs, of those that are made."""
        plain = self.path / "baselines" / "plain"
        files = {
            "ov-fp32": plain / "float" / XML_FILE,
            "ov-bf16": plain / "float" / XML_FILE,
            "nncf-int8": plain / "nncf" / XML_FILE,
            "pqcad-openvino": self.path / "openvino",
        }
        return {name: file for name, file in files.items() if name in self.made}

    def _benchmark(self) -> None:
        """Everything is timed in one run, in turns, from the files that ship."""
        with self.folder.stage("benchmark") as stage:
            if not stage.new:
                return
            runs, files = self.policy.export.latency_runs, self._openvino_files()
            batch = self.policy.export.batch_size
            inputs = example_inputs(self.shape, batch, condition=self.prepared.conditions.of(0, 0, batch))
            with self.console.status(f"benchmark: every candidate in turns, {runs} runs each"):
                timings = time_denoisers(self.prepared.model.denoiser, files, inputs, runs)
                profiles = {name: node_profile(files[name], {}, inputs) for name in PROFILED if name in files}
            sizes = {name: size_bytes(file.parent if file.suffix else file) for name, file in files.items()}
            stage.done(
                timings={name: asdict(value) for name, value in timings.items()},
                profiles={name: [asdict(row) for row in rows] for name, rows in profiles.items()},
                sizes={"fp32": 4 * sum(p.numel() for p in self.prepared.model.denoiser.parameters()), **sizes},
                hardware=asdict(hardware()),
            )

    def _sample(self, calibration: CalibrationSet, models: Mapping[str, nn.Module]) -> None:
        """Images of every variant from the same seeds; those that training does not touch are shared by runs side by side."""
        for name in (name for name in self.made if name not in UNSAMPLED):
            with self.folder.stage(f"samples-{name}") as stage:
                if not stage.new:
                    continue
                file = self._images_file(name)
                file.parent.mkdir(exist_ok=True)
                make = partial(self._make_images, name, calibration, models)
                if name in UNTRAINED or (self.shares_training and name in TRAINED):
                    shutil.copyfile(kept(self.path.parent / SHARED, self._samples_recipe(name), make) / file.name, file)
                else:
                    make(file.parent)
                stage.done(steps=self._steps(name))

    def _make_images(self, name: str, calibration: CalibrationSet, models: Mapping[str, nn.Module], folder: Path) -> None:
        variant = self._variant(name, calibration, models)
        count, batch = self.policy.evaluation.images, self.policy.evaluation.batch_size
        with self._bar(f"sample {name}", count * variant.steps) as advance:
            states = sample_states(variant, count, self.policy.evaluation.seed, batch, advance)
        samples = {"latents": states} if self.prepared.model.latent else {"images": to_uint8(states)}
        save_file(samples, folder / self._images_file(name).name)

    def _samples_recipe(self, name: str) -> dict[str, Any]:
        """All that decides the images of a variant."""
        evaluation = self.policy.evaluation
        source: Any = self.prepared.model.digest
        if name == "nncf-int8":
            source = self._baseline_recipe()
        elif name in TRAINED:
            source = self._training_recipe(name)
        decides: dict[str, Any] = {
            "images": evaluation.images,
            "seed": evaluation.seed,
            "batch": evaluation.batch_size,
            "steps": self._steps(name),
        }
        if digest := self.prepared.conditions.digest:
            decides |= {"conditions": digest, "guidance_scale": self.policy.guidance_scale(name)}
        return {"samples": source, "sampler": self.policy.sampler.name, "variant": name, **decides}

    def _steps(self, name: str) -> int:
        return self.policy.distillation.student_steps if name in HALF_STEPS else self.policy.sampler.steps

    def _variant(self, name: str, calibration: CalibrationSet, models: Mapping[str, nn.Module]) -> Variant:
        scale = self.policy.guidance_scale(name)
        return replace(self._sampler(name, calibration, models), conditions=self.prepared.conditions, guidance_scale=scale)

    def _sampler(self, name: str, calibration: CalibrationSet, models: Mapping[str, nn.Module]) -> Variant:
        full, steps = self.prepared.model, self._steps(name)
        match name:
            case "nncf-int8":
                file = self._openvino_files()[name]
                return openvino_file_variant(name, file, full.scheduler_config, steps, self.shape, self.policy.export.batch_size)
            case "pqcad-openvino":
                return openvino_variant(name, self._openvino_files()[name], steps)
            case "fp32" | "fp32-half":
                denoiser = full.denoiser
            case "ptq":
                denoiser = self._at_targets(calibration)
            case _:
                denoiser = models[name]
        return pytorch_variant(name, denoiser, full.scheduler_config, steps, self.shape)

    def _evaluate(self) -> None:
        with self.folder.stage("evaluation") as stage:
            if not stage.new:
                return
            asked, latent = self.policy.evaluation.features, self.prepared.model.latent
            features = None if asked == NO_FEATURES else load_features(asked)
            samples = {name: self._samples(name) for name in self.made if name not in UNSAMPLED}
            full = samples["fp32"]
            with self.console.status("evaluation: FID, PSNR, SSIM"):
                figures = {
                    name: asdict(evaluate_latents(found, full) if latent else evaluate_images(found, full, features))
                    for name, found in samples.items()
                }
            protocol = features and {"features_sha256": features.sha256, "reference": features.reference_name, "features": features.source}
            note = "" if features else NO_FID + (OF_LATENTS if latent else "")
            stage.done(figures=figures, protocol=protocol, note=note, hardware=asdict(hardware()))

    def _report(self, command: str) -> Path:
        with agreed() as first:
            if first:
                self._write_report(command)
        return self.path / "report.html"

    def _write_report(self, command: str) -> None:
        stages = {name: self.folder.finished(name) or {} for name in self.folder.seconds()}
        facts = RunFacts(self.policy, self.prepared.plan, self.prepared.split, stages, self.folder.seconds(), tuple(self.warnings), command)
        shown: list[str] = [name for name in self.made if name not in UNSAMPLED]
        full = self._samples("fp32")
        samples = {name: _pictures(self._samples(name)[:10], full) for name in shown}
        write_report(self.path, report_of(facts), curves_of(self.policy, self.path / "logs"), samples)

    # ---- what stages share -------------------------------------------------------------------------------------------------------

    def _link(self, name: str, folder: Path) -> None:
        """`name` in the run's folder leads to a folder that runs side by side share, and still does when all of them move."""
        link = self.path / name
        if not link.is_symlink():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(os.path.relpath(folder, link.parent))

    def _images_file(self, name: str) -> Path:
        return self.path / "samples" / f"{name}.safetensors"

    def _samples(self, name: str) -> Tensor:
        """A variant's images (uint8), or its latents (float32)."""
        found: Tensor
        (found,) = load_file(self._images_file(name)).values()
        return found

    @property
    def _whole_batch(self) -> int:
        """States that one step of the optimizer learns from: every process adds its batches."""
        training = self.policy.training
        return training.batch_size * training.gradient_accumulation * process_count()

    def _training_batches(self, calibration: CalibrationSet) -> BatchSource:
        return calibration_batches(calibration, self._whole_batch, self.policy.training.seed)

    def _shown(self, model: nn.Module, steps: int, guidance_scale: float) -> list[Callback]:
        """What is logged of a stage whose model samples in so many steps, beside its loss and its schedule; latents are not shown."""
        noise = torch.from_numpy(initial_noise(self.policy.evaluation.seed, 0, SHOWN, self.shape))
        every = 0 if self.prepared.model.latent else self.policy.training.samples_every
        chosen = self.prepared.conditions.of(self.policy.evaluation.seed, 0, SHOWN)
        follow = Guidance(chosen, self.prepared.conditions.unconditional, guidance_scale)
        samples = TrainingSamples(noise, self.schedule, steps, every, follow)
        return [QuantizerLog(quantized_layers(model)), samples]

    def _quantized(self, calibration: CalibrationSet, plan: Sequence[LayerPlan]) -> nn.Module:
        """The full-precision model with quantizers around its weights, ranges from the calibration set."""
        model = quantize_model(copy.deepcopy(self.prepared.split), plan)
        calibrate_ranges(model, calibration.inputs(RANGE_INPUTS, self.policy.calibration.batch_size))
        return model

    def _train(self, name: str, model: nn.Module, callbacks: Sequence[Callback], batches: BatchSource, steps: int) -> None:
        """Train a stage in place, or read back what it left; afterwards the model holds its averaged weights, on the CPU."""
        with self.folder.stage(name, together=True) as stage:
            if stage.new:
                make = partial(self._fit, name, model, callbacks, batches, steps)
                if self.shares_training:
                    trained = kept(self.path.parent / SHARED, self._training_recipe(name), make)
                    shutil.copytree(trained, self.path, dirs_exist_ok=True)
                else:
                    make(self.path)
                stage.done(transitions=json.loads((self.path / TRANSITIONS.format(name)).read_text(encoding="utf-8")))
            model.load_state_dict(load_file(self.path / WEIGHTS.format(name)), strict=True)
            model.cpu()

    def _fit(self, name: str, model: nn.Module, callbacks: Sequence[Callback], batches: BatchSource, steps: int, folder: Path) -> None:
        """Train, and leave in `folder` what a run's folder holds of a trained stage."""
        state = train_stage(model, callbacks, batches, self._stage_settings(name, steps), self.console, self._warn)
        schedules = [callback for callback in callbacks if isinstance(callback, MomentumBitSchedule)]
        transitions = [asdict(transition) for schedule in schedules for transition in schedule.transitions]
        with agreed() as first:
            if first:
                self._keep_trained(name, state, transitions, folder)

    def _keep_trained(self, name: str, state: TrainState, transitions: Sequence[Mapping[str, Any]], folder: Path) -> None:
        (folder / "models").mkdir(exist_ok=True)
        with torch.no_grad(), averaged_weights(state) as model:
            weights = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
        save_file(weights, folder / WEIGHTS.format(name))
        write_atomically(folder / TRANSITIONS.format(name), json.dumps(transitions))
        if folder != self.path:
            (folder / "logs").mkdir()
            shutil.copy2(self.path / "logs" / f"{name}.jsonl", folder / "logs")

    def _training_recipe(self, name: str) -> dict[str, Any]:
        """All that decides the weights of a trained stage, those before it included."""
        policy = self.policy
        whole = policy.model_dump(mode="json")
        indifferent = ("samples_every", *(("checkpoint_every", "keep_checkpoints") if policy.training.on_divergence != "rollback" else ()))
        training = {key: value for key, value in whole["training"].items() if key not in indifferent}
        recipe = {
            "trained": name,
            "calibration": (self.folder.finished("calibration") or {})["set"],
            "quantization": whole["quantization"],
            "training": training,
            "progressive": {"steps": policy.progressive.steps} if name == "fixed-bit" else whole["progressive"],
            "versions": {package: version(package) for package in ("torch", "brevitas")},
        }
        return recipe if name in ("pq", "fixed-bit") else {**recipe, "distillation": whole["distillation"]}

    def _stage_settings(self, name: str, steps: int) -> StageSettings:
        training = self.policy.training
        loop = LoopSettings(
            steps=steps,
            learning_rate=training.learning_rate,
            warmup=min(20, steps // 10),
            ema=training.ema,
            accumulation=training.gradient_accumulation,
            max_grad_norm=training.max_grad_norm,
        )
        checkpoints = CheckpointFolder(self.path / "checkpoints" / name, training.checkpoint_every, training.keep_checkpoints)
        return StageSettings(
            name, loop, training.precision, checkpoints, self.path / "logs", training.on_divergence, training.activation_checkpointing
        )

    def _warn(self, message: str) -> None:
        """Tell it once, also where a process that was killed has told it before."""
        if message in self.warnings:
            return
        self.warnings.append(message)
        write_atomically(self.path / WARNINGS, json.dumps(self.warnings, indent=1))
        self.console.print(f"[yellow]warning:[/] {message}")

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; the yielded function advances it."""
        bar = progress_bar(self.console)
        with bar:
            task = bar.add_task(name, total=total, note="")
            yield lambda count: bar.update(task, advance=count)


def _pictures(samples: Tensor, full: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Samples as pictures in [-1, 1]: images as they are, of latents the first channels, scaled by the range of full precision's."""
    if samples.dtype == torch.uint8:
        return np.asarray(samples.numpy() / np.float32(127.5) - 1, np.float32)
    low, high = full.min(), full.max()
    shown = samples[:, : 3 if samples.shape[1] > 2 else 1]
    return np.asarray(((shown - low) / (high - low) * 2 - 1).clamp(-1, 1), np.float32)


def _layer_inputs(model: nn.Module, inputs: DenoiserInput) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """What every quantized layer reads in one forward pass, by layer."""
    seen: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0].detach().numpy()

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in quantized_layers(model).items()]
    try:
        with torch.no_grad():
            predict(model.eval(), *inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
