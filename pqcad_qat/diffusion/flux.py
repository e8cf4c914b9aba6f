"""How FluxTransformer2DModel is called: latents as a sequence of 2x2 patches, places as constants, time as sigma.

Not here: what it takes beside x_t and t (architectures.py). The layout is that of diffusers' FluxPipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PATCH = 2
"""Side of a patch, in latents; its pixels are channels of the sequence."""

DEFAULT_SIZE = 128
"""Height and width of the latents where nothing says another: of pictures of 1024 pixels, FluxPipeline's own default."""

TRAIN_TIMESTEPS = 1000
"""What the class multiplies the time that it is given by."""


def packed(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 W/2, 4C): a row for each patch of 2x2."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // PATCH * (width // PATCH), channels * PATCH**2)


def unpacked(sequence: Tensor, height: int, width: int) -> Tensor:
    """(B, H/2 W/2, 4C) -> (B, C, H, W): the inverse of `packed`."""
    batch, _, channels = sequence.shape
    patches = sequence.reshape(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // PATCH**2, height, width)


def places(height: int, width: int) -> Tensor:
    """(H/2 W/2, 3) float32: row and column of every patch of latents (H, W), behind a zero."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def text_places(tokens: int) -> Tensor:
    """(tokens, 3) float32: of text, which has no place."""
    return torch.zeros(tokens, 3)


def call(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: dict[str, Any]) -> tuple[Tensor]:
    """The velocity (B, C, H, W) at x_t (B, C, H, W) and t (B,)."""
    height, width = x_t.shape[-2:]
    tokens = condition["encoder_hidden_states"].shape[1]
    (found,) = denoiser(
        packed(x_t),
        timestep=t / TRAIN_TIMESTEPS,
        img_ids=places(height, width).to(x_t.device),
        txt_ids=text_places(tokens).to(x_t.device),
        **condition,
        return_dict=False,
    )
    return (unpacked(found, height, width),)
