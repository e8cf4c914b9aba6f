"""Sampling that begins from a picture: a prompt changes all of it (image to image), or what a mask shows (inpainting).

Method, as in diffusers' pipelines: the picture's latents get the noise of the step at which sampling begins, which
`strength` decides (SDEdit: Meng et al. 2022). With a mask, after each step, latents outside it are replaced by the
picture's own with the noise of that time (RePaint without resampling: Lugmayr et al. 2022).

Not here: prompts, guidance, and the loop (text_to_image.py). Needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import shown
from pqcad_qat.sampling.ddpm_schedule import Walk
from pqcad_qat.sampling.flow import FlowSchedule
from pqcad_qat.sampling.trajectory import NoiseSchedule
from pqcad_qat.serving.per_size import Size

Float32 = npt.NDArray[np.float32]
"""Array of float32."""

STRENGTH, UNDER_A_MASK = 0.8, 1.0
"""Share of the sampling steps where none is given, of a whole picture and under a mask: diffusers' defaults."""


@dataclass(frozen=True)
class Beginning:
    """A picture to begin from.

    Attributes:
        picture: (1, 3, H, W) in [-1, 1].
        mask: (1, 1, h, w) of the size of latents: 1 where the picture is painted anew, else 0; None for all of it.
        strength: share of the sampling steps that are made.
    """

    picture: Float32
    mask: Float32 | None
    strength: float

    @property
    def size(self) -> Size:
        """Height and width of the picture."""
        return cast(Size, self.picture.shape[2:])

    def first_step(self, of_all: int, *, flow: bool) -> int:
        """Number of sampling steps that are left out at the beginning, of so many in all.

        diffusers rounds the number of steps that are made down, but for flow matching up.

        Raises:
            ModelError: no step is made.
        """
        first = int(of_all - of_all * self.strength) if flow else of_all - int(of_all * self.strength)
        if first >= of_all:
            raise ModelError(f"strength: got {self.strength:g}, none of {of_all} steps; allowed 1/{of_all} and more")
        return first


def beginning(image: Any, mask: Any, strength: Any, *, factor: int) -> Beginning | None:
    """Read what a caller asks to begin from; None without an image.

    Args:
        image: (H, W, 3) in uint8.
        mask: (H, W) or (H, W, 1), of bool, uint8, or floats from 0 to 1.
        strength: as of `Beginning`; None for the default.
        factor: ratio of a picture's side to that of its latents.

    Raises:
        ModelError: mask or strength come without an image, or one of them does not fit.
    """
    if image is None:
        if given := [name for name, value in (("mask", mask), ("strength", strength)) if value is not None]:
            raise ModelError(f"{given[0]}: got it alone; allowed beside an image")
        return None
    pixels = _array(image, "image", "uint8 of shape (H, W, 3)")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ModelError(f"image: got {pixels.dtype} of shape {pixels.shape}; allowed uint8 of shape (H, W, 3)")
    size = (pixels.shape[0], pixels.shape[1])
    if any(side % factor for side in size):
        raise ModelError(f"image: got {size[0]}x{size[1]} pixels; allowed multiples of {factor}")
    share = (STRENGTH if mask is None else UNDER_A_MASK) if strength is None else strength
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ModelError(f"strength: got {shown(share)}; allowed over 0 to 1")
    picture = np.asarray(pixels.transpose(2, 0, 1)[None] / 127.5 - 1, np.float32)
    return Beginning(picture, None if mask is None else _mask(mask, size, factor), float(share))


def _array(value: Any, name: str, allowed: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ModelError(f"{name}: got what numpy makes no array of: {error}; allowed {allowed}") from error


def _mask(value: Any, size: Size, factor: int) -> Float32:
    """The mask (1, 1, h, w) of latents.

    Raises:
        ModelError: it has another shape or type, or there is nothing to paint.
    """
    mask = _array(value, "mask", "an array of the image's size")
    if mask.shape not in (size, (*size, 1)):
        raise ModelError(f"mask: got shape {mask.shape}; allowed {size}, that of the image")
    if mask.dtype.kind == "f" and (mask >= 0).all() and (mask <= 1).all():
        painted = mask > 0.5
    elif mask.dtype in (np.bool_, np.uint8):
        painted = mask > (127 if mask.dtype == np.uint8 else 0)
    else:
        raise ModelError(f"mask: got {mask.dtype}; allowed bool, uint8, or floats from 0 to 1")
    of_latents = painted.reshape(size)[::factor, ::factor]
    if not of_latents.any():
        raise ModelError("mask: got one that is nowhere above half; allowed one with something to paint")
    return np.asarray(of_latents[None, None], np.float32)


@dataclass(frozen=True)
class Changes:
    """What a picture to begin from does to the states of sampling.

    Attributes:
        start: the picture.
        latents: its latents (1, C, h, w).
        noise: (N, C, h, w).
        schedule: the sampler's.
    """

    start: Beginning
    latents: Float32
    noise: Float32
    schedule: NoiseSchedule

    def walk(self, walk: Walk) -> Walk:
        """The sampling steps that are made, of all."""
        return walk[self.start.first_step(len(walk), flow=isinstance(self.schedule, FlowSchedule)) :]

    def begun(self, t: float) -> Float32:
        """States (N, C, h, w) from which sampling begins at time t."""
        # a picture's own latents show through the noise, unless what is painted has nothing to do with it
        return self.noise if self.start.mask is not None and self.start.strength == 1 else self._noised(t)

    def kept(self, x: Float32, t: float | None) -> Float32:
        """States x (N, C, h, w) at time t, None at the end, with the picture's own outside the mask."""
        mask = self.start.mask
        if mask is None:
            return x
        own = self.latents if t is None else self._noised(t)
        return np.asarray(mask * x + (1 - mask) * own, np.float32)

    def _noised(self, t: float) -> Float32:
        return np.asarray(self.schedule.noised(self.latents, self.noise, t), np.float32)
