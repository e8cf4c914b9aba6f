"""The stages that look at what was made: images of every variant, what they are worth, and the report.

Not here: metrics (quality/) and pages (report/).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.data.images import to_uint8
from pqcad_qat.machine.content_store import kept, parts_of
from pqcad_qat.machine.files import whole_file
from pqcad_qat.machine.processes import agreed
from pqcad_qat.machine.progress import working
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.policy.variants import OPENVINO, PQ, REFERENCE, TRAINED, UNTRAINED, VARIANTS
from pqcad_qat.quality.feature_network import load_features
from pqcad_qat.quality.fidelity import SSIM_WINDOW, evaluate_images, evaluate_latents, fid_protocol, has_ssim
from pqcad_qat.report.report_files import write_report
from pqcad_qat.stages.baselines import openvino_files
from pqcad_qat.stages.prepared import SHARED
from pqcad_qat.stages.recipes import sampled, sampling
from pqcad_qat.stages.report_rows import RunFacts, curves_of, report_of
from pqcad_qat.stages.run_folder import Record
from pqcad_qat.stages.samplers import (
    Sampler,
    decoder_of,
    openvino_file_variant,
    openvino_variant,
    pytorch_variant,
    sample_states,
)
from pqcad_qat.stages.stage_records import (
    BaselinesRecord,
    BenchmarkRecord,
    EvaluationRecord,
    ExportRecord,
    SamplesRecord,
    TrainingRecord,
)
from pqcad_qat.stages.train import at_targets
from pqcad_qat.stages.work import Work
from pqcad_qat.timing.hardware import hardware

NO_FID = "No FID: evaluation.features names no feature network, so there are figures against full precision only."

NO_SSIM = f"No SSIM: its window of {SSIM_WINDOW} pixels is larger than the images."

OF_LATENTS = (
    "The model makes latents: PSNR is of latents, its peak the range of full precision's, and there is no SSIM; "
)
DECODED, FIRST_CHANNELS = "pictures are decoded by the full-precision VAE.", "pictures show their first channels."

PICTURES = 10
"""Images of a variant that the report shows."""


def sample(work: Work, calibration: CalibrationSet, models: Mapping[str, nn.Module]) -> None:
    """Images of every variant from the same seeds; those that training does not touch are shared by runs side by
    side.
    """
    for name in _shown(work):
        with work.folder.stage(sampling(name)) as stage:
            if not stage.new:
                continue
            file = _images_file(work, name)
            make = partial(_make_images, work, name, calibration, models)
            if name in UNTRAINED or (work.shares_training and VARIANTS[name].weights_from in TRAINED):
                decides = work.decides(sampling(name))
                shared = kept(work.path.parent / SHARED, decides, partial(_in_parts, make))
                with whole_file(file, (shared / file.name).stat().st_size) as draft:
                    shutil.copyfile(shared / file.name, draft)
            else:
                make(file.parent, work.folder.parts(sampling(name)))
            stage.done(SamplesRecord(work.steps(name)))


def _in_parts(make: Callable[[Path, Path], None], folder: Path) -> None:
    make(folder, parts_of(folder))


def _make_images(
    work: Work, name: str, calibration: CalibrationSet, models: Mapping[str, nn.Module], folder: Path, parts: Path
) -> None:
    variant = _variant(work, name, calibration, models)
    count, batch = work.policy.evaluation.images, work.policy.evaluation.batch_size
    with work.bar(f"sample {name}", count * variant.steps) as advance:
        states = sample_states(variant, count, work.policy.evaluation.seed, batch, advance, parts)
    samples = {"latents": states} if work.prepared.model.latent else {"images": to_uint8(states)}
    if (decode := decoder_of(work.prepared.model)) is not None:
        with working(work.console, f"sample {name}: decoding"):
            samples["pictures"] = to_uint8(torch.from_numpy(decode(states[:PICTURES].numpy())))
    save_tensors(samples, folder / _images_file(work, name).name)


def _variant(work: Work, name: str, calibration: CalibrationSet, models: Mapping[str, nn.Module]) -> Sampler:
    scale = work.policy.guidance_scale(name)
    return replace(_sampler(work, name, calibration, models), conditions=work.prepared.conditions, guidance_scale=scale)


def _sampler(work: Work, name: str, calibration: CalibrationSet, models: Mapping[str, nn.Module]) -> Sampler:
    spec, schedule, steps = VARIANTS[name], work.sampled_by(name), work.steps(name)
    if spec.runtime == OPENVINO:
        file = openvino_files(work)[name]
        if spec.weights_from == "export":
            return openvino_variant(name, file, steps)
        return openvino_file_variant(name, file, schedule, steps, work.shape, work.policy.export.batch_size)
    if spec.weights_from is None:
        denoiser = work.prepared.model.denoiser
    elif spec.weights_from == "calibration":
        denoiser = at_targets(work, calibration)
    else:
        denoiser = models[spec.weights_from]
    return pytorch_variant(name, denoiser, schedule, steps, work.shape)


def evaluate(work: Work) -> None:
    """Stage `evaluation`: FID, PSNR and SSIM of every variant's images."""
    with work.folder.stage("evaluation") as stage:
        if not stage.new:
            return
        source, latent = work.policy.features, work.prepared.model.latent
        features = None if source is None else load_features(source)
        samples = {name: _samples(work, name) for name in _shown(work)}
        full = samples[REFERENCE]
        with working(work.console, "evaluation: FID, PSNR, SSIM"):
            figures = {
                name: evaluate_latents(found, full) if latent else evaluate_images(found, full, features)
                for name, found in samples.items()
            }
        asked, protocol = work.policy.evaluation, None
        if features is not None:
            steps, sampler = work.policy.sampler.steps, work.schedule.sampler
            protocol = fid_protocol(features, asked.images, sampler, steps, asked.seed)
        of_latents = OF_LATENTS + (FIRST_CHANNELS if decoder_of(work.prepared.model) is None else DECODED)
        notes = ["" if features else NO_FID, of_latents if latent else "" if has_ssim(full) else NO_SSIM]
        note = " ".join(note for note in notes if note)
        stage.done(EvaluationRecord(figures, protocol, hardware(), note))


def report(work: Work, command: str) -> Path:
    """The report's page, from what all stages noted."""
    with agreed() as first:
        if first:
            _write_report(work, command)
    return work.path / "report.html"


def _write_report(work: Work, command: str) -> None:
    seconds = work.folder.seconds()

    def noted(stage: str, kind: type[Record]) -> Record | None:
        return work.folder.read(stage, kind) if stage in seconds else None

    evaluation = noted("evaluation", EvaluationRecord)
    assert evaluation is not None  # the stage before this one
    facts = RunFacts(
        policy=work.policy,
        plan=work.prepared.plan,
        model=work.prepared.split,
        evaluation=evaluation,
        progressive=noted(PQ, TrainingRecord),
        export=noted("export", ExportRecord),
        baselines=noted("baselines", BaselinesRecord),
        benchmark=noted("benchmark", BenchmarkRecord),
        seconds=seconds,
        warnings=tuple(work.warnings),
        command=command,
    )
    full = _samples(work, REFERENCE)
    samples: dict[str, Any] = {name: _pictures(load_file(_images_file(work, name)), full) for name in _shown(work)}
    write_report(work.path, report_of(facts), curves_of(work.policy, work.path / "logs"), samples)


def _shown(work: Work) -> tuple[str, ...]:
    """The variants that images are made of, less the baselines that have died."""
    return tuple(name for name in sampled(work.policy) if name in work.runnable)


def _images_file(work: Work, name: str) -> Path:
    return work.path / "samples" / f"{name}.safetensors"


def _samples(work: Work, name: str) -> Tensor:
    """A variant's images (uint8), or its latents (float32)."""
    found: Mapping[str, Tensor] = load_file(_images_file(work, name))
    return found["latents"] if "latents" in found else found["images"]


def _pictures(samples: Mapping[str, Tensor], full: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Samples as pictures in [-1, 1]: images as they are, latents as they were decoded.

    Of latents that nothing decodes the first channels, scaled by the range of full precision's.
    """
    images = samples.get("pictures", samples.get("images"))
    if images is not None:
        return np.asarray(images[:PICTURES].numpy() / np.float32(127.5) - 1, np.float32)
    low, high, latents = full.min(), full.max(), samples["latents"][:PICTURES]
    shown = latents[:, : 3 if latents.shape[1] > 2 else 1]
    return np.asarray(((shown - low) / (high - low) * 2 - 1).clamp(-1, 1), np.float32)
