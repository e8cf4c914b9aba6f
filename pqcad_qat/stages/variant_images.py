"""The stages `samples-NAME`: images of every variant from the same seeds.

Not here: how a runtime samples (samplers.py, int8_sampler.py), and what becomes of the images (measure.py).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
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
    images = _Images(policy, prepared, run, console, calibration, models)
    for name in shown_variants(policy, run):
        together = _together(name)
        with run.stage(sampling(name), together=together) as stage:
            if not stage.new:
                continue
            file = images_file(run, name)
            # Shared images are made once in the shared folder, under a name derived from the recipe, then copied.
            if name in UNTRAINED or (shares_training and VARIANTS[name].weights_from in TRAINED):
                decides, store = run.decides(sampling(name)), run.path.parent / SHARED
                shared = shared_folder(store, decides, partial(images.make_shared, name), together=together)
                if is_first():
                    with whole_file(file, (shared / file.name).stat().st_size) as draft:
                        shutil.copyfile(shared / file.name, draft)
            else:
                images.make(name, file.parent, run.unfinished(sampling(name)))
            if is_first():
                stage.done(SamplesRecord(policy.sampling_steps(name), read_notes(file).get(RUNTIME, "")))


def _together(name: str) -> bool:
    """Whether all processes of a run sample a variant's images together."""
    return VARIANTS[name].runtime != OPENVINO


@dataclass(frozen=True)
class _Images:
    """What makes the images of a run's variants: the arguments of `sample`."""

    policy: Policy
    prepared: Prepared
    run: RunFolder
    console: Console
    calibration: CalibrationSet
    models: TrainedModels

    def make_shared(self, name: str, folder: Path) -> None:
        """Make a variant's images in a folder that runs share."""
        self.make(name, folder, parts_folder(folder))

    def make(self, name: str, folder: Path, parts: Path) -> None:
        """Write a variant's file of images into a folder; unfinished batches lie in `parts`."""
        variant, asked = self._sampler(name), self.policy.evaluation
        decoded = self.policy.takes_pictures
        with counting(self.console, f"sample {name}", asked.images * variant.steps) as advance:
            samples = sample_rows(
                variant,
                asked.images,
                asked.seed,
                asked.batch_size,
                kept=images_or_latents(self.prepared.model, decoded=decoded),
                advance=advance,
                batch_folder=parts / variant.runtime,  # a run that goes on elsewhere does not mix runtimes
                together=_together(name),
            )
        if not is_first():
            return
        if pictures_of(samples) is None and (decode := decoder_of(self.prepared.model)) is not None:
            with working(self.console, f"sample {name}: decoding"):
                samples["pictures"] = to_uint8(torch.from_numpy(decode(samples["latents"][:PICTURES].numpy())))
        simulated_in_int8 = VARIANTS[name].runtime == SIMULATED and variant.runtime == "openvino"
        file = folder / images_file(self.run, name).name
        save_tensors(samples, file, {RUNTIME: IN_INT8} if simulated_in_int8 else None)

    def _sampler(self, name: str) -> Sampler:
        """What samples a variant: its own runtime, and full precision for its float steps."""
        conditions, guidance = self.prepared.conditions, self.policy.guidance_scale(name)
        variant = replace(self._of_runtime(name), conditions=conditions, guidance_scale=guidance)
        in_float = self.run.read_always(FLOAT_STEPS, FloatStepsRecord).of(name)
        # a deployed folder holds the graph of its float steps, and its runtime chooses by itself
        if VARIANTS[name].deploys is not None or in_float.start == NO_FLOAT_STEPS:
            return variant
        model, schedule = self.prepared.model, variant.schedule
        full = pytorch_variant(name, model.denoiser, schedule, variant.steps, sample_shape=variant.sample_shape)
        return with_float_steps(variant, full, in_float)

    def _of_runtime(self, name: str) -> Sampler:
        policy, prepared, run, spec = self.policy, self.prepared, self.run, VARIANTS[name]
        schedule, steps = prepared.sampled_by(policy, name), policy.sampling_steps(name)
        shape = prepared.model.sample_shape
        if spec.runtime == OPENVINO:
            file, batch = openvino_files(policy, run)[name], policy.export.batch_size
            if spec.deploys is not None:
                return openvino_variant(name, file, steps)
            return openvino_file_variant(name, file, schedule, steps, sample_shape=shape, batch_size=batch)
        denoiser = prepared.model.denoiser if spec.weights_from is None else self.models.of(spec.weights_from)
        own = None
        if in_int8(policy, prepared, name):
            own = int8_sampler(
                policy, prepared, run, self.console, name=name, model=denoiser, calibration=self.calibration
            )
        return own or pytorch_variant(name, denoiser, schedule, steps, sample_shape=shape)


def shown_variants(policy: Policy, run: RunFolder) -> tuple[str, ...]:
    """Variants that images are made of, without the baselines that failed."""
    made = runnable(policy, run)
    return tuple(name for name in sampled(policy) if name in made)


def images_file(run: RunFolder, name: str) -> Path:
    """File of a variant's images."""
    return run.path / "samples" / f"{name}.safetensors"
