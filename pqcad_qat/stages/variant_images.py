"""The stages `samples-NAME`: images of every variant from the same seeds.

Not here: how a runtime samples (samplers.py, int8_sampler.py), and what becomes of the images (measure.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.data.images import to_uint8
from pqcad_qat.machine.content_store import parts_folder, shared_folder
from pqcad_qat.machine.files import whole_file
from pqcad_qat.machine.processes import is_first
from pqcad_qat.machine.progress import counting, working
from pqcad_qat.machine.tensor_files import read_notes, save_tensors
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FLOAT_STEPS, IN_INT8, OPENVINO, SIMULATED, TRAINED, UNTRAINED, VARIANTS
from pqcad_qat.sampling.precision_by_time import NO_FLOAT_STEPS
from pqcad_qat.stages.baselines import openvino_files, runnable
from pqcad_qat.stages.int8_sampler import in_int8, int8_sampler
from pqcad_qat.stages.kept_images import decoder_of, images_or_latents, pictures_of
from pqcad_qat.stages.prepared import SHARED, Prepared
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.samplers import (
    Sampler,
    openvino_file_variant,
    openvino_variant,
    pytorch_variant,
    sample_rows,
    with_float_steps,
)
from pqcad_qat.stages.stage_dependencies import sampled, sampling
from pqcad_qat.stages.stage_records import FloatStepsRecord, SamplesRecord
from pqcad_qat.stages.trained_models import TrainedModels

RUNTIME = "runtime"
"""Name of the note in a file of images that says what computed them, where that is not the variant's own runtime."""

PICTURES = 10
"""Number of images of each variant that the report shows."""


def sample(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    calibration: CalibrationSet,
    models: TrainedModels,
    shares_training: bool,
) -> None:
    """Sample images of every variant from the same seeds.

    Runs side by side share the images of variants that training does not affect. Of several processes each makes a part
    of the images, but for those of OpenVINO's variants: OpenVINO takes all cores by itself.
    """
    for name in shown_variants(policy, run):
        together = VARIANTS[name].runtime != OPENVINO
        with run.stage(sampling(name), together=together) as stage:
            if not stage.new:
                continue
            file = images_file(run, name)

            def make(folder: Path, batch_folder: Path, name: str = name, together: bool = together) -> None:
                _make_images(
                    policy,
                    prepared,
                    run,
                    console,
                    name=name,
                    calibration=calibration,
                    models=models,
                    folder=folder,
                    batch_folder=batch_folder,
                    together=together,
                )

            # Shared images are made once in the shared folder, under a name derived from the recipe, then copied.
            if name in UNTRAINED or (shares_training and VARIANTS[name].weights_from in TRAINED):
                decides = run.decides(sampling(name))
                store, parted = run.path.parent / SHARED, partial(_in_parts, make)
                shared = shared_folder(store, decides, parted, together=together)
                if is_first():
                    with whole_file(file, (shared / file.name).stat().st_size) as draft:
                        shutil.copyfile(shared / file.name, draft)
            else:
                make(file.parent, run.unfinished(sampling(name)))
            if is_first():
                stage.done(SamplesRecord(policy.sampling_steps(name), read_notes(file).get(RUNTIME, "")))


def _in_parts(make: Callable[[Path, Path], None], folder: Path) -> None:
    make(folder, parts_folder(folder))


def _make_images(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    name: str,
    calibration: CalibrationSet,
    models: TrainedModels,
    folder: Path,
    batch_folder: Path,
    together: bool,
) -> None:
    variant = _variant(policy, prepared, run, console, name=name, calibration=calibration, models=models)
    count, batch = policy.evaluation.images, policy.evaluation.batch_size
    with counting(console, f"sample {name}", count * variant.steps) as advance:
        kept = images_or_latents(prepared.model, decoded=policy.takes_pictures)
        samples = sample_rows(
            variant,
            count,
            policy.evaluation.seed,
            batch,
            kept=kept,
            advance=advance,
            batch_folder=batch_folder,
            together=together,
        )
    if not is_first():
        return
    if pictures_of(samples) is None and (decode := decoder_of(prepared.model)) is not None:
        with working(console, f"sample {name}: decoding"):
            samples["pictures"] = to_uint8(torch.from_numpy(decode(samples["latents"][:PICTURES].numpy())))
    simulated_in_int8 = VARIANTS[name].runtime == SIMULATED and variant.runtime == "openvino"
    save_tensors(samples, folder / images_file(run, name).name, {RUNTIME: IN_INT8} if simulated_in_int8 else None)


def _variant(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    name: str,
    calibration: CalibrationSet,
    models: TrainedModels,
) -> Sampler:
    variant = replace(
        _sampler(policy, prepared, run, console, name=name, calibration=calibration, models=models),
        conditions=prepared.conditions,
        guidance_scale=policy.guidance_scale(name),
    )
    in_float = run.read_always(FLOAT_STEPS, FloatStepsRecord).of(name)
    # a deployed folder holds the graph of its float steps, and its runtime chooses by itself
    if VARIANTS[name].deploys is not None or in_float.start == NO_FLOAT_STEPS:
        return variant
    full = pytorch_variant(
        name, prepared.model.denoiser, variant.schedule, variant.steps, sample_shape=variant.sample_shape
    )
    return with_float_steps(variant, full, in_float)


def _sampler(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    name: str,
    calibration: CalibrationSet,
    models: TrainedModels,
) -> Sampler:
    spec = VARIANTS[name]
    schedule, steps = prepared.sampled_by(policy, name), policy.sampling_steps(name)
    if spec.runtime == OPENVINO:
        file = openvino_files(policy, run)[name]
        if spec.deploys is not None:
            return openvino_variant(name, file, steps)
        return openvino_file_variant(
            name, file, schedule, steps, sample_shape=prepared.model.sample_shape, batch_size=policy.export.batch_size
        )
    if in_int8(policy, prepared, name):
        assert spec.weights_from is not None
        model = models.of(spec.weights_from)
        own = int8_sampler(policy, prepared, run, console, name=name, model=model, calibration=calibration)
        if own is not None:
            return own
    denoiser = prepared.model.denoiser if spec.weights_from is None else models.of(spec.weights_from)
    return pytorch_variant(name, denoiser, schedule, steps, sample_shape=prepared.model.sample_shape)


def shown_variants(policy: Policy, run: RunFolder) -> tuple[str, ...]:
    """Variants that images are made of, without the baselines that failed."""
    made = runnable(policy, run)
    return tuple(name for name in sampled(policy) if name in made)


def images_file(run: RunFolder, name: str) -> Path:
    """File of a variant's images."""
    return run.path / "samples" / f"{name}.safetensors"
