"""A model that samples, whichever runtime computes it: full precision, quantized in PyTorch, or a deployed OpenVINO
folder.

Not here: the quality of its images (quality/fidelity.py), or its speed (timing/latency.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pqcad_qat.data.images import to_uint8
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.machine.tensor_files import Rows, gathered
from pqcad_qat.models.conditions import (
    GUIDANCE,
    NULL_CLASS,
    Conditioned,
    ConditionSet,
    check_guidance,
    chosen_conditions,
    conditioned,
)
from pqcad_qat.models.denoiser import is_latent, predict
from pqcad_qat.models.families.family import condition_inputs
from pqcad_qat.models.guidance import guided_call
from pqcad_qat.models.model_folder import SCHEDULER_CONFIG, check_no_single_file, denoiser_folder, local
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.models.pipeline_parts import VAE
from pqcad_qat.policy.schema import ConditionsPolicy
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.quantization.student_folder import is_quantized_folder, load_full_precision, load_quantized
from pqcad_qat.sampling.precision_by_time import StepsInFloat, by_time
from pqcad_qat.sampling.trajectory import NoiseSchedule, distilled_steps, initial_noise, noise_schedule, trajectory
from pqcad_qat.serving.deployed_folder import MANIFEST
from pqcad_qat.serving.manifest import PART_FOLDERS
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.vae_runtime import PictureDecoder
from pqcad_qat.stages.kept_images import decoder_of
from pqcad_qat.timing.latency import compile_for_latency

Float32 = npt.NDArray[np.float32]
NumpyCondition = Mapping[str, npt.NDArray[Any]]
Runtime = Literal["pytorch", "openvino"]

DEFAULT_STEPS = 20
"""Number of sampling steps for a full-precision folder that names none."""


_NOTHING_TO_SAMPLE = (
    "{}: got a folder with none of manifest.json, quantization/plan.json, openvino/, unet/config.json or "
    "transformer/config.json; allowed "
    "a deployed OpenVINO folder, a quantized student, a run, or a diffusers model"
)


@dataclass(frozen=True)
class Sampler:
    """A denoiser with everything needed to sample from it.

    Attributes:
        name: name of its row in the report.
        runtime: runtime that computes the denoiser.
        predict: function (x_t (B, C, H, W) float32, t, condition) -> prediction of the same shape.
        schedule: noise schedule that it samples with.
        steps: number of sampling steps.
        sample_shape: shape (C, H, W) of one sample.
        conditions: conditions that its images choose from.
        guidance_scale: scale of classifier-free guidance; 1 for none.
        decode: function x_0 (N, C, h, w) -> pictures (N, 3, H, W), about in [-1, 1], for a latent model; None without a
            VAE.
        modules: PyTorch modules that compute its predictions; `sample_rows` holds them on an accelerator.
        undecoded: whether it makes latents of one or three channels, for which this package has no decoder.
    """

    name: str
    runtime: Runtime
    predict: Callable[[Float32, float, NumpyCondition], Float32]
    schedule: NoiseSchedule
    steps: int
    sample_shape: tuple[int, int, int]
    conditions: ConditionSet = field(default_factory=ConditionSet)
    guidance_scale: float = 1.0
    decode: Callable[[Float32], Float32] | None = None
    modules: tuple[nn.Module, ...] = ()
    undecoded: bool = False

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of its pictures; the decoder of latents is asked."""
        if self.decode is None:
            return self.sample_shape
        _, channels, height, width = self.decode(np.zeros((1, *self.sample_shape), np.float32)).shape
        return channels, height, width

    @property
    def latent(self) -> bool:
        return self.undecoded or self.decode is not None or is_latent(self.sample_shape)


def pytorch_variant(
    name: str, denoiser: nn.Module, schedule: NoiseSchedule, steps: int, *, sample_shape: tuple[int, int, int]
) -> Sampler:
    """Sampler of a PyTorch denoiser, full precision or quantized; its weights must not change while it samples."""
    denoiser.eval()

    @torch.no_grad()
    def call(x_t: Float32, t: float, condition: NumpyCondition) -> Float32:
        with frozen_weights(denoiser):
            tensors = {name: torch.from_numpy(value) for name, value in condition.items()}
            prediction: Float32 = predict(denoiser, torch.from_numpy(x_t), t, tensors).numpy()
            return prediction

    return Sampler(name, "pytorch", call, schedule, steps, sample_shape, modules=(denoiser,))


def with_float_steps(variant: Sampler, full: Sampler, in_float: StepsInFloat) -> Sampler:
    """Return the sampler some of whose steps `full` computes."""
    predict = by_time(full.predict, variant.predict, variant.schedule, in_float)
    return replace(variant, predict=predict, modules=(*variant.modules, *full.modules))


def openvino_variant(name: str, folder: Path, steps: int | None = None) -> Sampler:
    """Sampler of a deployed folder, run by this package's runtime from the unchanged files."""
    return deployed_variant(name, OVUNet2DModel.from_pretrained(folder), steps)


def deployed_variant(name: str, model: OVUNet2DModel, steps: int | None) -> Sampler:
    """Sampler of a deployed folder that is loaded already."""
    where = str(model.folder / SCHEDULER_CONFIG)
    schedule, own = noise_schedule(model.scheduler_config, where), distilled_steps(model.scheduler_config, where)
    variant = Sampler(name, "openvino", model.predict, schedule, steps or own or DEFAULT_STEPS, model.sample_shape)
    if PART_FOLDERS[VAE] not in model.manifest.get("parts", {}):
        return variant
    load = cache(partial(PictureDecoder, model.folder, model.sample_shape))
    return replace(variant, decode=lambda latents: load()(latents))


def openvino_file_variant(
    name: str, xml: Path, schedule: NoiseSchedule, steps: int, *, sample_shape: tuple[int, int, int], batch_size: int
) -> Sampler:
    """Sampler of a baseline: a plain OpenVINO file (inputs `sample`, `timestep` and conditions, fixed batch), with
    OpenVINO's defaults.
    """
    request = compile_for_latency(xml, {}).create_infer_request()

    def call(x_t: Float32, t: float, condition: NumpyCondition) -> Float32:
        predictions = []
        for first in range(0, len(x_t), batch_size):
            count = min(batch_size, len(x_t) - first)
            # the file has a fixed batch: repeat the last sample to fill the last batch
            rows = np.minimum(np.arange(first, first + batch_size), first + count - 1)
            named = {"sample": x_t[rows], **{name: value[rows] for name, value in condition.items()}}
            request.infer({**named, "timestep": np.full(batch_size, t, schedule.timestep_dtype)})
            predictions.append(np.array(request.get_output_tensor(0).data[:count]))
        return np.concatenate(predictions)

    return Sampler(name, "openvino", call, schedule, steps, sample_shape)


def open_folder(
    source: str,
    steps: int | None = None,
    conditions: ConditionsPolicy | None = None,
    guidance_scale: float | None = None,
    *,
    own: OwnModel | None = None,
) -> Sampler:
    """Open a run, a deployed OpenVINO folder, a quantized student, or a full-precision diffusers model as a sampler.

    Args:
        source: the folder, `embedded:NAME`, or a hub id.
        steps: number of sampling steps; by default the number that the folder was made for.
        conditions: conditions of a conditional model; by default all classes.
        guidance_scale: scale of classifier-free guidance; by default the one that the folder was made for.
        own: user's own module from which a quantized student was made.

    Raises:
        ModelError: the folder is none of these, or its model takes other conditions.
    """
    variant, takes, scheduler = _opened(source, steps, guidance_scale, own)
    section = conditions or ConditionsPolicy()
    if section.unconditional_class is None:
        section = section.model_copy(update={"unconditional_class": scheduler.get(NULL_CLASS)})
    chosen, scale = chosen_conditions(takes, section), _scale(guidance_scale, scheduler)
    check_guidance(scale, chosen)
    return replace(variant, conditions=chosen, guidance_scale=scale)


def _scale(given: float | None, scheduler: Mapping[str, Any]) -> float:
    """The guidance scale that is given, or the one that the folder's scheduler config names."""
    return given or float(scheduler.get(GUIDANCE, 1.0))


def _opened(
    source: str, steps: int | None, guidance_scale: float | None, module: OwnModel | None
) -> tuple[Sampler, Conditioned, Mapping[str, Any]]:
    """Return a folder's sampler without conditions, the conditions that its model takes, and its scheduler config."""
    path = local(source)
    folder = path or Path(source)
    for deployed in (folder, folder / "openvino"):
        if path and (deployed / MANIFEST).is_file():
            runtime = OVUNet2DModel.from_pretrained(deployed)
            takes = Conditioned(source, condition_inputs(runtime.conditions))
            variant = deployed_variant(folder.name, runtime, steps)
            unguided = _scale(guidance_scale, runtime.scheduler_config) == 1.0
            runtime.in_float = _as_sampled(runtime.in_float, variant, unguided)
            return variant, takes, runtime.scheduler_config
    if path and is_quantized_folder(folder):
        model, _, own = load_quantized(folder, module)
    elif not path or (denoiser_folder(folder) / "config.json").is_file():
        model, own = load_model(source), DEFAULT_STEPS
    else:
        check_no_single_file(folder)
        raise ModelError(_NOTHING_TO_SAMPLE.format(folder))
    schedule = noise_schedule(model.scheduler_config)
    variant = pytorch_variant(folder.name, model.denoiser, schedule, steps or own, sample_shape=model.sample_shape)
    full = load_full_precision(folder, module) if path and is_quantized_folder(folder) else None
    if full is not None:
        denoiser, in_float = full
        first = pytorch_variant(folder.name, denoiser, schedule, variant.steps, sample_shape=model.sample_shape)
        unguided = _scale(guidance_scale, model.scheduler_config) == 1.0
        variant = with_float_steps(variant, first, _as_sampled(in_float, variant, unguided))
    return (
        replace(variant, decode=decoder_of(model), undecoded=model.decoder),
        conditioned(model),
        model.scheduler_config,
    )


def _as_sampled(in_float: StepsInFloat, variant: Sampler, unguided: bool) -> StepsInFloat:
    """The float steps of a sampler whose number of steps and guidance may be others than those of the folder.

    One call of the denoiser cannot know where guided steps land, so under guidance no step is taken in parts.
    """
    return in_float.along(variant.schedule.walk(variant.steps) if unguided else ())


def sample_images(
    variant: Sampler, count: int, seed: int, batch_size: int, *, advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Sample uint8 images (count, C, H, W) from a seed, as `sample_rows` does; latents are decoded."""

    def kept(x_0: Float32) -> Rows:
        return {"images": to_uint8(torch.from_numpy(x_0 if variant.decode is None else variant.decode(x_0)))}

    return sample_rows(variant, count, seed, batch_size, kept=kept, advance=advance)["images"]


def sample_states(
    variant: Sampler, count: int, seed: int, batch_size: int, *, advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Sample float32 x_0 (count, C, H, W) from a seed, as `sample_rows` does."""

    def kept(x_0: Float32) -> Rows:
        return {"states": torch.from_numpy(x_0)}

    return sample_rows(variant, count, seed, batch_size, kept=kept, advance=advance)["states"]


def sample_rows(
    variant: Sampler,
    count: int,
    seed: int,
    batch_size: int,
    *,
    kept: Callable[[Float32], Rows],
    advance: Callable[[int], None] = lambda _: None,
    batch_folder: Path | None = None,
    together: bool = False,
) -> dict[str, Tensor]:
    """Sample from a seed, and return what is kept of the images, by name.

    Sample k starts from the same noise and condition for every variant and batch size. `kept` gets the x_0 (B, C, H, W)
    of a batch, and its result alone stays in memory: 50,000 images of 256x256 take 39 GB as numbers. `advance` is
    called after every sampling step with the number of images in the batch. `batch_folder` keeps finished batches, so
    that a later process resumes after them. With `together`, all processes of a run call this, and each makes some.
    """

    def batch(first: int, size: int) -> Rows:
        noise = initial_noise(seed, first, size, variant.sample_shape)
        chosen, null = variant.conditions.drawn(seed, first, size), variant.conditions.unconditional
        condition, unconditional = (
            {name: value.numpy() for name, value in tensors.items()} for tensors in (chosen, null)
        )
        x_0, follow = noise, guided_call(variant.predict, condition, unconditional, variant.guidance_scale)
        for step in trajectory(follow, noise, variant.schedule, variant.steps):
            x_0 = np.asarray(step.x_s, dtype=np.float32)
            advance(size)
        return kept(x_0)

    with on_accelerator(*variant.modules):
        return gathered(
            batch_folder,
            count,
            batch_size,
            batch,
            work=f"sampling {variant.name}: images",
            advance=lambda rows: advance(rows * variant.steps),
            together=together,
        )
