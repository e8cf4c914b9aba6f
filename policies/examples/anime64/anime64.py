"""A denoiser of drawn faces that others trained, as a plain torch module: 63.2 million parameters, 64x64 pictures.

Its weights are those of `docs/64x64_cosin_300` in github.com/wangjia184/diffusion_model (MIT licence), which convert.py
turns into `anime64.safetensors` beside this file. It predicts the noise, in 300 time steps on a cosine schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.models.own_model import OwnModel

WEIGHTS = Path(__file__).with_name("anime64.safetensors")
"""Where convert.py leaves the weights."""

WIDTHS, GROUPS, EPS, EMBEDDING, TIMES = (64, 128, 256, 512), 8, 1e-3, 256, 300
"""Channels at each resolution, groups and epsilon of GroupNorm, width of the time embedding, number of time steps."""


class AttentionBlock(nn.Module):
    """Single-head attention over pixels; what it adds to is the normalised input, not the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        pixels = x.flatten(2).transpose(1, 2)
        scores = self.to_q(pixels) @ self.to_k(pixels).transpose(1, 2) * x.shape[1] ** -0.5
        mixed: Tensor = self.to_out(scores.softmax(-1) @ self.to_v(pixels))
        return x + mixed.transpose(1, 2).reshape(x.shape)


class ResidualBlock(nn.Module):
    """Two convolutions behind normalisations; the time is added between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.time = nn.Linear(EMBEDDING, outputs)
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, inputs, eps=EPS), nn.GroupNorm(GROUPS, outputs, eps=EPS)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(embedding))[:, :, None, None]
        out: Tensor = self.conv2(F.silu(self.norm2(h))) + self.shortcut(x)
        return out


class Level(nn.Module):
    """A residual block, with attention behind it at the lower resolutions."""

    def __init__(self, inputs: int, outputs: int, attention: bool) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs)
        self.attention = AttentionBlock(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.attention(self.residual(x, embedding))
        return out


class Down(nn.Module):
    """Half the resolution; only the right and the lower side are padded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Up(nn.Module):
    """Twice the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class UNet(nn.Module):
    """x_t (B, 3, H, W) and t (B,) in 0 .. 299 -> the noise (B, 3, H, W)."""

    rates: Tensor

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.time1, self.time2 = nn.Linear(EMBEDDING, EMBEDDING), nn.Linear(EMBEDDING, EMBEDDING)
        skips, channels = [widths[0]], widths[0]
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            for _ in range(2):
                self.down.append(Level(channels, width, index >= 2))
                channels = width
                skips.append(channels)
            if index < len(widths) - 1:
                self.down.append(Down(channels))
                skips.append(channels)
        self.mid = nn.ModuleList([Level(channels, channels, True), Level(channels, channels, False)])
        self.up = nn.ModuleList()
        for index, width in reversed(list(enumerate(widths))):
            for _ in range(3):
                self.up.append(Level(channels + skips.pop(), width, index >= 2))
                channels = width
            if index:
                self.up.append(Up(channels))
        self.norm_out = nn.GroupNorm(GROUPS, channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)
        rates = torch.exp(torch.arange(EMBEDDING // 2) * (-math.log(10000) / (EMBEDDING // 2 - 1)))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.rates
        embedding = self.time2(F.silu(self.time1(torch.cat([angles.sin(), angles.cos()], -1))))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            h = level(h, embedding)
            skips.append(h)
        for level in self.mid:
            h = level(h, embedding)
        for level in self.up:
            h = level(torch.cat([h, skips.pop()], 1) if isinstance(level, Level) else h, embedding)
        noise: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return noise


def build() -> UNet:
    """The network with its trained weights."""
    if not WEIGHTS.is_file():
        raise ModelError(f"{WEIGHTS}: got no such file; allowed the weights that convert.py writes there")
    model = UNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def scheduler_config() -> dict[str, Any]:
    """The schedule in diffusers' names. Betas are listed, since their bounds are not those of diffusers' cosine."""
    ends = [math.cos((i / TIMES + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(TIMES + 1)]
    betas = [min(max(1 - after / before, 1e-4), 0.9999) for before, after in pairwise(ends)]
    return {
        "num_train_timesteps": TIMES,
        "trained_betas": betas,
        "prediction_type": "epsilon",
        "clip_sample": True,
        "timestep_spacing": "trailing",
    }


def own_model() -> OwnModel:
    """What `--module anime64.py:own_model` gives to `run`."""
    return OwnModel("anime64", build, sample_shape=(3, 64, 64), scheduler_config=scheduler_config())
