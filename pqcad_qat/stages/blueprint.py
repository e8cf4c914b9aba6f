"""An architecture as shapes with its plan, and the same with random weights: for what does not depend on trained
values.

Not here: who looks at it (commands/rehearse.py, commands/benchmark_subject.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from pqcad_qat.export.int8_attention import AttentionRange, attention_ranges
from pqcad_qat.models.denoiser import DenoiserInput, DiffusionModel, shapes_of_configs
from pqcad_qat.models.denoiser_config import SampleSize
from pqcad_qat.models.untrained import noise_inputs, random_denoiser
from pqcad_qat.policy.schema import QuantizationPolicy
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model
from pqcad_qat.quantization.plan import LayerPlan, plan_layers
from pqcad_qat.quantization.shortcuts import shortcut_seams, split_at

Stage = Callable[[str], AbstractContextManager[Any]]
Configs = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Of a denoiser, and of its scheduler, in diffusers' names."""


@dataclass(frozen=True)
class Blueprint:
    """An architecture as shapes, with its plan.

    Attributes:
        model: on the meta device, shortcuts split.
        seams: of the shortcuts that are split, by module path.
        plan: of every layer that will be quantized.
        sample_size: height and width of x_t where they are others than the model's own.
    """

    model: DiffusionModel
    seams: Mapping[str, int]
    plan: tuple[LayerPlan, ...]
    sample_size: SampleSize | None = None


def blueprint(
    configs: Configs, source: str, quantization: QuantizationPolicy, sample_size: SampleSize | None = None
) -> Blueprint:
    """The plan of an architecture at the rules' target widths; `source` names it, `sample_size` is as of `load_model`.

    Raises:
        ModelError: a config that cannot be used.
        PlanError: the rules do not fit it.
    """
    shapes = shapes_of_configs(*configs, source, sample_size)
    seams = shortcut_seams(shapes.denoiser, shapes.example) if quantization.split_shortcuts else {}
    plan = plan_layers(split_at(shapes.denoiser, seams), quantization.layers, (), shapes.example)
    return Blueprint(shapes, seams, plan, sample_size)


def quantized_untrained(
    configs: Configs, drawn: Blueprint, states: Sequence[int], stage: Stage = nullcontext
) -> DiffusionModel:
    """The architecture with random weights, quantized, its ranges from noise.

    Args:
        configs: that the blueprint was drawn of.
        drawn: the blueprint.
        states: sizes of the batches of noise.
        stage: a context for each part of the work.
    """
    with stage("random weights"):
        model = replace(drawn.model, denoiser=random_denoiser(configs[0], drawn.model.source, drawn.sample_size))
    with stage("quantize"):
        quantize_model(split_at(model.denoiser, drawn.seams), drawn.plan)
    with stage("ranges"):
        calibrate_ranges(model.denoiser, _batches(noise_inputs(model, sum(states)), states))
    return model


def noise_attention(model: DiffusionModel, quantization: QuantizationPolicy) -> dict[str, AttentionRange]:
    """What the products of its attention read of one state of noise, if they are to run in INT8."""
    return {} if quantization.attention == "float" else attention_ranges(model.denoiser, [noise_inputs(model, 1)])


def _batches(inputs: DenoiserInput, sizes: Sequence[int]) -> list[DenoiserInput]:
    x_t, t, condition = inputs
    parts = [torch.split(value, list(sizes)) for value in (x_t, t, *condition.values())]
    return [(x, steps, dict(zip(condition, rest, strict=True))) for x, steps, *rest in zip(*parts, strict=True)]
