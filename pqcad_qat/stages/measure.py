"""The stages that measure what was made: figures of quality of every variant's images, and the report.

Not here: the images (variant_images.py), metrics (quality/) and pages (report/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from pqcad_qat.machine.processes import agreed
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.evaluation import EMBEDDED
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import (
    FLOAT_STEPS,
    PQ,
    REFERENCE,
    TRAINED,
    WIDTHS,
    exporting,
)
from pqcad_qat.quality.clip_score import clip_name
from pqcad_qat.quality.feature_network import load_features
from pqcad_qat.quality.fidelity import SSIM_WINDOW, evaluate_images, evaluate_latents, fid_protocol, has_ssim, own_floor
from pqcad_qat.quality.image_features import image_features
from pqcad_qat.report.report_files import write_report
from pqcad_qat.stages.clip_scores import with_clip_scores
from pqcad_qat.stages.kept_images import decoder_of
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.reference_set import compared
from pqcad_qat.stages.report_rows import RunFacts, curves_of, report_of
from pqcad_qat.stages.run_folder import Record, RunFolder
from pqcad_qat.stages.stage_dependencies import sampling
from pqcad_qat.stages.stage_records import (
    BaselinesRecord,
    BenchmarkRecord,
    EvaluationRecord,
    ExportRecord,
    FloatStepsRecord,
    SamplesRecord,
    TrainingRecord,
    WidthsRecord,
)
from pqcad_qat.stages.variant_images import PICTURES, images_file, shown_variants
from pqcad_qat.timing.hardware import hardware

NO_DISTANCE = (
    "No Frechet distance: evaluation.features names no feature network, so there are figures against full precision "
    "only."
)

OF_OTHER_PICTURES = (
    "The feature network {0} was made for the pictures of the model {0}; distances of other pictures say little."
)

NO_SSIM = f"No SSIM: its window of {SSIM_WINDOW} pixels is larger than the images."

OF_LATENTS = (
    "The model makes latents: PSNR is of latents, its peak the range of full precision's, and there is no SSIM; "
)
DECODED, FIRST_CHANNELS = "pictures are decoded by the full-precision VAE.", "pictures show their first channels."

OF_DECODED = "The model makes latents: all figures are of the pictures that the full-precision VAE decodes."


def evaluate(policy: Policy, prepared: Prepared, run: RunFolder, console: Console) -> None:
    """Stage `evaluation`: compute distances, PSNR and SSIM of every variant's images."""
    with run.stage("evaluation") as stage:
        if not stage.new:
            return
        section, protocol, source = policy.evaluation, None, policy.features
        features = None if source is None else compared(policy, prepared, run, load_features(source), console=console)
        of_latents = prepared.model.latent and features is None
        full = _samples(run, REFERENCE, of_latents)
        figures = {}
        with working(console, "evaluation: distances, PSNR, SSIM") as tell:
            known = None if features is None else image_features(features.network, full)
            for name in shown_variants(policy, run):
                tell(f"evaluation: {name}")
                own = _samples(run, name, of_latents)
                figures[name] = (
                    evaluate_latents(own, full) if of_latents else evaluate_images(own, full, features, known)
                )
        clip = "" if section.clip is None else clip_name(Path(section.clip))
        if clip:
            pictures = partial(_samples, run, latents=False)
            figures = with_clip_scores(figures, pictures, policy, prepared, console=console)
        if features is not None:
            steps, sampler = policy.sampler.steps, prepared.schedule.sampler
            protocol = fid_protocol(features, section.images, sampler, steps, seed=section.seed)
            if features.reference_kind == "full-precision":
                protocol = replace(protocol, floor=own_floor(figures[REFERENCE]))
        notes = [*_on_features(policy), *_on_samples(prepared, full, of_latents)]
        stage.done(EvaluationRecord(figures, protocol, hardware(), " ".join(notes), clip))


def _on_features(policy: Policy) -> Iterator[str]:
    """Notes on the feature network that a reader of the figures needs."""
    source = policy.features
    if source is None:
        yield NO_DISTANCE
    elif source.startswith(EMBEDDED) and source != policy.model.source:
        yield OF_OTHER_PICTURES.format(source)


def _on_samples(prepared: Prepared, full: Tensor, of_latents: bool) -> Iterator[str]:
    """Notes on what the figures are of, by full precision's latents or pictures."""
    if of_latents:
        yield OF_LATENTS + (FIRST_CHANNELS if decoder_of(prepared.model) is None else DECODED)
        return
    if prepared.model.latent:
        yield OF_DECODED
    if not has_ssim(full):
        yield NO_SSIM


def report(policy: Policy, prepared: Prepared, run: RunFolder, command: str) -> Path:
    """Write the report's page from the records of all stages, and return its path."""
    with agreed() as first:
        if first:
            _write_report(policy, prepared, run, command)
    return run.path / "report.html"


def _write_report(policy: Policy, prepared: Prepared, run: RunFolder, command: str) -> None:
    seconds = run.seconds()

    def noted(stage: str, kind: type[Record]) -> Record | None:
        return run.read(stage, kind) if stage in seconds else None

    records = {stage: noted(stage, TrainingRecord) for stage in TRAINED}
    ends = {stage: record.end for stage, record in records.items() if record is not None and record.end is not None}
    evaluation = noted("evaluation", EvaluationRecord)
    assert evaluation is not None  # this stage ran just before the report
    facts = RunFacts(
        policy=policy,
        plan=prepared.plan,
        model=prepared.split,
        walks=(
            prepared.schedule.walk(policy.sampler.steps),
            prepared.student_schedule(policy).walk(policy.distillation.student_steps),
        ),
        float_steps=run.read_always(FLOAT_STEPS, FloatStepsRecord),
        evaluation=evaluation,
        widths=noted(WIDTHS, WidthsRecord),
        progressive=noted(PQ, TrainingRecord),
        ends=ends,
        exports={name: record for name in policy.deployed if (record := noted(exporting(name), ExportRecord))},
        baselines=noted("baselines", BaselinesRecord),
        benchmark=noted("benchmark", BenchmarkRecord),
        samples={name: run.read_always(sampling(name), SamplesRecord) for name in shown_variants(policy, run)},
        seconds=seconds,
        warnings=tuple(run.warnings()),
        command=command,
    )
    full = _samples(run, REFERENCE, prepared.model.latent)
    samples: dict[str, Any] = {
        name: _pictures(load_file(images_file(run, name)), full) for name in shown_variants(policy, run)
    }
    write_report(run.path, report_of(facts), curves_of(policy, run.path / "logs", ends), samples)


def _samples(run: RunFolder, name: str, latents: bool) -> Tensor:
    """Load a variant's pictures (uint8), or its latents (float32)."""
    tensors: Mapping[str, Tensor] = load_file(images_file(run, name))
    return tensors["latents"] if latents else tensors["images" if "images" in tensors else "pictures"]


def _pictures(samples: Mapping[str, Tensor], full: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Turn samples into pictures in [-1, 1]: images are scaled, and latents are shown as the VAE decoded them.

    Latents without a decoder are shown by their first channels, scaled by the range of the full-precision latents.
    """
    images = samples.get("pictures", samples.get("images"))
    if images is not None:
        return np.asarray(images[:PICTURES].numpy() / np.float32(127.5) - 1, np.float32)
    low, high = full.min(), full.max()
    latents = samples["latents"][:PICTURES]
    shown = latents[:, : 3 if latents.shape[1] > 2 else 1]
    return np.asarray(((shown - low) / (high - low) * 2 - 1).clamp(-1, 1), np.float32)
