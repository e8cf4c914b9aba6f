"""The sections `post_training`, `progressive`, `distillation` and `training` of a policy: how its stages find weights.

Not here: the other sections (schema.py, layer_rules.py, evaluation.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pqcad_qat.policy.sections import Fault, Section
from pqcad_qat.policy.value_types import (
    AutoCount,
    AutoRate,
    Count,
    Ladder,
    Momentum,
    Precision,
    Seed,
    Share,
    Trackers,
    Trainable,
)
from pqcad_qat.policy.variants import FIXED_BIT, PQ, PQ_DISTILLED, PQCAD

AUTO_DEADLINE_STEPS = 200
"""Number of training steps that progressive.deadline is a share of where the stage's own number is not known."""


class PostTrainingPolicy(Section):
    """Post-training quantization: how weights are rounded to their target widths, before anything is trained."""

    rounding: Literal["gptq", "learned", "nearest"] = Field(
        "gptq",
        description="gptq: the weights of an output make up for each other's rounding, by what their layer reads "
        "(GPTQ); learned: block by block it is learned which weights go up and which go down, by what the block "
        "returns (SignRound on blocks), in twice the time or more: level with gptq or ahead of it, far ahead with "
        "4-bit inputs or 3-bit weights; nearest: each weight by itself, as always in layers of 2 bits or without a "
        "learned weight scale",
    )
    states: Count = Field(256, description="states of the calibration set that show what layers read and return")
    passes: Count = Field(
        8,
        description="gptq: calls of the model on these states; each rounds the next layers by what the rounded ones "
        "before them give",
    )
    steps: Count = Field(100, description="learned: steps of 8 states for each block")


class ProgressivePolicy(Section):
    """Progressive quantization: the walk from the ladder's first width to each layer's target."""

    steps: AutoCount = Field(
        "auto",
        description="training steps of the stage; auto: until the loss of held-out states stops improving; "
        f"{FIXED_BIT} takes as many",
    )
    ladder: Ladder = Field(
        (8,),
        description="weight widths in bits, strictly descending, that a layer passes on its way to its target width; "
        "with quantization.quality or quantization.max_size, those that it may get",
    )
    schedule: Literal["momentum", "fixed"] = Field(
        "momentum",
        description="momentum: each layer moves as fast as the bound on the change of its weights allows; fixed: all "
        "layers move evenly until the deadline",
    )
    momentum: Momentum = Field(
        0.9, description="decay per training step of the pace of the transitions, which begins at 0"
    )
    transition: Literal["blend", "jump"] = Field(
        "blend",
        description="blend: the next width's share grows with each training step; jump: a layer changes its width at "
        "once when a blend would be over",
    )
    perturbation: float = Field(
        0.005, gt=0, description="largest relative change of a layer's weights in one training step of a transition"
    )
    deadline: Share = Field(
        0.5,
        description="latest point at which every layer has its target width, as a share of the steps; with steps: "
        f"auto, of {AUTO_DEADLINE_STEPS} steps, and sooner where training.minutes leaves time for few",
    )

    def faults(self) -> Iterator[Fault]:
        if any(low >= high for high, low in zip(self.ladder, self.ladder[1:], strict=False)):
            yield Fault((("ladder",),), str(list(self.ladder)), "widths in strictly descending order")


class DistillationPolicy(Section):
    """Calibration-assisted distillation to fewer sampling steps."""

    steps: AutoCount = Field(
        "auto",
        description="training steps of the stage; auto: until the loss of held-out states stops improving",
    )
    student_steps: Count = Field(10, description="sampling steps of the student; must divide sampler.steps")
    teacher_weight: float = Field(
        0.25, ge=0, description="weight of the loss against the quantized teacher; 0 leaves it out"
    )
    calibration_weight: float = Field(
        1.0, ge=0, description="weight of the loss against the full-precision trajectories; 0: plain distillation"
    )
    guidance: Literal["keep", "distill"] = Field(
        "keep",
        description="for a guided sampler: keep leaves the student both denoiser calls; distill teaches it the guided "
        "prediction in one",
    )

    def faults(self) -> Iterator[Fault]:
        if self.teacher_weight == 0 and self.calibration_weight == 0:
            yield Fault(
                (("calibration_weight",), ("teacher_weight",)), "0", "a number over 0, as teacher_weight is 0 too"
            )


class TrainingPolicy(Section):
    """Settings that all training stages share."""

    batch_size: Count = Field(32, description="states in a batch, at mixed time steps")
    learning_rate: AutoRate = Field(
        "auto",
        description="peak rate of the optimizer; auto: a few are tried for 20 training steps each, or fewer where "
        "there is little time, and the one of the "
        f"lowest held-out loss is taken; {FIXED_BIT} takes the rate of {PQ}, and {PQCAD} that of {PQ_DISTILLED}, where "
        "a run has both",
    )
    max_steps: Count = Field(2000, description="largest number of training steps of a stage whose steps are auto")
    minutes: float | None = Field(
        60.0,
        gt=0,
        description="largest wall time of all training stages together, in minutes, as run --minutes sets it; each "
        "stage whose steps are auto has an equal share of what is left; null: any",
    )
    precision: Precision = Field(
        "fp32", description="arithmetic of the forward and backward pass; quantizers keep float32; fp16 needs a GPU"
    )
    trainable: Trainable = Field(
        "all",
        description="low_rank: an update of low rank for the weights of each quantized layer, in place of the weights "
        "themselves, merged when the stage is over: far less memory; scales: learned ranges alone",
    )
    rank: Count = Field(16, description="rank of the updates of low_rank, at most a layer's own size")
    gradient_accumulation: Count = Field(1, description="batches that each process adds to a training step")
    activation_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass rather than keep them: less memory, more time",
    )
    ema: Momentum = Field(
        0.999, description="decay of the weights' exponential moving average, per step; 0 switches it off"
    )
    seed: Seed = Field(0, description="seed of everything random in training")
    checkpoint_every: Count = Field(100, description="steps between checkpoints")
    keep_checkpoints: Count = Field(
        2, description="number of newest checkpoints that are kept while a stage trains; when it is done, none are"
    )
    trackers: Trackers = Field(
        ("tensorboard",),
        description="where scalars and images go as they come: tensorboard, wandb, mlflow; the last two are installed "
        "by their names",
    )
    samples_every: int = Field(50, ge=0, description="steps between sample grids in TensorBoard; 0 for none")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm above which gradients are scaled down")
    on_divergence: Literal["rollback", "lower_rate", "stop"] = Field(
        "rollback",
        description="rollback: back to the last good checkpoint, at half the learning rate; lower_rate: on from where "
        "it is, at half the rate; both up to 3 times; stop: an error",
    )
