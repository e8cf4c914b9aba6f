"""A deployed denoiser in the place of the transformer in diffusers' pipelines of Stable Diffusion 3 and Flux.

Not here: the computation (runtime.py). Needs openvino and numpy; torch only if the caller uses it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.models.families.latent_rows import PATCH, THOUSANDTHS, packed, rows_shape, unpacked
from pqcad_qat.models.families.latent_rows import places as _places
from pqcad_qat.models.families.table import family_named
from pqcad_qat.serving.diffusers_calls import Call
from pqcad_qat.serving.diffusers_stand_in import ModelMixin
from pqcad_qat.serving.manifest import LARGEST_SIDE
from pqcad_qat.serving.runtime import Float32, OVUNet2DModel

__all__ = ["ModelMixin", "OVTransformer2DModel"]


class OVTransformer2DModel(OVUNet2DModel):
    """`OVUNet2DModel` as pipelines call their `transformer`.

    For a family that takes rows (Flux), states are rows of patches, (B, H/2 W/2, 4C), and the result is in rows too.
    Times lie in [0, 1], and `img_ids` are the positions of the patches, which tell the size of the latents.
    """

    def _answer(self, call: Call, states: npt.NDArray[Any], times: npt.NDArray[np.float64]) -> Float32:
        if not family_named(self.config["_class_name"]).takes_rows:
            return super()._answer(call, states, times)
        x_t = unpacked(states, *self._size(states, call.places))
        return np.ascontiguousarray(packed(super()._answer(call, x_t, THOUSANDTHS * times)))

    def _size(self, states: npt.NDArray[Any], places: npt.NDArray[Any] | None) -> tuple[int, int]:
        """Height and width of the latents of a sequence; without places, those of the folder.

        Raises:
            ModelError: sequence and places do not match, or the folder does not take this size.
        """
        channels, height, width = self.sample_shape
        given = None if places is None else places.reshape(-1, places.shape[-1]) if places.ndim else places
        if given is not None and self.manifest.get("any_size", False) and given.shape[1:] == (3,) and len(given):
            sides = np.nan_to_num(given[:, 1:].max(axis=0), nan=0, posinf=0, neginf=0).clip(0, LARGEST_SIDE)
            height, width = (PATCH * (int(last) + 1) for last in sides)
        rows = rows_shape(channels, height, width)
        if states.shape[1:] != rows or not (given is None or np.array_equal(given, _places(height, width))):
            raise ModelError(
                f"{self.folder}: latents: got shape {states.shape}; allowed (B, {rows[0]}, {rows[1]}), the rows that "
                f"latents of {height}x{width} are packed to, with their img_ids"
            )
        return height, width
