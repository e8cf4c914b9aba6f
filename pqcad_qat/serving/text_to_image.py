"""Text-to-image with one deployed folder: its text encoders, denoiser and VAE decoder turn prompts into pictures.

Not here: the single parts (runtime.py, part_runtime.py), the conditions made from a prompt (models/families/), and the
sampler (sampling/trajectory.py). Needs openvino, numpy and tokenizers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json
from pqcad_qat.models.families.prompt_layouts import Arrays, PromptLayout, Wanted
from pqcad_qat.models.families.table import prompt_layouts
from pqcad_qat.sampling.schedulers import STEPS
from pqcad_qat.sampling.trajectory import guided, initial_noise, noise_schedule, trajectory
from pqcad_qat.serving.deployed_folder import EMBEDDED_GUIDANCE, MANIFEST, MODEL_INDEX
from pqcad_qat.serving.manifest import PART_FOLDERS, SCHEDULER_CONFIG, check_listed
from pqcad_qat.serving.part_runtime import PictureDecoder, PromptEncoder
from pqcad_qat.serving.runtime import Float32, OVUNet2DModel


@dataclass(frozen=True)
class TextToImage:
    """A deployed text-to-image pipeline, compiled.

    Attributes:
        denoiser: the denoiser, whose manifest and scheduler config decide the sampling.
        encoders: text encoders by part.
        layout: how the encoders' outputs become the denoiser's conditions.
        decoder: decoder of latents.
        zero_negative: whether guidance without a negative prompt uses zeros as the unconditional condition, as SDXL
            does; otherwise it uses the empty prompt.
    """

    denoiser: OVUNet2DModel
    encoders: Mapping[str, PromptEncoder]
    layout: PromptLayout
    decoder: PictureDecoder
    zero_negative: bool

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "CPU", properties: Mapping[str, Any] | None = None
    ) -> Self:
        """Load a deployed folder, or the folder of a run that holds one.

        Args:
            folder: folder with manifest.json or openvino/manifest.json in it.
            device: OpenVINO's name of the device.
            properties: OpenVINO properties that override the runtime's defaults, such as ``{"INFERENCE_PRECISION_HINT":
                "f32"}``.

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
        encoders = {part: PromptEncoder(path, part, device, properties) for part in taken}
        decoder = PictureDecoder(path, denoiser.sample_shape, device, properties)
        return cls(denoiser, encoders, layout, decoder, bool(index.get("force_zeros_for_empty_prompt")))

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
        prompt: str,
        negative: str | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        *,
        seed: int = 0,
        count: int = 1,
        advance: Callable[[int], None] = lambda _: None,
    ) -> npt.NDArray[np.uint8]:
        """Make pictures (count, 3, H, W) of a prompt, in uint8.

        Args:
            prompt: description of the picture. Words beyond an encoder's tokens are left out, with a warning.
            negative: description of what to avoid; it needs guidance.
            guidance: scale of classifier-free guidance; None takes the denoiser's `guidance`.
            steps: number of sampling steps; None takes the denoiser's `steps`.
            seed: seed of the noise; picture k of a seed always starts from the same noise.
            count: number of pictures, each from its own noise.
            advance: function called after each sampling step with the number of pictures.

        Raises:
            ModelError: a negative prompt is given without guidance, or the sampler does not support this number of
                steps.
        """
        scale = self.guidance if guidance is None else guidance
        if negative is not None and scale == 1.0:
            raise ModelError(
                "guidance: got a scale of 1, at which there is no pass that a negative prompt could condition; "
                "allowed with it any other scale"
            )
        self._warn_of_cuts(prompt, negative or "")
        condition = self.embeddings(prompt)
        unconditional = {} if scale == 1.0 else self._unconditional(condition, negative)

        taken = self.steps if steps is None else steps
        schedule = noise_schedule(self.denoiser.scheduler_config)
        # under guidance no step is taken in parts: they were measured without it
        in_float = self.denoiser.in_float.along(() if unconditional else schedule.walk(taken))

        def follow(x_t: Float32, t: float) -> Float32:
            if not unconditional:
                return self.denoiser.predict(x_t, t, condition, in_float=in_float)
            # guidance: both passes run as one batch, conditional samples first
            both = {
                name: np.repeat(np.concatenate([value, unconditional[name]]), len(x_t), 0)
                for name, value in condition.items()
            }
            prediction = self.denoiser.predict(np.concatenate([x_t, x_t]), t, both, in_float=in_float)
            return guided(prediction[: len(x_t)], prediction[len(x_t) :], scale)

        x = initial_noise(seed, 0, count, self.denoiser.sample_shape)
        for step in trajectory(follow, x, schedule, taken):
            x = np.asarray(step.x_s, np.float32)
            advance(count)
        return np.asarray(np.rint((self.decoder(x).clip(-1, 1) + 1) * 127.5), np.uint8)

    def embeddings(self, prompt: str) -> Arrays:
        """The denoiser's conditions for a prompt, by name, (1, ...)."""
        _, height, width = self.denoiser.sample_shape
        shapes = {condition["name"]: tuple(condition["shape"]) for condition in self.denoiser.conditions}
        picture = (height * self.decoder.factor, width * self.decoder.factor)
        guidance = float(self.denoiser.scheduler_config.get(EMBEDDED_GUIDANCE, self.layout.guidance))
        return self.layout.conditions(self.encoders, prompt, Wanted(shapes, picture, guidance))

    def _warn_of_cuts(self, *prompts: str) -> None:
        """Warn of words that an encoder does not read, as diffusers does."""
        for prompt in prompts:
            for part, encoder in self.encoders.items():
                if cut := encoder.cut(prompt):
                    warnings.warn(
                        f"{part} reads {encoder.tokens} tokens of a prompt; left out of this one: {cut!r}", stacklevel=3
                    )

    def _unconditional(self, condition: Arrays, negative: str | None) -> Arrays:
        """The conditions of guidance's unconditional pass."""
        if negative is None and self.zero_negative:
            return {name: value if name == "time_ids" else np.zeros_like(value) for name, value in condition.items()}
        return self.embeddings(negative or "")
