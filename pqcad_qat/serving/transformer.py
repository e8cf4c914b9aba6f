"""A deployed denoiser where diffusers' pipelines of Stable Diffusion 3 and Flux expect their transformer.

Not here: how it computes (runtime.py). Needs openvino and numpy; torch only if the caller has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.serving.diffusers_calls import Call
from pqcad_qat.serving.diffusers_stand_in import ModelMixin
from pqcad_qat.serving.graph_inputs import THOUSANDTHS, packed, unpacked
from pqcad_qat.serving.runtime import Float32, OVUNet2DModel

__all__ = ["ModelMixin", "OVTransformer2DModel"]

PACKED = "FluxTransformer2DModel"
"""Class whose pipeline packs latents into a sequence of 2x2 patches, and gives times in thousandths."""


class OVTransformer2DModel(OVUNet2DModel):
    """`OVUNet2DModel` as SD3Transformer2DModel and FluxTransformer2DModel are called: a pipeline's `transformer`.

    Of Flux the states are rows of patches, (B, H/2 W/2, 4C), times lie in [0, 1], `img_ids` must be the places of the
    graph's patches, and the answer is in rows too. The size of the latents is the graph's, so the pipeline's height and
    width must be its pixels.
    """

    def _answer(self, call: Call, states: npt.NDArray[Any], times: npt.NDArray[np.float64]) -> Float32:
        if self.config["_class_name"] != PACKED:
            return super()._answer(call, states, times)
        self._check_places(states, call.places)
        return packed(super()._answer(call, unpacked(states, *self.sample_shape[1:]), THOUSANDTHS * times))

    def _check_places(self, states: npt.NDArray[Any], places: npt.NDArray[Any] | None) -> None:
        """Raise ModelError for a sequence of another size than the graph's latents."""
        channels, height, width = self.sample_shape
        rows = (height // 2 * (width // 2), 4 * channels)
        last = [0, height // 2 - 1, width // 2 - 1]
        wrong = places is not None and (places.shape[-1:] != (3,) or (places.reshape(-1, 3).max(axis=0) != last).any())
        if states.shape[1:] != rows or wrong:
            raise ModelError(
                f"{self.folder}: takes latents of {height}x{width}, packed to (B, {rows[0]}, {rows[1]}); "
                f"got {states.shape}"
            )
