"""Decoding by a VAE: latents scaled as its pipeline scales them, and the pictures that its decoder makes of them.

Not here: loading a VAE (pipeline_parts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pqcad_qat.machine.accelerators import device_of, on_accelerator


def latent_channels(config: Mapping[str, Any]) -> Any:
    """Number of channels of a decoder's latents; those of a VQModel are as wide as the vectors of its codebook."""
    return config.get("vq_embed_dim") or config["latent_channels"]


def to_decoder(config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """Scale a denoiser's latents (N, C, h, w) for its VAE's decoder.

    Args:
        config: config of a VAE that `PipelineParts.load` loaded.
        latents: latents as the denoiser makes them.
    """
    mean, std = (config.get(key) for key in ("latents_mean", "latents_std"))
    scaled: Tensor = latents.float() / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
    if mean is None or std is None:
        return scaled
    spread, middle = (torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1) for value in (std, mean))
    spread_out: Tensor = scaled * spread + middle
    return spread_out


@torch.no_grad()
def decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode a denoiser's latents, one at a time, into float32 pictures (N, 3, H, W), about in [-1, 1]."""
    model = cast(Any, vae)
    with on_accelerator(vae):
        scaled = to_decoder(model.config, latents).to(device_of(vae))
        pictures = [model.decode(latent, return_dict=False)[0].to(latents.device) for latent in scaled[:, None]]
    return torch.cat(pictures)
