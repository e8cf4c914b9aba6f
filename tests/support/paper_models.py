"""Tiny models with random weights in the layouts of those that the paper's protocols name: DDPM with all files at the
top of its folder, and an unconditional latent model with a vector-quantized decoder.

Not here: any test.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel

SIDE, FACTOR = 8, 2
"""Height and width of the latent model's latents, and the ratio of a picture's side to theirs."""


def small_unet(side: int) -> UNet2DModel:
    """A denoiser of three channels with attention at its lower level, as in all of these models."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=side,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        attention_head_dim=None,
        norm_num_groups=4,
    ).eval()


def ddpm(folder: Path, side: int) -> Path:
    """As google/ddpm-cifar10-32 and its kin on the hub: DDPMPipeline, with no folder for a part."""
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=True, variance_type="fixed_large")
    DDPMPipeline(small_unet(side), scheduler).save_pretrained(folder, safe_serialization=True)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    return folder


def latent_diffusion(folder: Path, scaling_factor: float | None = None) -> Path:
    """As CompVis/ldm-celebahq-256: LDMPipeline, whose VQModel on the hub names no scaling factor."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(1)
    decoder = VQModel(block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=64, sample_size=16, **kinds)
    decoder.quantize.embedding.weight.data.normal_()  # as far apart as latents are
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    LDMPipeline(decoder.eval(), small_unet(SIDE), scheduler).save_pretrained(folder, safe_serialization=True)
    file = folder / "vqvae" / "config.json"
    config = json.loads(file.read_text())
    del config["scaling_factor"]
    file.write_text(json.dumps(config if scaling_factor is None else {**config, "scaling_factor": scaling_factor}))
    return folder
