"""Tiny text-to-image pipelines in diffusers' layout, random weights: as Stable Diffusion 1.5 and as SDXL, with a tokenizer of few words.

Not here: any test. Takes transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conditional_models import text_and_size_unet, text_unet
from conftest import SCHEDULER
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 12
"""Tokens of a prompt, the first and last among them."""

WIDTH, POOLED = 24, 12
"""Of the text's embedding, and of SDXL's pooled one."""

MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]
PROMPTS = "a cat\n\ntwo dogs, on a mat\n"


def stable_diffusion(folder: Path) -> Path:
    """A StableDiffusionPipeline: latents 4x8x8, pictures 16x16."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(_text_config(WIDTH)).eval(),
        tokenizer=tokenizer(folder / "words"),
        unet=text_unet().eval(),
        scheduler=DDIMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def stable_diffusion_xl(folder: Path) -> Path:
    """A StableDiffusionXLPipeline: two encoders of half the width each, the second pooled."""
    torch.manual_seed(0)
    half = WIDTH // 2
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(_text_config(half)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(half, projection_dim=POOLED, hidden_act="gelu")).eval(),
        tokenizer=tokenizer(folder / "words"),
        tokenizer_2=tokenizer(folder / "words", pad_token="!"),
        unet=text_and_size_unet().eval(),
        scheduler=DDIMScheduler.from_config(SCHEDULER),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def tiny_vae() -> AutoencoderKL:
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, **kinds, scaling_factor=0.5).eval()


def tokenizer(folder: Path, **more: Any) -> CLIPTokenizer:
    """CLIP's, of single bytes and two words; read from vocab.json and merges.txt, as most pipelines hold it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in MERGES)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, **more)


def _text_config(width: int, **more: Any) -> CLIPTextConfig:
    shape = {"hidden_size": width, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    words = {"vocab_size": 518, "max_position_embeddings": TOKENS, "bos_token_id": 516, "eos_token_id": 517}
    return CLIPTextConfig(**{"hidden_act": "quick_gelu", **shape, **words, **more})
