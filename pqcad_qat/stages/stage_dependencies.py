"""One table of what determines each stage of a run: keys of the policy, the model, and earlier stages.

The table tells a resumed run under a changed policy which stages to repeat, and tells runs side by side what they can
share. Not here: how recipes are compared (recipe.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pqcad_qat.data.images import pictures_digest
from pqcad_qat.models.families.family import TEXT_ENCODERS
from pqcad_qat.models.model_folder import DECODERS
from pqcad_qat.policy.deciding_keys import of_post_training, of_short_training, of_training
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import (
    FIXED_BIT,
    FLOAT_STEPS,
    OPENVINO,
    PQ,
    PQ_DISTILLED,
    PQCAD,
    PTQ,
    QUANTIZATION_AWARE,
    STEP_COSTS,
    STUDENTS,
    VARIANTS,
    WIDTHS,
    exporting,
    stages_of,
)
from pqcad_qat.quality.clip_score import clip_digest
from pqcad_qat.quality.feature_network import load_features
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.sampling.trajectory import noise_schedule
from pqcad_qat.serving.deployed_folder import tokenizer_of
from pqcad_qat.stages.asked_widths import widths_measured
from pqcad_qat.stages.float_steps import measured, parts_measured, students_sampled
from pqcad_qat.stages.kept_images import decoder_of
from pqcad_qat.stages.prepared import Prepared, calibration_recipe
from pqcad_qat.stages.recipe import Recipe
from pqcad_qat.stages.trained_files import trained_paths
from pqcad_qat.training.held_out import SHARE

BASELINE_INPUTS = 300
"""Number of model inputs that calibrate NNCF's post-training baseline; it equals NNCF's own default."""

RATE_OF: Mapping[str, str] = {FIXED_BIT: PQ, PQCAD: PQ_DISTILLED}
"""Training stage -> the one whose learning rate it takes, where the run has both and `training.learning_rate` is auto.

Both begin with the same weights at their target widths and learn from the same states, so trials are made once. Two
stages that are compared then differ in what is compared alone.
"""

_CALIBRATION_KEYS = {
    "model_digest": "model",
    "sampler": "sampler.name",
    "steps": "sampler.steps",
    "trajectories": "calibration.trajectories",
    "seed": "calibration.seed",
    "refinement": "calibration.refinement",
    "guidance_scale": "sampler.guidance_scale",
    "also": "distillation.student_steps",
}


def recipes(policy: Policy, prepared: Prepared) -> dict[str, Recipe]:
    """Stage -> recipe, for all stages that the policy's variants need, in the order in which they run."""
    table = _Table(policy, prepared)
    stages = stages_of(policy.variants)
    rows = {"calibration": table.calibration()}
    if FLOAT_STEPS in stages:
        rows[FLOAT_STEPS] = table.float_steps()
    if STEP_COSTS in stages:
        rows[STEP_COSTS] = table.step_costs()
    if table.widths_measured:
        rows[WIDTHS] = table.widths()
    if PTQ in stages:
        rows[PTQ] = table.post_training()
    for name in QUANTIZATION_AWARE:
        if name in stages:
            rows[name] = table.quantization_aware(name)
    for name in STUDENTS:
        if name in stages:
            rows |= table.distilled(name)
    rows |= {exporting(name): table.export(name) for name in policy.deployed}
    for name, stage in (("baselines", table.baselines), ("benchmark", table.benchmark)):
        if name in stages:
            rows[name] = stage()
    rows |= {sampling(name): table.samples(name) for name in sampled(policy)}
    return {**rows, "evaluation": table.evaluation()}


def sampling(variant: str) -> str:
    """Name of the stage that samples a variant."""
    return f"samples-{variant}"


def sampled(policy: Policy) -> tuple[str, ...]:
    """Variants that images are made of."""
    return tuple(name for name in policy.variants if VARIANTS[name].sampled)


def loss_weights(policy: Policy, student: str) -> tuple[float, float]:
    """Return the weights of the teacher's and of the calibration set's term in a student's loss.

    Plain distillation uses the teacher's term alone.
    """
    calibration = policy.distillation.calibration_weight if student == PQCAD else 0.0
    return policy.distillation.teacher_weight or float(calibration == 0), calibration


class _Table:
    """Rows of the table for one policy and model."""

    def __init__(self, policy: Policy, prepared: Prepared) -> None:
        self.policy, self.prepared = policy, prepared
        self.whole = policy.model_dump(mode="json")
        self.stages = stages_of(policy.variants)
        self.widths_measured = (WIDTHS,) if widths_measured(policy) else ()
        self.model = {"model": prepared.model.digest, "conditions": prepared.conditions.digest}

    @cached_property
    def parts(self) -> str:
        """Digest of the pipeline parts that are deployed; empty where there are none."""
        pipeline, parts = self.prepared.pipeline, self.prepared.part_formats
        if pipeline is None or not parts:
            return ""
        return pipeline.digest(*parts, *(tokenizer_of(part) for part in parts if part in TEXT_ENCODERS))

    def section(self, name: str, *without: str) -> dict[str, Any]:
        return {f"{name}.{key}": value for key, value in self.whole[name].items() if key not in without}

    def calibration(self) -> Recipe:
        values = calibration_recipe(self.policy, self.prepared).decides
        return Recipe({_CALIBRATION_KEYS.get(key, key): value for key, value in values.items()})

    def float_steps(self) -> Recipe:
        """Recipe of the number of float steps; only a number that is measured depends on how the model is quantized."""
        policy, schedule = self.policy, self.prepared.schedule
        values: dict[str, Any] = {"sampler.float_steps": policy.sampler.float_steps}
        in_parts, number = parts_measured(policy, schedule), measured(policy, schedule)
        if in_parts:
            values["in_parts"] = True
        if in_parts or number:
            student_steps = policy.distillation.student_steps if students_sampled(policy) else None
            values["distillation.student_steps"] = student_steps
        if not number:
            return Recipe(values, ("calibration",))
        return Recipe({**values, **self.layers(ladders=True)}, ("calibration",), _versions("torch", "brevitas"))

    def step_costs(self) -> Recipe:
        """Recipe of the costs of sampling steps, whose small changes have the direction of the model's rounding."""
        values = {"sampler.steps": self.policy.sampler.steps, **self.layers(ladders=False)}
        return Recipe(values, ("calibration",), _versions("torch", "brevitas"))

    def widths(self) -> Recipe:
        """Recipe of the widths that are measured, after a short training."""
        section = self.policy.quantization
        values = {
            "quantization.quality": section.quality,
            "quantization.max_size": section.max_size,
            "export.weights": self.policy.export.weights,
            **self.layers(ladders=True),
            **of_post_training(self.policy.post_training),
            **of_short_training(self.policy.training),
            "held_out": SHARE,
        }
        costs = (STEP_COSTS,) if STEP_COSTS in self.stages else ()
        return Recipe(values, ("calibration", FLOAT_STEPS, *costs), _versions("torch", "brevitas"))

    def layers(self, ladders: bool) -> dict[str, Any]:
        """Settings of the plan that change the weights; the rule that a layer matched and whether it runs in floating
        point do not.
        """
        without = {"rule", "pattern", "int8_exception", *(() if ladders else ("ladder",))}
        plan = [
            {key: value for key, value in _entry(layer).items() if key not in without} for layer in self.prepared.plan
        ]
        return {
            "quantization.layers": plan,
            **self.section("quantization", "layers", "attention", "quality", "max_size"),
        }

    def training(self, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the `values` and the `circumstances` of a training stage's recipe."""
        values, circumstances = of_training(self.policy.training, training_steps(self.policy, stage) is None)
        return {**values, "held_out": SHARE}, {**circumstances, **_versions("torch", "brevitas")}

    def post_training(self) -> Recipe:
        values = self.layers(ladders=False) | of_post_training(self.policy.post_training)
        return Recipe(values, ("calibration", FLOAT_STEPS, *self.widths_measured), _versions("torch", "brevitas"))

    def quantization_aware(self, name: str) -> Recipe:
        values, circumstances = self.training(name)
        progressive = (
            self.section("progressive") if name == PQ else {"progressive.steps": self.policy.progressive.steps}
        )
        # fixed-bit training takes as many steps as `pq` has found
        follows = name != PQ and training_steps(self.policy, PQ) is None and PQ in self.stages
        after = ("calibration", FLOAT_STEPS, STEP_COSTS, PTQ, *((PQ,) if follows else ()))
        return Recipe({**self.layers(name == PQ), **values, **progressive}, after, circumstances, trained_paths(name))

    def distilled(self, student: str) -> dict[str, Recipe]:
        """Recipes of a student's two stages: the teacher's targets, then training."""
        policy = self.policy
        values, circumstances = self.training(student)
        steps, student_steps = policy.sampler.steps, policy.distillation.student_steps
        schedule = noise_schedule(self.prepared.model.scheduler_config)
        teacher_weight, calibration_weight = loss_weights(policy, student)
        taught = {
            "sampler.steps": steps,
            "distillation.student_steps": student_steps,
            "walk": schedule.student(steps, student_steps).walk(student_steps),
            "distillation.guidance": policy.guidance_scale(PQ),
        }
        learns = {
            **values,
            "distillation.steps": policy.distillation.steps,
            "distillation.student_steps": student_steps,
            "distillation.teacher_weight": teacher_weight,
            "distillation.calibration_weight": calibration_weight,
            "distillation.guidance": policy.guidance_scale(student),
        }
        # without the other student, the trials of the learning rate are of this one's own loss
        earlier = RATE_OF.get(student) if policy.training.learning_rate == "auto" else None
        rate_of = (earlier,) if earlier is not None and earlier in self.stages else ()
        after = ("calibration", FLOAT_STEPS, PQ, "teacher", *rate_of)
        return {
            "teacher": Recipe(taught, ("calibration", FLOAT_STEPS, PQ), _versions("torch", "brevitas")),
            student: Recipe(learns, after, circumstances, trained_paths(student)),
        }

    def export(self, variant: str) -> Recipe:
        """Recipe of the folder that a variant is deployed to."""
        policy, trained = self.policy, VARIANTS[variant].weights_from
        assert trained is not None
        values = {
            "name": policy.name,
            "folder": policy.folder_of(variant),
            "sampling_steps": policy.sampling_steps(variant),
            "guidance": policy.guidance_scale(variant),
            "model.source": self.prepared.model.source,
            "quantization.layers": [_entry(layer) for layer in self.prepared.plan],
            "quantization.attention": policy.quantization.attention,
            **self.section("export", "latency_runs"),
            **self.section("pipeline"),
        }
        if self.parts:
            values["parts"] = self.parts
        return Recipe(
            values, ("calibration", FLOAT_STEPS, trained), _versions("openvino", "nncf", "torch", "diffusers")
        )

    def baselines(self) -> Recipe:
        values = {"inputs": BASELINE_INPUTS, "export.batch_size": self.policy.export.batch_size}
        return Recipe(values, ("calibration",), _versions("nncf", "openvino", "torch"))

    def benchmark(self) -> Recipe:
        stages = stages_of(self.policy.variants)
        timed = [name for name in self.policy.variants if VARIANTS[name].runtime == OPENVINO]
        values = {**self.model, "evaluation.variants": timed, **self.section("export", "weights")}
        return Recipe(
            values,
            (*map(exporting, self.policy.deployed), *(("baselines",) if "baselines" in stages else ())),
            _versions("openvino", "torch"),
        )

    def samples(self, variant: str) -> Recipe:
        """Recipe of a variant's images; the variant's model is either full precision or left by another stage."""
        spec = VARIANTS[variant]
        half = spec.student_steps
        steps = self.policy.distillation.student_steps if half else self.policy.sampler.steps
        schedule = noise_schedule(self.prepared.model.scheduler_config)
        values = {
            "conditions": self.prepared.conditions.digest,
            "sampler.name": schedule.sampler,
            "walk": schedule.student(self.policy.sampler.steps, steps).walk(steps),
            "distillation.student_steps" if half else "sampler.steps": steps,
            "sampler.guidance_scale": self.policy.guidance_scale(variant),
            **self.section("evaluation", "variants", "features", "reference", "clip"),
        }
        if (pipeline := self.prepared.pipeline) is not None and decoder_of(self.prepared.model) is not None:
            values["decoder"] = pipeline.digest(*DECODERS)
            if self.policy.takes_pictures:
                values["decoded"] = "all"
        if spec.weights_from is None:
            values["model"] = self.prepared.model.digest
        earlier = (
            *((FLOAT_STEPS,) if spec.quantized else ()),
            *(() if spec.weights_from is None else (spec.weights_from,)),
        )
        return Recipe(values, earlier, _versions("torch", "openvino"))

    def evaluation(self) -> Recipe:
        shown, source = sampled(self.policy), self.policy.features
        features = None if source is None else load_features(source).sha256
        values = {"evaluation.variants": shown, "evaluation.features": source, "features": features}
        if (pictures := self.policy.evaluation.reference) is not None:
            values |= {"evaluation.reference": Path(pictures).name, "reference": pictures_digest(Path(pictures))}
        if (clip := self.policy.evaluation.clip) is not None:
            values |= {"evaluation.clip": Path(clip).name, "clip": clip_digest(Path(clip))}
        return Recipe(values, tuple(sampling(name) for name in shown), _versions("torch"))


def _versions(*packages: str) -> Mapping[str, str]:
    return {package: version(package) for package in packages}


def training_steps(policy: Policy, stage: str) -> int | None:
    """Number of training steps of a training stage; None where it is `auto`, and the stage finds it."""
    steps = policy.progressive.steps if stage in QUANTIZATION_AWARE else policy.distillation.steps
    return steps if isinstance(steps, int) else None


def control_is_pq(policy: Policy, prepared: Prepared) -> bool:
    """Whether fixed-bit training is the very training of `pq`, as at 8 bits: no layer's width changes on the way."""
    return PQ in stages_of(policy.variants) and all(len(layer.ladder) == 1 for layer in prepared.plan)


def most_steps(policy: Policy, stage: str) -> int:
    """Number of training steps of a training stage, or the largest one that a stage may find."""
    steps = training_steps(policy, stage)
    return policy.training.max_steps if steps is None else steps


def _entry(layer: LayerPlan) -> dict[str, Any]:
    """A layer's plan as recipes have it: without what it does not have, so that runs of before it was known go on."""
    entry = asdict(layer)
    for spec in (entry["weights"], entry["inputs"]):
        if not spec["equalize"]:
            del spec["equalize"]
    return entry
