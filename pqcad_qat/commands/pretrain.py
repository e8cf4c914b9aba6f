"""The command `pretrain`: train a full-precision model from a policy of kind `pretrain`, and write it as a diffusers
folder with its provenance.

Not here: the loss and the batches (training/pretraining.py), or the loop (training/trainer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from pqcad_qat.data.images import ImageSet, load_images
from pqcad_qat.errors import PolicyError
from pqcad_qat.machine.files import write_json
from pqcad_qat.machine.processes import agreed, is_first, process_count
from pqcad_qat.models.conditions import ConditionSet, class_conditions, conditioned
from pqcad_qat.models.config_values import class_of
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.families.unet import FAMILY
from pqcad_qat.models.model_loading import save_model
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.variants import REFERENCE
from pqcad_qat.report.grid import save_grid
from pqcad_qat.sampling.ddpm_schedule import ddpm_schedule
from pqcad_qat.stages.open_run import open_run
from pqcad_qat.stages.recipe import Recipe
from pqcad_qat.stages.samplers import DEFAULT_STEPS, pytorch_variant, sample_images
from pqcad_qat.training.callback import Callback, StepReport, TrainState, averaged_weights
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.pretraining import ClassLabels, DenoisingLoss, noisy_batches
from pqcad_qat.training.trainer import LoopSettings, new_accelerator
from pqcad_qat.training.training_stage import StageSettings, train_stage

STAGE = "pretrain"
"""Name of the run's only stage. It is never marked as done, since its last checkpoint shows that."""

SAMPLES = 64
"""Number of images in a sample grid."""


def pretrain(policy: PretrainPolicy, path: Path, console: Console, resume: bool = False) -> Path:
    """Train a denoiser on real images; return the folder `model/` in diffusers layout.

    Raises:
        PqcadError: the data do not exist, diffusers refuses the model config, or the run cannot be resumed.
    """
    data, training = policy.data, policy.training
    with located(policy), agreed():
        new_accelerator(training.precision)
        images = load_images(data.source, data.path, data.size)
        torch.manual_seed(training.seed)  # determines the initial weights
        model = _build(policy.model, channels=images.images.shape[1])
        classes = _classes(policy, images)
        _check_runs(model, images.images.shape[1])
    scheduler = _scheduler(policy)
    recipes = {STAGE: _recipe(policy, images)}
    with open_run(path, policy, resume, recipes, console=console) as folder, folder.stage(STAGE, together=True):
        loop = LoopSettings(
            steps=training.steps,
            learning_rate=training.learning_rate,
            warmup=training.warmup,
            ema=training.ema,
            max_grad_norm=training.max_grad_norm,
        )
        checkpoints = CheckpointFolder(path / "checkpoints", training.checkpoint_every, training.keep_checkpoints)
        settings = StageSettings(STAGE, loop, training.precision, checkpoints, path / "logs")
        conditions = _conditions(model, classes)
        callbacks = [DenoisingLoss(), SampleGrids(path / "samples", scheduler, training.sample_every, conditions)]
        batches = noisy_batches(
            images, ddpm_schedule(scheduler), training.batch_size * process_count(), training.seed, classes=classes
        )

        def warn(fault: str) -> None:
            console.print(Text.assemble(("warning:", "yellow"), f" {fault}"))

        state = train_stage(model, callbacks, batches, settings, console=console, warn=warn)
        with agreed() as first, averaged_weights(state):
            if first:
                save_model(model, scheduler, path / "model")
                write_json(path / "model" / "provenance.json", provenance(policy, images))
    return path / "model"


def _recipe(policy: PretrainPolicy, images: ImageSet) -> Recipe:
    """Recipe of the stage: everything that determines the weights."""
    whole = policy.model_dump(mode="json")
    training = whole["training"]
    rare = {f"training.{key}": training.pop(key) for key in ("checkpoint_every", "keep_checkpoints", "sample_every")}
    sections = {"training": training, "model": whole["model"], "scheduler": whole["scheduler"]}
    values = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return Recipe(
        {"data": images.digest, **values}, (), rare, ("checkpoints", f"logs/{STAGE}.jsonl", "samples", "model")
    )


def provenance(policy: PretrainPolicy, images: ImageSet) -> dict[str, Any]:
    """Provenance of a model: the full policy, the data's digest, and the versions of libraries."""
    return {
        "made_by": "python -m pqcad_qat pretrain",
        "policy": policy.model_dump(mode="json"),
        "data": {"name": images.name, "images": len(images), "sha256": images.digest},
        "versions": {name: version(name) for name in ("torch", "diffusers", "accelerate")},
    }


class SampleGrids(Callback):
    """Callback that writes a grid of samples from the averaged weights, always from the same seeds.

    Only the first process writes, every `every` training steps.
    """

    def __init__(self, folder: Path, scheduler: Mapping[str, Any], every: int, conditions: ConditionSet) -> None:
        self.name = "sample-grids"
        self._folder, self._scheduler, self._every, self._conditions = folder, scheduler, every, conditions

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if state.step % self._every or not is_first():
            return
        with averaged_weights(state) as model:
            config: Any = model.config
            shape = (config.in_channels, config.sample_size, config.sample_size)
            sampler = pytorch_variant(
                REFERENCE, model, ddpm_schedule(self._scheduler), DEFAULT_STEPS, sample_shape=shape
            )
            images = sample_images(replace(sampler, conditions=self._conditions), SAMPLES, 0, SAMPLES)
        self._folder.mkdir(parents=True, exist_ok=True)
        save_grid(images, self._folder / f"step_{state.step:06d}.png")


def _build(config: Mapping[str, Any], channels: int) -> nn.Module:
    arguments = {key: value for key, value in config.items() if key != "class"}
    try:
        model: Any = class_of(FAMILY.name)(**arguments)
    except (TypeError, ValueError) as error:
        raise PolicyError(
            f"model: got a config that diffusers refuses: {error}; allowed one that makes a {FAMILY.name}"
        ) from error
    for key in ("in_channels", "out_channels"):
        if model.config[key] != channels:
            raise PolicyError(f"model.{key}: got {model.config[key]}; allowed {channels}, as the images have")
    return cast(nn.Module, model)


@torch.no_grad()
def _check_runs(model: Any, channels: int) -> None:
    """Call the model once: diffusers builds some sizes that cannot run, and reports this only in a call."""
    size, classes = model.config.sample_size, model.config.num_class_embeds
    labels = None if classes is None else torch.zeros(1, dtype=torch.int64)
    try:
        model.eval()(torch.zeros(1, channels, size, size), 0, class_labels=labels)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise PolicyError(
            f"model: got a {FAMILY.name} that cannot be called on images of {size} pixels: {error}; "
            "allowed one that can"
        ) from error
    model.train()


def _classes(policy: PretrainPolicy, images: ImageSet) -> ClassLabels | None:
    """Determine how labels condition the policy's model.

    The model's embedding table has a row for every class of the data, and optionally one more for the unconditional
    pass. None means that the model takes no labels.
    """
    rows = policy.model.get("num_class_embeds")
    if policy.model.get("class_embed_type") is not None:
        raise PolicyError(
            f"model.class_embed_type: got {policy.model['class_embed_type']!r}; allowed null: labels are "
            "looked up in a table"
        )
    if rows is None:
        return None
    if images.labels is None:
        raise PolicyError(f"model.num_class_embeds: got {rows}; allowed null, as {images.name} has no labels")
    count = int(images.labels.max()) + 1
    if rows not in (count, count + 1):
        raise PolicyError(
            f"model.num_class_embeds: got {rows}; allowed {count}, the classes of {images.name}, or "
            f"{count + 1}, with no class"
        )
    return ClassLabels(count if rows > count else None, policy.training.class_dropout)


def _conditions(model: nn.Module, classes: ClassLabels | None) -> ConditionSet:
    """Conditions of the sample grids: every class."""
    shell = DiffusionModel(model, {}, "the model", "")
    return ConditionSet() if classes is None else class_conditions(conditioned(shell), "all", classes.null)


def _scheduler(policy: PretrainPolicy) -> dict[str, Any]:
    """Scheduler config of the policy in diffusers' names."""
    values = policy.scheduler.model_dump()
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": values.pop("train_timesteps"),
        "clip_sample": False,
        **values,
    }
