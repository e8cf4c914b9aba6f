"""Which keys of the sections `training` and `post_training` decide what a stage computes, and which matter only under
another key.

Not here: what each stage depends on besides (stages/stage_dependencies.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pqcad_qat.policy.sections import Section
from pqcad_qat.policy.training_sections import PostTrainingPolicy, TrainingPolicy

INDIFFERENT = ("samples_every", "trackers")
"""Keys of `training` that do not affect the weights."""

AFTER_DIVERGENCE = ("checkpoint_every", "keep_checkpoints", "on_divergence")
"""Keys of `training` that matter only for how training continues after a divergence."""

OF_SHORT_TRAINING = ("batch_size", "learning_rate", "precision", "gradient_accumulation", "seed", "max_grad_norm")
"""Keys of `training` that affect a short training before a measurement."""

BUDGET = ("max_steps", "minutes")
"""Keys of `training` that matter only where a stage finds its number of steps by itself."""

SPARING = ("activation_checkpointing",)
"""Keys of `training` that save memory at the cost of time, and give the same weights."""

OF_PART: Mapping[str, tuple[str, ...]] = {"all": (), "scales": ("trainable",), "low_rank": ("trainable", "rank")}
"""`trainable` -> keys of `training` that say what is trained, where that is not all of the model."""

OF_ROUNDING: Mapping[str, tuple[str, ...]] = {
    "nearest": (),
    "gptq": ("states", "passes"),
    "learned": ("states", "steps"),
}
"""`rounding` -> keys of `post_training` that say how."""


def of_training(training: TrainingPolicy, automatic: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that decide what a stage trains, and its circumstances, by dotted key.

    Minutes are a circumstance of a stage that finds its number of steps: what a clock decides is not repeated to the
    last step anyway.
    """
    circumstances = [*AFTER_DIVERGENCE, *SPARING, *(["minutes"] if automatic else [])]
    without = {*INDIFFERENT, *BUDGET, *OF_PART["low_rank"], *circumstances}
    values = [key for key in type(training).model_fields if key not in without]
    values += [*OF_PART[training.trainable], *(["max_steps"] if automatic else [])]
    return _of("training", training, values), _of("training", training, circumstances)


def of_short_training(training: TrainingPolicy) -> dict[str, Any]:
    """The values that decide what a short training before a measurement does, by dotted key."""
    return _of("training", training, (*OF_SHORT_TRAINING, *OF_PART[training.trainable]))


def of_post_training(section: PostTrainingPolicy) -> dict[str, Any]:
    """The values that decide how weights are rounded, by dotted key."""
    return _of("post_training", section, ("rounding", *OF_ROUNDING[section.rounding]))


def _of(name: str, section: Section, keys: Sequence[str]) -> dict[str, Any]:
    values = section.model_dump(mode="json")
    return {f"{name}.{key}": values[key] for key in keys}
