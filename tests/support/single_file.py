"""A tiny Stable Diffusion pipeline as a checkpoint in a single file, with the names of CompVis' code.

Not here: any test. The names are those that diffusers' converters read (loaders/single_file_utils.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Part of diffusers' module path -> CompVis' for one level of one block."""

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(pipeline: Any, file: Path) -> Path:
    """Write a pipeline of text_pipelines.stable_diffusion as one file, and return it."""
    tensors = {
        **{f"model.diffusion_model.{_of_unet(name)}": value for name, value in pipeline.unet.state_dict().items()},
        **dict(_of_vae(name, value) for name, value in pipeline.vae.state_dict().items()),
        **{
            f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
            for name, value in pipeline.text_encoder.state_dict().items()
        },
    }
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file)
    return file


def _of_unet(name: str) -> str:
    ours = next(part for part in UNET if name.startswith(f"{part}."))
    rest = name.removeprefix(f"{ours}.")
    if "resnets" in ours:
        module, _, kind = rest.rpartition(".")
        rest = f"{RESNET[module]}.{kind}"
    return f"{UNET[ours]}.{rest}"


def _of_vae(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Name and value of a tensor of a VAE of two levels, whose attention CompVis computes by convolutions."""
    theirs = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    theirs = theirs.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    theirs = theirs.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    for level in (0, 1):
        theirs = theirs.replace(f"down_blocks.{level}.", f"down.{level}.")
        theirs = theirs.replace(f"up_blocks.{level}.", f"up.{1 - level}.")
    theirs = theirs.replace(".resnets.", ".block.")
    if "mid_block.attentions.0" in theirs:
        head, _, rest = theirs.partition("mid_block.attentions.0.")
        module, _, kind = rest.rpartition(".")
        theirs = f"{head}mid.attn_1.{VAE_ATTENTION[module]}.{kind}"
        value = value[..., None, None] if value.ndim == 2 else value
    return f"first_stage_model.{theirs}", value
