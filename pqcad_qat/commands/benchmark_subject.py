"""The subject of a benchmark, which is a deployed folder or a quantized architecture with random weights, and its
baselines.

Not here: any timing (benchmark.py). Speed does not depend on the values of weights, so nothing is trained, and only the
deployed folder's weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pqcad_qat.errors import ModelError
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.models.families.family import ConditionInput, condition_inputs
from pqcad_qat.models.untrained import (
    architecture_configs,
    architectures,
    fixed_inputs,
    noise_condition,
    random_denoiser,
)
from pqcad_qat.policy.layer_rules import QuantizationPolicy
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.variants import DEPLOYED, NNCF_INT8, PQCAD, PQCAD_OPENVINO
from pqcad_qat.quantization.conversion import taken_integers
from pqcad_qat.sampling.precision_by_time import float_steps
from pqcad_qat.sampling.trajectory import noise_schedule
from pqcad_qat.serving.deployed_folder import MANIFEST, denoiser_config, read_manifest, scheduler_config
from pqcad_qat.serving.float_steps import steps_in_float
from pqcad_qat.stages.untrained_models import Configs, blueprint, noise_attention, quantized_untrained
from pqcad_qat.timing.baseline_trials import NNCF_SETTINGS, XML_FILE, nncf_baseline, reasons, try_out
from pqcad_qat.timing.float_graph import convert_float, example_inputs
from pqcad_qat.timing.hardware import hardware
from pqcad_qat.timing.latency import PRECISIONS, native, ways_of

CALIBRATION_BATCHES = (4, 4, 4, 4)
"""Sizes of the batches of noise that calibrate the activation ranges, ours and NNCF's. With random weights the ranges
have no meaning, and do not affect speed.
"""


@dataclass(frozen=True)
class Subject:
    """One network, and the folder that it is deployed to.

    Attributes:
        source: name that the user gave.
        config: config of the denoiser's diffusers class.
        folder: deployed folder.
        sample_shape: shape (C, H, W) of one sample.
        train_timesteps: number T of training time steps.
        steps: number of sampling steps that it was distilled for; None for an architecture.
        full_precision_steps: number of sampling steps of the model that it came from; None if unknown.
        weights: origin of the weights, "of the folder" or "random".
        conditions: inputs beside x_t and t, with every size known.
        float_steps: number of its sampling steps that full precision computes.
        float_calls: calls of the denoiser in these steps.
        ours: name of its row in the result.
    """

    source: str
    config: Mapping[str, Any]
    folder: Path
    sample_shape: tuple[int, int, int]
    train_timesteps: int
    steps: int | None
    full_precision_steps: int | None
    weights: str
    conditions: tuple[ConditionInput, ...] = ()
    float_steps: int = 0
    float_calls: int = 0
    ours: str = PQCAD_OPENVINO


@dataclass(frozen=True)
class Candidates:
    """Candidates that are timed at one batch size; they can be sent to another process.

    Attributes:
        config: config of the denoiser that PyTorch runs.
        files: variant -> what OpenVINO runs, a graph's xml file or a deployed folder.
        sample_shape: shape (C, H, W) of one sample.
        batch: number of images a call.
        conditions: condition inputs of every call, with every size known.
        died: baseline that cannot be run -> reason.
        ours: which of the files is not a baseline.
    """

    config: Mapping[str, Any]
    files: Mapping[str, Path]
    sample_shape: tuple[int, int, int]
    batch: int
    conditions: tuple[ConditionInput, ...] = ()
    died: Mapping[str, str] = field(default_factory=dict)
    ours: str = PQCAD_OPENVINO

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
        """Inputs of one call, by the names in the exported graph."""
        return example_inputs(self.sample_shape, self.batch, seed, noise_condition(self.conditions, self.batch, seed))


def open_subject(source: str, policy: Path, temporary: Path) -> Subject:
    """Open a deployed folder or an architecture; an architecture is quantized and exported below `temporary`.

    Args:
        source: a run or deployed folder, a denoiser's config.json or a folder with one, or the name of an architecture
            that ships with the package.
        policy: policy whose quantization rules an architecture gets; it is not read for a deployed folder.
        temporary: folder for the export of an architecture.

    Raises:
        ModelError: the source is none of these or cannot be used, or is an architecture and the policy does not exist.
        PolicyError: the policy has faults.
        PlanError: the rules do not fit the architecture.
    """
    path = Path(source).expanduser()
    for folder in (path, path / "openvino"):
        if (folder / MANIFEST).is_file():
            return _deployed(source, folder)
    if (configs := architecture_configs(source)) is None:
        raise ModelError(
            f"{source}: got nothing to time; allowed a run, a deployed OpenVINO folder, a denoiser's "
            "config.json or a folder with one, "
            f"or the name of an architecture: {', '.join(architectures())}"
        )
    if not policy.is_file():
        raise ModelError(
            f"{policy}: got no such file; allowed a policy, whose rules quantize the architecture: --policy FILE"
        )
    rules = load_policy(policy)
    with located(rules):
        return _quantized(source, configs, rules.quantization, temporary / "ours")


def _deployed(source: str, folder: Path) -> Subject:
    """Subject of a deployed folder, as its manifest describes it."""
    manifest = read_manifest(folder)
    provenance = manifest.get("provenance", {})
    channels, height, width = manifest["sample_shape"]
    steps = provenance.get("sampling_steps")
    schedule = noise_schedule(scheduler_config(folder, manifest))
    walk, in_float = schedule.walk(steps) if steps else (), steps_in_float(manifest, folder, schedule, steps)
    return Subject(
        source=source,
        config=denoiser_config(folder, manifest),
        folder=folder,
        sample_shape=(channels, height, width),
        train_timesteps=manifest["train_timesteps"],
        steps=steps,
        full_precision_steps=provenance.get("full_precision_steps"),
        weights="of the folder",
        conditions=condition_inputs(manifest.get("conditions", ())),
        float_steps=float_steps(walk, in_float.start),
        float_calls=in_float.calls(walk),
        ours=DEPLOYED.get(provenance.get("variant", PQCAD), PQCAD_OPENVINO),
    )


def candidates(subject: Subject, batch: int, folder: Path, settings: Sequence[str] = NNCF_SETTINGS[:1]) -> Candidates:
    """Collect our folder and the baselines, which are made for this batch size in `folder`.

    The baselines are OpenVINO's conversion, as float32 and BF16, and NNCF's INT8 version of it in each of the settings.
    """
    shape, condition = subject.sample_shape, noise_condition(subject.conditions, batch)
    rows = {_nncf_row(setting): setting for setting in settings}
    float_xml, *nncf_xmls = (folder / kind / XML_FILE for kind in ("float", *rows))
    nncf = dict(zip(rows, nncf_xmls, strict=True))
    convert_float(
        random_denoiser(subject.config, subject.source),
        shape,
        batch,
        float_xml.parent,
        times=subject.train_timesteps,
        condition=condition,
    )
    empty = Candidates(subject.config, {}, shape, batch, subject.conditions, ours=subject.ours)
    inputs = [empty.inputs(seed) for seed in range(math.ceil(sum(CALIBRATION_BATCHES) / batch))]
    machine = hardware()
    timed = [name for name in PRECISIONS if native(name, machine)]
    ways = ways_of(NNCF_INT8, machine)
    died = reasons(
        {name: partial(try_out, float_xml, inputs[0], ways_of(name, machine)) for name in timed}
        | {
            row: partial(nncf_baseline, float_xml, inputs, xml.parent, ways, settings=(rows[row],))
            for row, xml in nncf.items()
        }
    )
    files = {**dict.fromkeys(PRECISIONS, float_xml), **nncf, subject.ours: subject.folder}
    return replace(empty, files={name: file for name, file in files.items() if name not in died}, died=died)


def _nncf_row(setting: str) -> str:
    """Name of the row of NNCF in a setting."""
    return NNCF_INT8 if setting == NNCF_SETTINGS[0] else f"{NNCF_INT8} {setting}"


def _quantized(source: str, configs: Configs, quantization: QuantizationPolicy, folder: Path) -> Subject:
    """Export the architecture at the rules' target widths, with ranges from noise and without training."""
    config, scheduler = configs
    model = quantized_untrained(configs, blueprint(configs, source, quantization), CALIBRATION_BATCHES)
    attention = noise_attention(model, quantization)
    layers, steps = taken_integers(model.denoiser), noise_schedule(scheduler).train_timesteps
    conditions, shape = fixed_inputs(model.condition_inputs), model.sample_shape
    request = ExportRequest(
        model=model.denoiser,
        scheduler_config=scheduler,
        layers=layers,
        sample_shape=shape,
        batch_size=1,
        provenance={"model": source, "weights": "random"},
        conditions=conditions,
        attention=attention,
    )
    export_model(request, folder)
    return Subject(
        source=source,
        config=dict(config),
        folder=folder,
        sample_shape=shape,
        train_timesteps=steps,
        steps=None,
        full_precision_steps=None,
        weights="random",
        conditions=conditions,
    )
