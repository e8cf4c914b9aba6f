"""A deployed denoiser where diffusers' pipelines of Stable Diffusion 3 and Flux expect their transformer.

Not here: how it computes (runtime.py). Needs openvino and numpy; torch only if the caller has it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from pqcad_qat.deployment.graph_inputs import THOUSANDTHS, packed, unpacked
from pqcad_qat.deployment.runtime import OVUNet2DModel, UNetOutput, as_array, flattened
from pqcad_qat.errors import ModelError

PACKED = "FluxTransformer2DModel"
"""Class whose pipeline packs latents into a sequence of 2x2 patches, and gives times in thousandths."""


class OVTransformer2DModel(OVUNet2DModel):
    """`OVUNet2DModel` by the keyword arguments of SD3Transformer2DModel and FluxTransformer2DModel: a pipeline's `transformer`.

    The size of the latents is the graph's, so the pipeline's height and width must be its pixels.
    """

    def __call__(  # type: ignore[override]
        self,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        pooled_projections: Any = None,
        timestep: Any = None,
        img_ids: Any = None,
        txt_ids: Any = None,
        guidance: Any = None,
        joint_attention_kwargs: Any = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Any]:
        """Predict as the diffusers model does.

        Args:
            hidden_states: (B, C, H, W); of Flux (B, H/2 W/2, 4C). A numpy array or torch tensor, and the answer is of its kind and shape.
            encoder_hidden_states, pooled_projections, guidance: conditions, each (B, ...) or (1, ...).
            timestep: a number or (B,), in [0, 1000]; of Flux in [0, 1].
            img_ids: of Flux, (H/2 W/2, 3): places of patches, which must be the graph's.
            txt_ids: of Flux; all zeros in the graph.
            return_dict: False returns a tuple of one.

        Raises:
            ModelError: latents of another size, or other conditions than the graph takes.
        """
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "guidance": guidance,
            "joint_attention_kwargs": joint_attention_kwargs,
        }
        given = {name: as_array(value) for name, value in flattened(conditions).items()}
        states, times = as_array(hidden_states), as_array(timestep).astype(np.float64)
        if self.config["_class_name"] == PACKED:
            self._check_places(states, None if img_ids is None else as_array(img_ids))
            found = packed(self.predict(unpacked(states, *self.sample_shape[1:]), THOUSANDTHS * times, given))
        else:
            found = self.predict(states, times, given)
        answer: Any = found
        if not isinstance(hidden_states, np.ndarray):
            import torch

            answer = torch.from_numpy(found).to(hidden_states)
        return UNetOutput(answer) if return_dict else (answer,)

    forward = __call__  # type: ignore[assignment]

    def cache_context(self, _name: str) -> AbstractContextManager[None]:
        """What diffusers' pipelines put around a pass of guidance; nothing is cached here."""
        return nullcontext()

    def _check_places(self, states: npt.NDArray[Any], places: npt.NDArray[Any] | None) -> None:
        """Raise ModelError for a sequence of another size than the graph's latents."""
        channels, height, width = self.sample_shape
        rows = (height // 2 * (width // 2), 4 * channels)
        last = [0, height // 2 - 1, width // 2 - 1]
        if states.shape[1:] != rows or (places is not None and (places.max(axis=0) != last).any()):
            raise ModelError(f"{self.folder}: takes latents of {height}x{width}, packed to (B, {rows[0]}, {rows[1]}); got {states.shape}")
