"""Text-to-image with one deployed folder: its text encoders, denoiser and VAE decoder turn prompts into pictures.

Not here: the single parts (runtime.py, part_runtime.py), the conditions made from a prompt (models/families/), and the
sampler (sampling/trajectory.py). Needs openvino, numpy and tokenizers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.models.families.prompt_layouts import Arrays, PromptLayout, Wanted
from pqcad_qat.models.families.table import prompt_layouts
from pqcad_qat.sampling.schedulers import STEPS
from pqcad_qat.sampling.solvers import solver_of, solver_walk
from pqcad_qat.sampling.trajectory import guided, initial_noise, later_noise, noise_schedule
from pqcad_qat.serving.deployed_folder import EMBEDDED_GUIDANCE, MANIFEST, MODEL_INDEX, read_manifest
from pqcad_qat.serving.manifest import PART_FOLDERS, SCHEDULER_CONFIG, VAE_ENCODER, check_listed
from pqcad_qat.serving.part_runtime import PromptEncoder
from pqcad_qat.serving.per_size import Size
from pqcad_qat.serving.picture_changes import Changes, beginning
from pqcad_qat.serving.runtime import Float32, OVUNet2DModel
from pqcad_qat.serving.vae_runtime import PictureDecoder, PictureEncoder

Pictures = npt.NDArray[np.uint8]
"""Pictures (N, 3, H, W)."""


class _Droppable(Protocol):
    def drop(self) -> None: ...


Part = TypeVar("Part", bound=_Droppable)
"""A part of a pipeline, whose memory can be freed."""


@dataclass(frozen=True)
class TextToImage:
    """A deployed text-to-image pipeline, compiled. It also changes pictures by a prompt, whole or under a mask.

    Attributes:
        denoiser: the denoiser, whose manifest and scheduler config decide the sampling.
        encoders: text encoders by part.
        layout: how the encoders' outputs become the denoiser's conditions.
        decoder: decoder of latents.
        encoder: encoder of pictures to begin from; None in a folder without one.
        zero_negative: whether guidance without a negative prompt uses zeros as the unconditional condition, as SDXL
            does; otherwise it uses the empty prompt.
        in_turn: whether a part's memory is freed once the picture needs it no longer.
    """

    denoiser: OVUNet2DModel
    encoders: Mapping[str, PromptEncoder]
    layout: PromptLayout
    decoder: PictureDecoder
    encoder: PictureEncoder | None
    zero_negative: bool
    in_turn: bool

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "CPU",
        properties: Mapping[str, Any] | None = None,
        *,
        in_turn: bool = False,
    ) -> Self:
        """Load a deployed folder, or the folder of a run that holds one.

        Args:
            folder: folder with manifest.json or openvino/manifest.json in it.
            device: OpenVINO's name of the device.
            properties: OpenVINO properties that override the runtime's defaults, such as ``{"INFERENCE_PRECISION_HINT":
                "f32"}``.
            in_turn: whether text encoders, denoiser and VAE take memory one after the other; each is then read and
                compiled anew for each call.

        Raises:
            ModelError: the folder is no deployed folder, is damaged, or lacks parts that a prompt needs; or tokenizers
                is not installed.
        """
        path = Path(folder) / "openvino" if (Path(folder) / "openvino" / MANIFEST).is_file() else Path(folder)
        denoiser = OVUNet2DModel(path, device, properties)  # this checks every file
        present = denoiser.manifest.get("parts", {})
        check_listed(denoiser.manifest, path / MANIFEST, MODEL_INDEX)
        index = read_json(path / MODEL_INDEX)
        pipeline = str(index.get("_class_name"))
        if (layout := prompt_layouts().get(pipeline)) is None:
            raise ModelError(
                f"{path / MODEL_INDEX}: _class_name: got {pipeline[:100]!r}; "
                f"allowed for a prompt {', '.join(prompt_layouts())}"
            )
        if denoiser.scheduler_config.get(STEPS) is None:
            raise ModelError(
                f"{path / SCHEDULER_CONFIG}: got no {STEPS}; allowed the number of steps that the denoiser was made for"
            )
        if missing := [part for part in (*layout.encoders, PART_FOLDERS["vae"]) if part not in present]:
            raise ModelError(
                f"{path}: got no {', '.join(missing)}; allowed for a prompt a folder that was exported with them "
                "(policy: pipeline)"
            )
        taken = [part for part in (*layout.encoders, *layout.optional) if part in present]

        def passing(part: Part) -> Part:
            if in_turn:
                part.drop()
            return part

        passing(denoiser)
        encoders = {part: passing(PromptEncoder(path, part, device, properties)) for part in taken}
        decoder = passing(PictureDecoder(path, denoiser.sample_shape, device, properties))
        encoder = None
        if VAE_ENCODER in present:
            encoder = passing(PictureEncoder(path, denoiser.sample_shape[0], device, properties))
        zero_negative = bool(index.get("force_zeros_for_empty_prompt"))
        return cls(denoiser, encoders, layout, decoder, encoder, zero_negative=zero_negative, in_turn=in_turn)

    @property
    def steps(self) -> int:
        """Number of sampling steps that the denoiser was distilled for."""
        return int(self.denoiser.scheduler_config[STEPS])

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance that the denoiser was made for; 1 where guidance was distilled."""
        return float(self.denoiser.scheduler_config.get("guidance_scale", 1.0))

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative: str | Sequence[str] | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        *,
        seed: int = 0,
        count: int = 1,
        size: Size | None = None,
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        solver: str | None = None,
        advance: Callable[[int], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Pictures:
        """Make pictures (N, 3, H, W) in uint8: `count` of each prompt, those of one prompt behind each other.

        Args:
            prompt: description of the picture, or several. Words beyond an encoder's tokens are left out, with a
                warning.
            negative: description of what to avoid, or one for each prompt; it needs guidance.
            guidance: scale of classifier-free guidance; None takes the denoiser's `guidance`.
            steps: number of sampling steps; None takes the denoiser's `steps`.
            seed: seed of the noise; picture k of a seed always starts from the same noise.
            count: number of pictures of each prompt, each from its own noise.
            size: height and width of the pictures in pixels; None takes that of `image`, or the folder's own.
            image: picture to begin from, (H, W, 3) in uint8 or what numpy makes such an array of, like PIL's images.
            mask: where `image` is painted anew, (H, W) or (H, W, 1): true, above 127 of uint8, or above 0.5 of floats.
            strength: share of the sampling steps that change `image`, over 0 to 1; None takes 0.8, or 1 with a mask.
            solver: another sampler than the folder's own: euler, dpm++2m, unipc or lcm (sampling/solvers.py).
            advance: function called after each sampling step with the number of pictures.
            stop: function asked before each sampling step; when it returns True, no picture is returned, (0, 3, H, W).

        Raises:
            ModelError: a negative prompt is given without guidance; there is no prompt or no picture asked for; the
                sampler does not support this number of steps; the folder does not take the size, or has no VAE encoder
                for an image; or image, mask and strength do not fit.
        """
        scale = self.guidance if guidance is None else guidance
        if negative is not None and scale == 1.0:
            raise ModelError(
                "guidance: got a scale of 1, at which there is no pass that a negative prompt could condition; "
                "allowed with it any other scale"
            )
        prompts, negatives = _paired(prompt, negative, count)
        self._warn_of_cuts(*prompts, *(text or "" for text in negatives))
        start = beginning(image, mask, strength, factor=self.decoder.factor)
        latents = self._latent_size(size, None if start is None else start.size)
        if self.in_turn:
            self._check_unchanged()
        with self._needed(*self.encoders.values()):
            condition = self._conditions(prompts, latents, count)
            unconditional = {} if scale == 1.0 else self._unconditional(condition, negatives, latents, count)

        taken = self.steps if steps is None else steps
        schedule = noise_schedule(self.denoiser.scheduler_config)
        walk = solver_walk(solver, schedule, taken)
        # under guidance no step is taken in parts: they were measured without it
        in_float = self.denoiser.in_float.along(() if unconditional else walk)

        def follow(x_t: Float32, t: float) -> Float32:
            if not unconditional:
                return self.denoiser.predict(x_t, t, condition, in_float=in_float)
            # guidance: both passes run as one batch, conditional samples first
            both = {name: np.concatenate([value, unconditional[name]]) for name, value in condition.items()}
            prediction = self.denoiser.predict(np.concatenate([x_t, x_t]), t, both, in_float=in_float)
            return guided(prediction[: len(x_t)], prediction[len(x_t) :], scale)

        x = initial_noise(seed, 0, len(prompts) * count, (self.denoiser.sample_shape[0], *latents))
        changes = None
        if start is not None and self.encoder is not None:
            with self._needed(self.encoder):
                changes = Changes(start, self.encoder(start.picture), x, schedule)
        if changes is not None:
            walk = changes.walk(walk)
            x = changes.begun(walk[0][0])
        sampler = None
        if solver is not None:
            sampler = solver_of(solver, schedule, walk, lambda step: later_noise(seed, step, len(x), x.shape[1:]))
        if sampler is not None and changes is None:
            x = np.asarray(sampler.begun(x), np.float32)
        with self._needed(self.denoiser):
            for (t, s), later in zip_longest(walk, walk[1:]):
                if stop():
                    return np.empty((0, 3, *(side * self.decoder.factor for side in latents)), np.uint8)
                prediction = follow(x, t)
                x = schedule.step(prediction, x, t, s) if sampler is None else sampler.step(prediction, x, t)
                x = np.asarray(x if changes is None else changes.kept(x, later and later[0]), np.float32)
                advance(len(x))
        with self._needed(self.decoder):
            return np.asarray(np.rint((self.decoder(x).clip(-1, 1) + 1) * 127.5), np.uint8)

    @staticmethod
    def pil(pictures: Pictures) -> list[Any]:
        """Turn pictures (N, 3, H, W) into images of the library PIL, which has to be installed."""
        from PIL import Image

        return [Image.fromarray(picture) for picture in pictures.transpose(0, 2, 3, 1)]

    def embeddings(self, prompt: str, latents: Size | None = None) -> Arrays:
        """The denoiser's conditions for a prompt, by name, (1, ...), for latents of a size (None: the folder's own)."""
        height, width = latents or self.denoiser.sample_shape[1:]
        shapes = {condition["name"]: tuple(condition["shape"]) for condition in self.denoiser.conditions}
        picture = (height * self.decoder.factor, width * self.decoder.factor)
        guidance = float(self.denoiser.scheduler_config.get(EMBEDDED_GUIDANCE, self.layout.guidance))
        return self.layout.conditions(self.encoders, prompt, Wanted(shapes, picture, guidance))

    @contextmanager
    def _needed(self, *parts: _Droppable) -> Iterator[None]:
        """Where parts take memory in turn, free that of these at the block's end."""
        try:
            yield
        finally:
            for part in parts if self.in_turn else ():
                part.drop()

    def _check_unchanged(self) -> None:
        """Raise ModelError where the folder, which is read again, is not the one that was loaded."""
        folder = self.denoiser.folder
        if read_manifest(folder) != self.denoiser.manifest:
            raise ModelError(f"{folder / MANIFEST}: got another export than was loaded; allowed the same: load it anew")

    def _conditions(self, prompts: Sequence[str], latents: Size, count: int) -> Arrays:
        """The denoiser's conditions for `count` pictures of each prompt, by name."""
        found = [self.embeddings(prompt, latents) for prompt in prompts]
        return {name: np.repeat(np.concatenate([each[name] for each in found]), count, 0) for name in found[0]}

    def _latent_size(self, asked: Any, of_image: Size | None) -> Size:
        """Size of the latents of the pictures that are asked for, or of an image, or the folder's own.

        Raises:
            ModelError: the folder does not take it, or it is not that of the image, or the image cannot be encoded.
        """
        if of_image is not None and self.encoder is None:
            raise ModelError(
                f"{self.denoiser.folder}: image: got one; allowed with a folder that holds {VAE_ENCODER}: one of a "
                "pipeline that OpenVINO GenAI has, exported with its VAE and text encoders"
            )
        factor, own = self.decoder.factor, self.denoiser.sample_shape[1:]
        found = of_image or (own[0] * factor, own[1] * factor)
        if asked is not None:
            known = isinstance(asked, list | tuple) and len(asked) == 2
            if not known or not all(isinstance(side, int) and not isinstance(side, bool) for side in asked):
                raise ModelError(f"size: got {shown(asked)}; allowed height and width in pixels, such as (512, 512)")
            if of_image not in (None, tuple(asked)):
                raise ModelError(f"image: got {_by(of_image)} pixels; allowed {_by(asked)}, the size that is asked for")
            found = (asked[0], asked[1])
        latents = (found[0] // factor, found[1] // factor)
        if any(side % factor for side in found) or not self.denoiser.sizes.take(latents):
            sizes, own_pixels = self.denoiser.sizes, _by([side * factor for side in own])
            allowed = f"multiples of {factor * sizes.multiple}" if sizes.free else f"{own_pixels}, the folder's own"
            raise ModelError(f"{'size' if of_image is None else 'image'}: got {_by(found)} pixels; allowed {allowed}")
        return latents

    def _warn_of_cuts(self, *prompts: str) -> None:
        """Warn of words that an encoder does not read, as diffusers does."""
        for prompt in prompts:
            for part, encoder in self.encoders.items():
                if cut := encoder.cut(prompt):
                    warnings.warn(
                        f"{part} reads {encoder.tokens} tokens of a prompt; left out of this one: {cut!r}", stacklevel=3
                    )

    def _unconditional(self, condition: Arrays, negatives: Sequence[str | None], latents: Size, count: int) -> Arrays:
        """The conditions of guidance's unconditional pass."""
        if negatives[0] is None and self.zero_negative:
            return {name: value if name == "time_ids" else np.zeros_like(value) for name, value in condition.items()}
        return self._conditions([text or "" for text in negatives], latents, count)


def _paired(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, count: int
) -> tuple[list[str], list[str | None]]:
    """The prompts, and for each its negative prompt.

    Raises:
        ModelError: there is no prompt, another number of negative ones, or no picture asked for.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    several = not (negative is None or isinstance(negative, str))
    negatives = list(cast(Sequence[str | None], negative if several else [negative] * len(prompts)))
    if not prompts or len(negatives) != len(prompts):
        raise ModelError(
            f"prompts: got {len(prompts)} and {len(negatives)} negative ones; allowed one or more, and as many "
            "negative ones, or one for all"
        )
    if count < 1:
        raise ModelError(f"count: got {count}; allowed 1 and more pictures of each prompt")
    return prompts, negatives


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
