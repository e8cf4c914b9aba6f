"""Tiny conditional denoisers of every supported class, with random weights, and conditions for them.

Not here: any test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import save_file
from tiny_runs import SCHEDULER
from torch import Tensor, nn

from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.models.model_loading import load_model, save_model

TOKENS = 5
BLOCK = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "cross_attention_dim": 24,
    **BLOCK,
}


def class_unet(**more: Any) -> nn.Module:
    """A UNet2DModel of 16x16 images with four classes, and a fifth embedding row for the unconditional pass."""
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",), **BLOCK}
    return UNet2DModel(in_channels=1, out_channels=1, **blocks, **{"sample_size": 16, "num_class_embeds": 5, **more})


def text_unet(**more: Any) -> nn.Module:
    """A UNet like Stable Diffusion 1.5's, with cross attention to text."""
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, **{**CROSS, **more})


def two_level_unet() -> nn.Module:
    """A UNet like Stable Diffusion 2's, with a level of half the size."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (16, 32)}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": (2, 4)}
    return text_unet(use_linear_projection=True, **blocks)


def text_and_size_unet(**more: Any) -> nn.Module:
    """A UNet like SDXL's, which also reads pooled text and image sizes."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }
    return text_unet(use_linear_projection=True, **added, **more)


def dit(**more: Any) -> nn.Module:
    """A DiT: class labels, adaptive norms, a learned variance."""
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "patch_size": 2,
        "num_embeds_ada_norm": 4,
    }
    return _stirred(DiTTransformer2DModel(sample_size=8, in_channels=4, **shape, **{"out_channels": 8, **more}))


def pixart(**more: Any) -> nn.Module:
    """A PixArt transformer: cross attention to masked text."""
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "patch_size": 2,
        "cross_attention_dim": 16,
    }
    text = {"caption_channels": 24, "use_additional_conditions": False}
    return _stirred(PixArtTransformer2DModel(sample_size=8, in_channels=4, out_channels=8, **{**shape, **text, **more}))


def sd3(**more: Any) -> nn.Module:
    """A transformer like Stable Diffusion 3.5 medium's: joint attention to text, and a second attention in the first of
    two blocks.
    """
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "patch_size": 2,
        "caption_projection_dim": 16,
    }
    text = {
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    size = {"sample_size": 8, "pos_embed_max_size": 8}
    return _stirred(SD3Transformer2DModel(in_channels=4, out_channels=4, **{**shape, **text, **size, **more}))


def flux(**more: Any) -> nn.Module:
    """A transformer like FLUX.1-dev's on latents of 8x8: joint attention to text, then single-stream blocks, with
    guidance as an input.
    """
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "axes_dims_rope": (2, 2, 4),
    }
    text = {"joint_attention_dim": 24, "pooled_projection_dim": 12, "guidance_embeds": True}
    model = FluxTransformer2DModel(in_channels=16, **{**shape, **text, **more})
    model.register_to_config(sample_size=8)
    return _stirred(model)


def _stirred(model: nn.Module) -> nn.Module:
    """Give random values to parameters that start at zero, which would otherwise read or return nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


class Plain(nn.Module):
    """A user's own module with a condition `tone` of two numbers: x (B, 1, H, W), t (B,), tone (B, 2) -> (B, 1,
    H, W).
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.tone = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1), nn.Linear(2, 8)

    def forward(self, x: Tensor, t: Tensor, tone: Tensor) -> Tensor:
        told = self.tone(tone)[:, :, None, None] + (t.float() / 1000)[:, None, None, None]
        y: Tensor = self.last(torch.relu(self.first(x) + told))
        return y


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "class_unet": class_unet,
    "text_unet": text_unet,
    "text_and_size_unet": text_and_size_unet,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
}


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}

SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "sd3": {**FLOW, "shift": 3.0},
    "flux": {**FLOW, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
}
"""Scheduler configs of the flow-matching models; the other models use SCHEDULER of tiny_runs.py."""


def saved(name: str, folder: Path, **more: Any) -> DiffusionModel:
    """Save the model of that name in diffusers' layout, and load it from there."""
    torch.manual_seed(0)
    save_model(MODELS[name](**more).eval(), SCHEDULERS.get(name, SCHEDULER), folder)
    return load_model(str(folder))


def conditions(name: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    """Random conditions (count, ...) for the model of that name."""
    dice = torch.Generator().manual_seed(seed)
    if name in ("class_unet", "dit"):
        return {"class_labels": torch.randint(0, 4, (count,), generator=dice)}
    found = {"encoder_hidden_states": torch.randn(count, TOKENS, 24, generator=dice)}
    if name == "pixart":
        found["encoder_attention_mask"] = (torch.arange(TOKENS) < 3).float().expand(count, -1)
    if name in ("sd3", "flux"):
        found["pooled_projections"] = torch.randn(count, 12, generator=dice)
    if name == "flux":
        found["guidance"] = torch.full((count,), 3.5)
    if name == "text_and_size_unet":
        found |= {
            "text_embeds": torch.randn(count, 12, generator=dice),
            "time_ids": torch.tensor([[999, 768, 0, 0, 1024, 777]] * count),
        }
    return found


def write_embeddings(name: str, path: Path, count: int = 3) -> Path:
    """Write a file of conditions for `count` prompts and for the unconditional pass."""
    other = {f"unconditional.{key}": value.contiguous() for key, value in conditions(name, 1, seed=1).items()}
    save_file({**{key: value.contiguous() for key, value in conditions(name, count).items()}, **other}, path)
    return path
