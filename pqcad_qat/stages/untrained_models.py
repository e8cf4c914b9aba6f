"""An architecture on the meta device with its plan, and the same architecture quantized with random weights. They serve
work that does not depend on trained values.

Not here: the commands that use them (commands/rehearse.py, commands/benchmark_subject.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from pqcad_qat.export.int8_attention import AttentionRange, attention_ranges
from pqcad_qat.models.denoiser import DenoiserInput, DiffusionModel
from pqcad_qat.models.denoiser_config import SampleSize
from pqcad_qat.models.model_loading import shapes_of_configs
from pqcad_qat.models.untrained import noise_inputs, random_denoiser
from pqcad_qat.policy.layer_rules import QuantizationPolicy
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model
from pqcad_qat.quantization.plan import LayerPlan, plan_layers
from pqcad_qat.quantization.shortcuts import shortcut_seams, split_at

Stage = Callable[[str], AbstractContextManager[Any]]
Configs = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Configs of a denoiser and of its scheduler, in diffusers' names."""


@dataclass(frozen=True)
class Blueprint:
    """An architecture on the meta device, with its plan.

    Attributes:
        model: denoiser on the meta device, with its shortcuts split.
        seams: module path -> channel at which the shortcut of that module is split.
        plan: one entry for every layer that will be quantized.
        sample_size: height and width of x_t; None for the model's own.
    """

    model: DiffusionModel
    seams: Mapping[str, int]
    plan: tuple[LayerPlan, ...]
    sample_size: SampleSize | None = None


def blueprint(
    configs: Configs, source: str, quantization: QuantizationPolicy, sample_size: SampleSize | None = None
) -> Blueprint:
    """Plan an architecture at the target widths of the rules.

    `source` names the architecture in messages; `sample_size` means the same as in `load_model`.

    Raises:
        ModelError: a config cannot be used.
        PlanError: the rules do not fit the architecture.
    """
    shapes = shapes_of_configs(*configs, source, sample_size)
    seams = shortcut_seams(shapes.denoiser, shapes.example) if quantization.split_shortcuts else {}
    plan = plan_layers(split_at(shapes.denoiser, seams), quantization.layers, (), shapes.example)
    return Blueprint(shapes, seams, plan, sample_size)


def quantized_untrained(
    configs: Configs, drawn: Blueprint, states: Sequence[int], stage: Stage = nullcontext
) -> DiffusionModel:
    """Build the architecture with random weights, quantize it, and calibrate its activation ranges on noise.

    Args:
        configs: configs that the blueprint was made from.
        drawn: blueprint of the architecture.
        states: sizes of the batches of noise.
        stage: context manager entered around each part of the work, given its name.
    """
    with stage("random weights"):
        model = replace(drawn.model, denoiser=random_denoiser(configs[0], drawn.model.source, drawn.sample_size))
    with stage("quantize"):
        quantize_model(split_at(model.denoiser, drawn.seams), drawn.plan)
    with stage("ranges"):
        calibrate_ranges(model.denoiser, _batches(noise_inputs(model, sum(states)), states))
    return model


def noise_attention(model: DiffusionModel, quantization: QuantizationPolicy) -> dict[str, AttentionRange]:
    """Ranges that the matrix products of attention read on one state of noise; empty unless attention runs in INT8."""
    return {} if quantization.attention == "float" else attention_ranges(model.denoiser, [noise_inputs(model, 1)])


def _batches(inputs: DenoiserInput, sizes: Sequence[int]) -> list[DenoiserInput]:
    x_t, t, condition = inputs
    pieces = [torch.split(value, list(sizes)) for value in (x_t, t, *condition.values())]
    return [(x, steps, dict(zip(condition, rest, strict=True))) for x, steps, *rest in zip(*pieces, strict=True)]
