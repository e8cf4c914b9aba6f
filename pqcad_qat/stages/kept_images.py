"""What is kept of sampled images: pictures, or latents and the pictures that the full-precision VAE makes of them.

Not here: the sampling (samplers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pqcad_qat.data.images import to_uint8
from pqcad_qat.machine.tensor_files import Rows
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.pipeline_parts import pipeline_parts
from pqcad_qat.models.vae import decoded

Float32 = npt.NDArray[np.float32]


def decoder_of(model: DiffusionModel) -> Callable[[Float32], Float32] | None:
    """Return a function that decodes latents with the full-precision VAE beside the model, loaded at its first call.

    The result is None if the model does not make latents or has no VAE.
    """
    pipeline = pipeline_parts(model.folder)
    if pipeline is None or not model.latent or (part := pipeline.decoder) is None:
        return None

    load = cache(partial(pipeline.load, part))

    def decode(latents: Float32) -> Float32:
        pictures: Float32 = decoded(load(), torch.from_numpy(latents)).numpy()
        return pictures

    return decode


def images_or_latents(model: DiffusionModel, decoded: bool) -> Callable[[Float32], Rows]:
    """Return the function by which `sample_rows` keeps uint8 `images`, or float32 `latents` for a model of latents.

    If `decoded` is set and the model has a decoder, the uint8 `pictures` of the latents are kept as well.
    """
    decode = decoder_of(model) if decoded else None

    def kept(x_0: Float32) -> Rows:
        states = torch.from_numpy(x_0)
        if not model.latent:
            return {"images": to_uint8(states)}
        pictures = {} if decode is None else {"pictures": to_uint8(torch.from_numpy(decode(x_0)))}
        return {"latents": states, **pictures}

    return kept


def pictures_of(rows: Rows) -> Tensor | None:
    """The uint8 pictures (N, C, H, W) among what `images_or_latents` keeps; None where there are latents alone."""
    return rows.get("images", rows.get("pictures"))
