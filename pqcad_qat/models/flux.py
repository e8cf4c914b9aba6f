"""How FluxTransformer2DModel is called: latents as a sequence of 2x2 patches, places as constants, time as sigma.

Not here: what it takes beside x_t and t (architectures.py). The layout is that of diffusers' FluxPipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATCH = 2
"""Side of a patch, in latents; its pixels are channels of the sequence."""

DEFAULT_SIZE = 128
"""Height and width of the latents where nothing says another: of pictures of 1024 pixels, FluxPipeline's own
default.
"""

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
    times = [t / TRAIN_TIMESTEPS, *(condition[name] for name in ("guidance",) if name in condition)]
    with _in_float32(denoiser, [time.float() * TRAIN_TIMESTEPS for time in times]):
        (found,) = denoiser(
            packed(x_t),
            timestep=times[0],
            img_ids=places(height, width).to(x_t.device),
            txt_ids=text_places(tokens).to(x_t.device),
            **condition,
            return_dict=False,
        )
    return (unpacked(found, height, width),)


@contextmanager
def _in_float32(denoiser: nn.Module, times: Sequence[Tensor]) -> Iterator[None]:
    """Inside, sinusoids are taken of these times: in mixed precision the class rounds its own to bfloat16, which is 900
    for 899.6.
    """
    module = denoiser.module if isinstance(denoiser, DistributedDataParallel) else denoiser
    embedding: nn.Module = cast(Any, module).time_text_embed
    handle = embedding.register_forward_pre_hook(lambda _, given: (*times, *given[len(times) :]))
    try:
        yield
    finally:
        handle.remove()
