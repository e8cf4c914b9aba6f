"""What a benchmark times: a folder of ours, or an architecture whose random weights are quantized by a policy's rules; and its baselines.

Not here: any timing (speed.py). Speed does not depend on the values of weights, so nothing is trained and no weights are read but ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import nn

from pqcad_qat.deployment.export import export_model
from pqcad_qat.deployment.folder import MANIFEST, UNET_CONFIG, read_manifest
from pqcad_qat.diffusion.denoiser import DenoiserInput, DiffusionModel, predict, read_json
from pqcad_qat.errors import ModelError
from pqcad_qat.evaluation.benchmark import XML_FILE, convert_float, example_inputs, nncf_baseline
from pqcad_qat.evaluation.record import OURS
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import QuantizationPolicy
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.quantization.shortcut import split_shortcuts

ARCHITECTURES = files("pqcad_qat.assets") / "architectures"

CALIBRATION_STATES = 16
"""Noise states that ranges are taken from, ours and NNCF's; with random weights they mean nothing, and cost no speed."""


@dataclass(frozen=True)
class Subject:
    """One network, and the deployed folder that is ours.

    Attributes:
        source: as the user named it.
        config: of diffusers' UNet2DModel.
        folder: deployed.
        sample_shape: (C, H, W).
        train_timesteps: T.
        steps: sampling steps of an image that it was distilled for, None for an architecture.
        full_precision_steps: those of the model that it came from, None where nothing says them.
        weights: "of the folder", or "random".
    """

    source: str
    config: Mapping[str, Any]
    folder: Path
    sample_shape: tuple[int, int, int]
    train_timesteps: int
    steps: int | None
    full_precision_steps: int | None
    weights: str


@dataclass(frozen=True)
class Candidates:
    """What is timed at one batch size; another process can be given it.

    Attributes:
        config: of the UNet2DModel that PyTorch runs.
        files: variant -> what OpenVINO runs, a graph's xml or a deployed folder.
        sample_shape: (C, H, W).
        batch: images of a call.
    """

    config: Mapping[str, Any]
    files: Mapping[str, Path]
    sample_shape: tuple[int, int, int]
    batch: int


def open_subject(source: str, policy: Path, temporary: Path) -> Subject:
    """Recognise a folder of ours or an architecture; an architecture is quantized and exported below `temporary`.

    Args:
        source: a run or deployed folder, a UNet2DModel's config.json or a folder with one, or the name of an architecture that ships.
        policy: whose quantization rules an architecture gets; not read for a folder of ours.

    Raises:
        ModelError: none of them, or one that cannot be used; or an architecture, and no such policy.
        PolicyError: the policy has faults.
        PlanError: its rules do not fit the architecture.
    """
    path = Path(source).expanduser()
    for folder in (path, path / "openvino"):
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            channels, height, width = manifest["sample_shape"]
            steps, full = (manifest.get("provenance", {}).get(key) for key in ("sampling_steps", "full_precision_steps"))
            config = read_json(folder / UNET_CONFIG)
            return Subject(source, config, folder, (channels, height, width), manifest["train_timesteps"], steps, full, "of the folder")
    config, scheduler = _architecture(path, source)
    if not policy.is_file():
        raise ModelError(f"{policy}: no such file; an architecture is quantized by the rules of a policy: --policy FILE")
    return _quantized(source, config, scheduler, load_policy(policy).quantization, temporary / "ours")


def architectures() -> list[str]:
    """The names of the architectures that ship."""
    return sorted(entry.name.removesuffix(".json") for entry in ARCHITECTURES.iterdir() if entry.name.endswith(".json"))


def random_denoiser(config: Mapping[str, Any], where: str = UNET_CONFIG) -> UNet2DModel:
    """A UNet2DModel with seeded random weights, in evaluation mode.

    Raises:
        ModelError: diffusers makes none from the config, or one that takes more than x_t and t.
    """
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ModelError(f"{where}: _class_name: got {config['_class_name']!r}; allowed UNet2DModel")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            denoiser = UNet2DModel.from_config(dict(config)).eval()
            shell = DiffusionModel(denoiser, {}, where, "")
            predict(denoiser, *shell.example)
        except Exception as error:  # whatever a wrong size leads to in diffusers or torch
            raise ModelError(f"{where}: not the config of an unconditional UNet2DModel: {error}") from error
    if shell.condition_inputs:
        raise ModelError(f"{where}: takes {', '.join(map(str, shell.condition_inputs))}; allowed an unconditional UNet2DModel")
    return denoiser


def candidates(subject: Subject, batch: int, folder: Path) -> Candidates:
    """Ours, and the baselines made for this batch in `folder`: OpenVINO's conversion, as float32 and BF16, and NNCF's INT8 of it."""
    plain = convert_float(random_denoiser(subject.config), subject.sample_shape, batch, folder / "float", subject.train_timesteps)
    noise = [example_inputs(subject.sample_shape, batch, seed) for seed in range(math.ceil(CALIBRATION_STATES / batch))]
    nncf_xml = nncf_baseline(plain, noise, folder / "nncf")
    float_xml = folder / "float" / XML_FILE
    found = {"ov-fp32": float_xml, "ov-bf16": float_xml, "nncf-int8": nncf_xml, OURS: subject.folder}
    return Candidates(subject.config, found, subject.sample_shape, batch)


def _architecture(path: Path, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of a UNet2DModel and of its scheduler: diffusers' default where none stands beside it."""
    if source in architectures() and not path.exists():
        return read_json(Path(str(ARCHITECTURES / f"{source}.json"))), _default_scheduler()
    if path.is_file():
        return read_json(path), _default_scheduler()
    for name in ("unet/config.json", "config.json"):
        if (path / name).is_file():
            beside = path / "scheduler" / "scheduler_config.json"
            return read_json(path / name), read_json(beside) if beside.is_file() else _default_scheduler()
    raise ModelError(
        f"{source}: got nothing to time; allowed a run, a deployed OpenVINO folder, a UNet2DModel's config.json or a folder with one, or "
        f"the name of an architecture: {', '.join(architectures())}"
    )


def _default_scheduler() -> dict[str, Any]:
    return dict(DDIMScheduler().config)


def _quantized(
    source: str, config: Mapping[str, Any], scheduler: Mapping[str, Any], quantization: QuantizationPolicy, folder: Path
) -> Subject:
    """The architecture as our exporter writes it: at the rules' target widths, ranges from noise, not trained."""
    model = DiffusionModel(random_denoiser(config, source), dict(scheduler), source, "")
    denoiser: nn.Module = model.denoiser
    if quantization.split_shortcuts:
        split_shortcuts(denoiser, model.example)
    plan = plan_layers(denoiser, quantization.layers, (), model.example)
    quantize_model(denoiser, plan)
    steps = int(scheduler.get("num_train_timesteps", 1000))
    calibrate_ranges(denoiser, _noise_states(model.sample_shape, steps))
    provenance = {"model": source, "weights": "random"}
    export_model(denoiser, scheduler, integer_layers(denoiser), model.sample_shape, 1, "int8", folder, provenance)
    return Subject(source, dict(config), folder, model.sample_shape, steps, None, None, "random")


def _noise_states(sample_shape: tuple[int, int, int], train_timesteps: int) -> Iterator[DenoiserInput]:
    """Model inputs (x_t (B, C, H, W), t (B,), no condition): noise at time steps spread over all of them."""
    noise = torch.from_numpy(example_inputs(sample_shape, CALIBRATION_STATES)["sample"])
    steps = torch.linspace(0, train_timesteps - 1, CALIBRATION_STATES).long()
    return ((x_t, t, {}) for x_t, t in zip(torch.split(noise, 4), torch.split(steps, 4), strict=True))
