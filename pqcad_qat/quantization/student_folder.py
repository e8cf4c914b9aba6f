"""A quantized model on disk: a diffusers folder that plain diffusers reads, and beside it the quantizers that make it
exact.

Not here: the folder that OpenVINO runs (export/export_model.py).

    unet/             (or transformer/) the model with its weights rounded to their grid, in floating point, for plain
    diffusers quantization/     plan.json and model.safetensors: every Parameter, scale, zero point and bit-width, for
    us scheduler/        with the student's number of steps
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
from pqcad_qat.models.denoiser import DiffusionModel, save_model, untrained_denoiser
from pqcad_qat.models.model_folder import SCHEDULER_CONFIG, denoiser_folder
from pqcad_qat.models.own_model import OWN, OwnModel, built
from pqcad_qat.quantization.conversion import dequantize_model, quantize_model, quantized_layers
from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec
from pqcad_qat.quantization.quantized_layer import quantized_weight
from pqcad_qat.quantization.shortcuts import merge_shortcuts, split_shortcuts
from pqcad_qat.sampling.schedulers import STEPS
from pqcad_qat.sampling.trajectory import distilled_steps, noise_schedule, written_out

PLAN = Path("quantization") / "plan.json"
STATE = Path("quantization") / "model.safetensors"


def save_quantized(
    folder: Path,
    model: nn.Module,
    plan: Sequence[LayerPlan],
    splits: bool,
    *,
    scheduler_config: Mapping[str, Any],
    steps: int,
) -> None:
    """Write a quantized model; `splits` says that its shortcuts are split, `steps` how many sampling steps it is for.

    The scheduler config is written as that of our sampler, with every key.
    """
    scheduler = written_out(scheduler_config, noise_schedule(scheduler_config))
    save_model(_rounded(model), {**scheduler, STEPS: steps}, folder)
    write_json(folder / PLAN, {"split_shortcuts": splits, "layers": [asdict(layer) for layer in plan]})
    save_file({name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}, folder / STATE)


@torch.no_grad()
def _rounded(model: nn.Module) -> nn.Module:
    """A floating-point copy of the original architecture whose weights are the quantized ones."""
    copied = copy.deepcopy(model)
    for layer in quantized_layers(copied).values():
        layer.weight.copy_(quantized_weight(layer))
    return merge_shortcuts(dequantize_model(copied))


def is_quantized_folder(folder: Path) -> bool:
    return (folder / PLAN).is_file()


def load_quantized(folder: Path, own: OwnModel | None = None) -> tuple[DiffusionModel, tuple[LayerPlan, ...], int]:
    """(the quantized model, its plan, its sampling steps) from a folder that `save_quantized` wrote.

    `own` is the module that was quantized where it is the user's own.

    Raises:
        ModelError: the folder is incomplete or damaged, or its parts do not fit together.
    """
    content = read_json(folder / PLAN)
    part = denoiser_folder(folder)
    config = read_json(part / "config.json")
    is_own = str(config.get("_class_name")).startswith(OWN)
    if is_own and own is None:
        raise ModelError(f"{folder}: got the student of a module of the user's own; allowed with that module, as `own`")
    scheduler, where = read_json(folder / SCHEDULER_CONFIG), str(folder / SCHEDULER_CONFIG)
    if (steps := distilled_steps(scheduler, where)) is None:
        raise ModelError(f"{where}: {STEPS}: got nothing; allowed the sampling steps that the model was distilled for")
    try:
        plan = tuple(layer_plan(entry) for entry in content["layers"])
        denoiser = built(own).eval() if is_own and own else untrained_denoiser(config, str(part / "config.json"))
        shell = DiffusionModel(denoiser, scheduler, str(folder), "", own)
        if content["split_shortcuts"]:
            split_shortcuts(denoiser, shell.example)
        quantize_model(denoiser, plan)
        denoiser.load_state_dict(load_file(folder / STATE), strict=True)
        return shell, plan, steps
    except (PqcadError, KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: damaged folder of a quantized model: {error}") from error


def layer_plan(entry: Mapping[str, Any]) -> LayerPlan:
    """A LayerPlan from its JSON form; folders of before 2026-11-28 have their rules by number, patterns as `rule`."""
    if "rule_index" in entry:
        entry = {**entry, "rule": str(entry["rule_index"]), "pattern": entry["rule"]}
        del entry["rule_index"]
    parts = {
        "weights": _quantizer_spec(entry["weights"]),
        "inputs": _quantizer_spec(entry["inputs"]),
        "ladder": tuple(entry["ladder"]),
    }
    return LayerPlan(**{**entry, **parts})


def _quantizer_spec(entry: Mapping[str, Any]) -> QuantizerSpec:
    """A QuantizerSpec from its JSON form; folders of before 2026-11-28 have a key `percentile`, which nothing reads."""
    return QuantizerSpec(**{key: value for key, value in entry.items() if key != "percentile"})
