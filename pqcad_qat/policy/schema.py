"""Definition of quantization policies: frozen pydantic models with the purpose, default and bounds of every key, and
the rules between keys.

Not here: pretraining policies (policy/pretraining.py), reading YAML (policy/loading.py), and checks that need the model
(quantization/plan.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pqcad_qat.policy.evaluation import EMBEDDED, NO_FEATURES, EvaluationPolicy
from pqcad_qat.policy.layer_rules import QuantizationPolicy
from pqcad_qat.policy.origins import Location
from pqcad_qat.policy.sections import Fault, PolicyFile, Section, faults_of_names
from pqcad_qat.policy.targets import Targets
from pqcad_qat.policy.training_sections import (
    DistillationPolicy,
    PostTrainingPolicy,
    ProgressivePolicy,
    TrainingPolicy,
)
from pqcad_qat.policy.value_types import (
    Classes,
    Count,
    Deployed,
    FloatSteps,
    Name,
    Seed,
    Side,
    Sides,
    Text,
)
from pqcad_qat.policy.variants import (
    DEPLOYED,
    PQCAD,
    VARIANTS,
    default_variants,
    run_variants,
)


class ModelPolicy(Section):
    """Where the full-precision model comes from."""

    source: Text = Field(
        description="embedded:fashion-mnist, embedded:digits, embedded:noto-emoji, a local folder in diffusers "
        "layout, or a hub id; with --module, module:NAME"
    )
    sample_size: Side | Sides | None = Field(
        None,
        description="height and width of x_t: one number, or [height, width]; the deployed graph takes no other"
        " size; null: the model's own (Flux: 128, for 1024 pixels)",
    )


class ConditionsPolicy(Section):
    """What a conditional model is conditioned on. Each trajectory and each image makes a seeded choice of its own."""

    classes: Classes = Field(
        "all", description="class labels to choose from, for a class-conditional model: all, or a list"
    )
    unconditional_class: Annotated[int, Field(ge=0)] | None = Field(
        None, description="label that stands for no class, for guidance; null: the model's own (DiT has one)"
    )
    embeddings: Text | None = Field(
        None,
        description="safetensors file with a tensor (prompts, ...) for each condition; guidance also needs "
        "a tensor unconditional.NAME (1, ...) for each",
    )
    prompts: Text | None = Field(
        None,
        description="text file with one prompt a line, for a pipeline with text encoders and tokenizers; needs the "
        "extra text: pip install '.[text]'",
    )
    tokens: Count | None = Field(
        None,
        le=512,
        description="number of tokens that prompts are padded or cut to for T5; null: the pipeline's own (SD3 256, Flux"
        " 512, PixArt 120)",
    )
    guidance: float | None = Field(
        None,
        ge=0,
        le=100,
        description="guidance that FLUX.1 dev reads as an input beside its prompts; null: its pipeline's own, 3.5",
    )

    def faults(self) -> Iterator[Fault]:
        if self.embeddings is not None and self.prompts is not None:
            yield Fault((("prompts",), ("embeddings",)), repr(self.prompts), "null, as embeddings is given")
        for key in ("tokens", "guidance"):
            if (value := getattr(self, key)) is not None and self.prompts is None:
                yield Fault(((key,), ("prompts",)), repr(value), "null, as no prompts are given")


class SamplerPolicy(Section):
    """The sampler of the full-precision model and of the quantized teacher."""

    name: Literal["ddim", "euler"] | None = Field(
        None,
        description="deterministic sampler: euler for flow matching, ddim for all other models; null: the one that "
        "fits the model",
    )
    steps: Count = Field(20, le=1000, description="sampling steps of an image, before distillation")
    float_steps: FloatSteps = Field(
        "auto",
        description="number of first steps that full precision computes, since rounding there would change the whole "
        "image; auto: measured before training, and 0 unless the model predicts epsilon; 0 where the student learns "
        "guidance",
    )
    guidance_scale: float = Field(
        1.0,
        ge=1,
        description="scale of classifier-free guidance, which takes two denoiser calls a sampling step; 1: none, one "
        "call",
    )


class CalibrationPolicy(Section):
    """The calibration set: recorded trajectories of the full-precision model."""

    trajectories: Count = Field(
        128,
        description="recorded trajectories, each with every state from noise to image; an eighth of them is held out "
        "of training and measures it",
    )
    seed: Seed = Field(0, description="seed of their noise")
    refinement: Count = Field(
        2,
        le=16,
        description="full-precision steps that are recorded for each step of the sampler; more give finer targets",
    )
    batch_size: Count = Field(
        64, description="trajectories sampled at a time; it changes memory and speed, but no result"
    )


class PipelinePolicy(Section):
    """The parts of a pipeline beside its denoiser, which are exported into the deployed folder with it."""

    vae: Literal["auto", "none", "float", "int8-weights", "int8"] = Field(
        "auto",
        description="decoder of latents (VAE or VQModel): float (float16 on disk), int8-weights, or int8, for a VAE "
        "alone, calibrated on the latents of the calibration set; auto: float if there is a decoder",
    )
    text_encoder: Literal["auto", "none", "float", "int8-weights"] = Field(
        "auto",
        description="text encoders and tokenizers: float (float16 on disk) or int8-weights; auto: int8-weights if "
        "there are any; needs the extra text: pip install '.[text]'",
    )


class ExportPolicy(Section):
    """The deployed folder, and how its speed is measured."""

    batch_size: Count = Field(1, description="fixed batch size of the exported model")
    weights: Literal["int8", "packed"] = Field(
        "int8",
        description="format on disk: int8, for plain OpenVINO; packed, in the fewest of 2, 3, 4 and 8 bits that hold a "
        "layer's weights, for our runtime alone",
    )
    latency_runs: Count = Field(50, description="timed repetitions of each latency measurement")


class Policy(PolicyFile):
    """Everything that decides a run: from a full-precision diffusion model to an INT8 OpenVINO folder."""

    kind: Literal["quantize"] = Field("quantize", description="tells this kind of policy from a pretraining policy")
    name: Name = Field(description="name of the run and of its folder")
    model: ModelPolicy
    deploy: Deployed | None = Field(
        None,
        description=f"what becomes a folder to deploy: one of {', '.join(DEPLOYED)}, or a list, of which the first is "
        f"openvino/ and each other openvino-NAME/; null: {PQCAD}, or what evaluation.variants lists",
    )
    conditions: ConditionsPolicy = ConditionsPolicy()
    sampler: SamplerPolicy = SamplerPolicy()
    calibration: CalibrationPolicy = CalibrationPolicy()
    quantization: QuantizationPolicy
    post_training: PostTrainingPolicy = PostTrainingPolicy()
    progressive: ProgressivePolicy = ProgressivePolicy()
    distillation: DistillationPolicy = DistillationPolicy()
    training: TrainingPolicy = TrainingPolicy()
    evaluation: EvaluationPolicy = EvaluationPolicy()
    export: ExportPolicy = ExportPolicy()
    pipeline: PipelinePolicy = PipelinePolicy()
    targets: Targets = Field(
        {},
        description="targets by name, which the report holds beside the figures and `run --check` by its exit code; "
        "null drops one of the policy below",
    )

    def __hash__(self) -> int:
        return hash((self.name, self.model, self.quantization, self.training, tuple(self.targets.items())))

    @property
    def deployed(self) -> tuple[str, ...]:
        """Variants that are deployed, keys of variants.DEPLOYED: the first one becomes `openvino/`."""
        if self.deploy is not None:
            return self.deploy
        listed, deploys = self.evaluation.variants, {row: name for name, row in DEPLOYED.items()}
        return (PQCAD,) if listed is None else tuple(deploys[row] for row in listed if row in deploys)

    @property
    def variants(self) -> tuple[str, ...]:
        """Variants that a run makes, in the order of its tables."""
        listed, deployed = self.evaluation.variants, self.deployed
        if listed is None:
            return default_variants(deployed)
        return run_variants({*listed, *(DEPLOYED[name] for name in deployed)})

    def folder_of(self, variant: str) -> str:
        """Return the name of a variant's deployed folder in its run's."""
        return "openvino" if variant == self.deployed[0] else f"openvino-{variant}"

    @property
    def features(self) -> str | None:
        """The feature network: the policy's, or else an embedded model's own. None where no distances are computed."""
        source, listed = self.model.source, self.evaluation.features
        if listed is None:
            return source if source.startswith(EMBEDDED) else None
        return None if listed == NO_FEATURES else listed

    @property
    def takes_pictures(self) -> bool:
        """Whether all images are evaluated as pictures, so that latents have to be decoded."""
        return self.features is not None or self.evaluation.clip is not None

    @property
    def learns_guidance(self) -> bool:
        """Whether students learn to do in one denoiser call a step what guidance does in two."""
        distilled = any(VARIANTS[name].distilled for name in self.variants)
        return distilled and self.distillation.guidance == "distill" and self.sampler.guidance_scale != 1.0

    def guidance_scale(self, variant: str) -> float:
        """Return the guidance scale with which a variant samples: 1 where one denoiser call a step is enough."""
        once = self.learns_guidance and VARIANTS[variant].distilled
        return 1.0 if once else self.sampler.guidance_scale

    def sampling_steps(self, variant: str) -> int:
        """Return the number of sampling steps of a variant's images."""
        return self.distillation.student_steps if VARIANTS[variant].student_steps else self.sampler.steps

    def faults(self) -> Iterator[Fault]:
        steps, student = self.sampler.steps, self.distillation.student_steps
        if steps % student:
            keys: tuple[Location, ...] = (("distillation", "student_steps"), ("sampler", "steps"))
            yield Fault(keys, str(student), f"a divisor of sampler.steps ({steps})")
        elif isinstance(float_steps := self.sampler.float_steps, int) and float_steps > steps - steps // student:
            keys = (("sampler", "float_steps"), ("sampler", "steps"), ("distillation", "student_steps"))
            allowed = f"auto or at most {steps - steps // student}, so that the student has a step of its own"
            yield Fault(keys, str(float_steps), allowed)
        if self.learns_guidance and self.sampler.float_steps not in ("auto", 0):
            keys = (("sampler", "float_steps"), ("distillation", "guidance"), ("sampler", "guidance_scale"))
            allowed = "auto or 0, as full precision has not learned guidance in one denoiser call"
            yield Fault(keys, str(self.sampler.float_steps), allowed)
        if (clip := self.evaluation.clip) is not None and self.conditions.prompts is None:
            yield Fault(
                (("evaluation", "clip"), ("conditions", "prompts")), repr(clip), "null, as no prompts are given"
            )
        yield from self._faults_of_deploy()
        yield from faults_of_names("targets", self.targets, "target")
        first = self.progressive.ladder[0]
        for name, rule in self.quantization.layers.items():
            if rule.weights is not None and rule.weights.bits > first:
                keys = (("quantization", "layers", name, "weights", "bits"), ("progressive", "ladder"))
                yield Fault(keys, str(rule.weights.bits), f"at most {first}, the first width of progressive.ladder")

    def _faults_of_deploy(self) -> Iterator[Fault]:
        if self.deploy is None:
            return
        if len(set(self.deploy)) < len(self.deploy):
            yield Fault((("deploy",),), str(list(self.deploy)), "each name once")
        for name, row in DEPLOYED.items():
            if row in (self.evaluation.variants or ()) and name not in self.deploy:
                keys: tuple[Location, ...] = (("evaluation", "variants"), ("deploy",))
                yield Fault(
                    keys, row, f"no deployed variant that deploy does not name ({', '.join(self.deploy)}), or null"
                )
