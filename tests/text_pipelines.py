"""Tiny text-to-image pipelines in diffusers' layout, random weights: as Stable Diffusion 1.5 and as SDXL, with a tokenizer of few words.

Not here: any test. Takes transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conditional_models import dit, text_and_size_unet, text_unet
from conftest import SCHEDULER
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pqcad_qat.deployment.export import export_model
from pqcad_qat.deployment.parts import PartsToDeploy, chosen_formats
from pqcad_qat.diffusion.architectures import ConditionInput
from pqcad_qat.diffusion.conditions import GUIDANCE
from pqcad_qat.diffusion.denoiser import load_model
from pqcad_qat.diffusion.pipeline_parts import PipelineParts, pipeline_parts
from pqcad_qat.policy.schema import LayerRule
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.quantization.student_folder import STEPS

TOKENS = 12
"""Tokens of a prompt, the first and last among them."""

WIDTH, POOLED = 24, 12
"""Of the text's embedding, and of SDXL's pooled one."""

MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]

SCALE = 3.0
"""Of guidance."""


@dataclass(frozen=True)
class DeployedPipeline:
    """A pipeline, and what became of it.

    Attributes:
        source: its parts in diffusers' layout.
        folder: deployed, for 3 steps and guidance.
        latents: (N, 4, 8, 8), that its VAE was exported with.
    """

    source: PipelineParts
    folder: Path
    latents: Tensor


def deployed(kind: str, folder: Path, asked: Mapping[str, str]) -> DeployedPipeline:
    """The pipeline of that name, every layer of the denoiser at 7 bits, ranges from two states, not trained; its parts as asked."""
    source = PIPELINES[kind](folder)
    full = load_model(str(source))
    model = copy.deepcopy(full.denoiser)
    inputs = tuple(ConditionInput(w.name, tuple(size or TOKENS for size in w.shape), w.dtype, w.bound) for w in full.condition_inputs)
    dice = torch.Generator().manual_seed(0)
    given = {w.name: (torch.randn if w.dtype == "float32" else torch.ones)(2, *w.shape).to(getattr(torch, w.dtype)) for w in inputs}
    x = torch.randn(2, *full.sample_shape, generator=dice)
    rule = {"match": ["*"], "weights": {"bits": 7}, "inputs": {"bits": 8, "symmetric": False}}
    quantize_model(model, plan_layers(model, [LayerRule.model_validate(rule)], (7,), full.example))
    calibrate_ranges(model, [(x, torch.tensor([40, 999]), given)])
    parts = pipeline_parts(source)
    assert parts is not None
    latents = torch.randn(8, *full.sample_shape, generator=dice)
    deployable = PartsToDeploy(parts, chosen_formats(parts, asked, str(source)), latents)
    scheduler = {**SCHEDULER, STEPS: 3, GUIDANCE: SCALE}
    layers, path = integer_layers(model.eval()), folder / "openvino"
    export_model(model, scheduler, layers, full.sample_shape, 2, "int8", path, {}, inputs, parts=deployable)
    return DeployedPipeline(parts, path, latents)


FLOAT = {"vae": "float", "text_encoder": "float"}
_MADE: dict[str, DeployedPipeline] = {}


def float_pipeline(kind: str, factory: pytest.TempPathFactory) -> DeployedPipeline:
    """The deployed pipeline of that name with its parts in floating point: made once for all tests, which only look at it."""
    if kind not in _MADE:
        _MADE[kind] = deployed(kind, factory.mktemp(kind), FLOAT)
    return _MADE[kind]


def dit_pipeline(folder: Path) -> Path:
    """A DiTPipeline: class labels, latents 4x8x8, pictures 16x16."""
    torch.manual_seed(0)
    pipeline = DiTPipeline(transformer=dit().eval(), vae=tiny_vae(), scheduler=DDIMScheduler.from_config(SCHEDULER))
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


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


PIPELINES = {"stable-diffusion": stable_diffusion, "stable-diffusion-xl": stable_diffusion_xl, "dit": dit_pipeline}
