"""A quantized model on disk: a folder that diffusers can read, with the exact quantizers beside it.

The folder holds:

- unet/ (or transformer/): the model in floating point, with its weights rounded to their grid, for diffusers.
- quantization/: plan.json and model.safetensors, with every Parameter, scale, zero point and width, for this package;
  full_precision.safetensors, if full precision computes the first sampling steps; and policy.yaml, the policy that made
  it, which `export` reads.
- scheduler/: the scheduler, with the student's number of sampling steps.

Not here: the folder that OpenVINO runs (export/export_model.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pqcad_qat.errors import ModelError, PqcadError
from pqcad_qat.machine.files import write_json
from pqcad_qat.machine.json_files import read_json
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.model_folder import SCHEDULER_CONFIG, denoiser_folder
from pqcad_qat.models.model_loading import save_model, untrained_denoiser
from pqcad_qat.models.own_model import OWN, OwnModel, built
from pqcad_qat.quantization.conversion import dequantize_model, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import quantized_weight
from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec
from pqcad_qat.quantization.shortcuts import merge_shortcuts, split_shortcuts
from pqcad_qat.sampling.precision_by_time import StepsInFloat, are_stops
from pqcad_qat.sampling.schedulers import STEPS
from pqcad_qat.sampling.trajectory import distilled_steps, noise_schedule, written_out

PLAN = Path("quantization") / "plan.json"
"""Path of the plan within the folder."""
STATE = Path("quantization") / "model.safetensors"
"""Path of the quantized model's state within the folder."""
FULL = Path("quantization") / "full_precision.safetensors"
"""Path of the full-precision weights within the folder, if they compute first sampling steps."""
POLICY = Path("quantization") / "policy.yaml"
"""Path of the policy within the folder; its `deploy` names the variant that the folder holds."""
START, STOPS = "float_start", "float_stops"
"""Keys of the plan's file: the time from which on full precision computes, and the times of steps that it takes in
parts.
"""


def save_quantized(
    folder: Path,
    model: nn.Module,
    plan: Sequence[LayerPlan],
    splits: bool,
    *,
    scheduler_config: Mapping[str, Any],
    steps: int,
    full: nn.Module | None = None,
    in_float: StepsInFloat = StepsInFloat(),  # noqa: B008  # frozen
) -> None:
    """Write a quantized model.

    The scheduler config is written as that of our sampler, with every key.

    Args:
        folder: where the model is written.
        model: the quantized model.
        plan: plan of its layers.
        splits: whether its shortcuts are split.
        scheduler_config: config of its scheduler.
        steps: number of sampling steps that it is for.
        full: full-precision denoiser that computes its first sampling steps; None where there are none.
        in_float: the steps that it computes.
    """
    scheduler = written_out(scheduler_config, noise_schedule(scheduler_config))
    save_model(_rounded(model), {**scheduler, STEPS: steps}, folder)
    content: dict[str, Any] = {"split_shortcuts": splits, "layers": [asdict(layer) for layer in plan]}
    if full is not None:
        content |= {START: in_float.start, STOPS: in_float.stops}
        _save_state(full, folder / FULL)
    write_json(folder / PLAN, content)
    _save_state(model, folder / STATE)


def _save_state(model: nn.Module, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}, file)


@torch.no_grad()
def _rounded(model: nn.Module) -> nn.Module:
    """A floating-point copy in the original architecture, whose weights are the quantized ones."""
    copied = copy.deepcopy(model)
    for layer in quantized_layers(copied).values():
        layer.weight.copy_(quantized_weight(layer))
    return merge_shortcuts(dequantize_model(copied))


def is_quantized_folder(folder: Path) -> bool:
    """Whether `save_quantized` wrote the folder."""
    return (folder / PLAN).is_file()


def load_quantized(folder: Path, own: OwnModel | None = None) -> tuple[DiffusionModel, tuple[LayerPlan, ...], int]:
    """(the quantized model, its plan, its sampling steps) from a folder that `save_quantized` wrote.

    `own` is the module that was quantized, if it is the user's own.

    Raises:
        ModelError: the folder is incomplete or damaged, or its parts do not fit together.
    """
    content = read_json(folder / PLAN)
    config_path = denoiser_folder(folder) / "config.json"
    config = read_json(config_path)
    is_own = str(config.get("_class_name")).startswith(OWN)
    if is_own and own is None:
        raise ModelError(f"{folder}: got the student of a module of the user's own; allowed with that module, as `own`")
    scheduler, where = read_json(folder / SCHEDULER_CONFIG), str(folder / SCHEDULER_CONFIG)
    if (steps := distilled_steps(scheduler, where)) is None:
        raise ModelError(f"{where}: {STEPS}: got nothing; allowed the sampling steps that the model was distilled for")
    try:
        plan = tuple(layer_plan(entry) for entry in content["layers"])
        denoiser = built(own).eval() if is_own and own else untrained_denoiser(config, str(config_path))
        shell = DiffusionModel(denoiser, scheduler, str(folder), "", own)
        if content["split_shortcuts"]:
            split_shortcuts(denoiser, shell.example)
        quantize_model(denoiser, plan)
        denoiser.load_state_dict(load_file(folder / STATE), strict=True)
        return shell, plan, steps
    except (PqcadError, KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: got a damaged folder of a quantized model: {error}; allowed its files as `run` wrote them"
        ) from error


def load_full_precision(folder: Path, own: OwnModel | None = None) -> tuple[nn.Module, StepsInFloat] | None:
    """(the full-precision denoiser, the steps that it computes) of a folder that `save_quantized` wrote.

    None where the folder's model computes every step itself.

    Raises:
        ModelError: the folder is damaged.
    """
    content = read_json(folder / PLAN)
    if START not in content:
        return None
    stops = content.get(STOPS, [])
    if not are_stops(stops):
        raise ModelError(f"{folder / PLAN}: {STOPS}: got {stops}; allowed lists of three or more falling whole numbers")
    path = denoiser_folder(folder) / "config.json"
    denoiser = untrained_denoiser(read_json(path), str(path)) if own is None else built(own)
    try:
        denoiser.load_state_dict(load_file(folder / FULL), strict=True)
    except (TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder / FULL}: got damaged weights: {error}; allowed the file as `run` wrote it"
        ) from error
    return denoiser.eval(), StepsInFloat(float(content[START]), tuple(map(tuple, stops)))


def layer_plan(entry: Mapping[str, Any]) -> LayerPlan:
    """A LayerPlan from its JSON form.

    Folders written before 2026-11-28 have a rule's number as `rule_index`, and its pattern as `rule`.
    """
    if "rule_index" in entry:
        entry = {**entry, "rule": str(entry["rule_index"]), "pattern": entry["rule"]}
        del entry["rule_index"]
    fields = {
        "weights": _quantizer_spec(entry["weights"]),
        "inputs": _quantizer_spec(entry["inputs"]),
        "ladder": tuple(entry["ladder"]),
    }
    return LayerPlan(**{**entry, **fields})


def _quantizer_spec(entry: Mapping[str, Any]) -> QuantizerSpec:
    """A QuantizerSpec from its JSON form; folders written before 2026-11-28 also have an unused key `percentile`."""
    return QuantizerSpec(**{key: value for key, value in entry.items() if key != "percentile"})
