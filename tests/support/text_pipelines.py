"""Tiny text-to-image pipelines in diffusers' layout, with random weights, of every supported class, and tokenizers with
few words.

Not here: any test. Needs transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conditional_models import SCHEDULERS, dit, flux, pixart, sd3, text_and_size_unet, text_unet, two_level_unet
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_runs import SCHEDULER
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.part_export import PartsToDeploy, chosen_formats
from pqcad_qat.models.conditions import GUIDANCE
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.pipeline_parts import PipelineParts, pipeline_parts
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.quantization.student_folder import STEPS
from pqcad_qat.sampling.precision_by_time import StepsInFloat

TOKENS = 12
"""Number of tokens of a prompt for CLIP, including the start and end tokens."""

T5_TOKENS = 10
"""Number of tokens of a prompt for T5."""

TEXT_TOKENS = {"stable-diffusion-3": TOKENS + T5_TOKENS, "flux": T5_TOKENS, "pixart": T5_TOKENS}
"""Number of text tokens that a pipeline's denoiser reads, if it differs from TOKENS."""

WIDTH, POOLED = 24, 12
"""Sizes of the text embedding, and of SDXL's pooled text embedding."""

MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]

PIECES = (
    *((special, 0.0) for special in ("<pad>", "</s>", "<unk>")),
    *((word, -3.0) for word in ("\u2581", "\u2581a", "\u2581cat", "\u2581dog", "\u2581and", "s")),
    *((letter, -9.0) for letter in "abcdefghijklmnopqrtuvwxyzABCT!,"),
)
"""Pieces of T5's tokenizer, each with its score; U+2581 stands for a space."""

SCALE = 3.0
"""Scale of classifier-free guidance."""


@dataclass(frozen=True)
class DeployedPipeline:
    """A pipeline and its deployed folder.

    Attributes:
        source: parts of the pipeline in diffusers' layout.
        folder: deployed folder, for 3 sampling steps and guidance.
        latents: latents (N, 4, 8, 8) with which its VAE was exported.
        model: the denoiser in PyTorch as it was deployed.
    """

    source: PipelineParts
    folder: Path
    latents: Tensor
    model: nn.Module


def deployed(
    kind: str,
    folder: Path,
    asked: Mapping[str, str],
    schedule: Mapping[str, Any] | None = None,
    *,
    bits: int | None = 7,
    float_from: float | None = None,
    change: Callable[[Path], None] = lambda _: None,
) -> DeployedPipeline:
    """Deploy the pipeline of that name without training: weights of every denoiser layer at so many bits (None: all in
    floating point), ranges from two states, its parts in the formats `asked`; `schedule` changes keys of its
    scheduler's config, and `change` its folder. Full precision computes the steps from the time `float_from`.
    """
    source = PIPELINES[kind](folder)
    change(source)
    config = source / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **(schedule or {})}))
    full = load_model(str(source))
    model = copy.deepcopy(full.denoiser)
    tokens = TEXT_TOKENS.get(kind, TOKENS)
    inputs = tuple(
        ConditionInput(w.name, tuple(size or tokens for size in w.shape), w.dtype, w.bound)
        for w in full.condition_inputs
    )
    dice = torch.Generator().manual_seed(0)
    given = {
        w.name: (torch.randn if w.dtype == "float32" else torch.ones)(2, *w.shape).to(getattr(torch, w.dtype))
        for w in inputs
    }
    x = torch.randn(2, *full.sample_shape, generator=dice)
    if bits is not None:
        rule = {"match": ["*"], "weights": {"bits": bits}, "inputs": {"bits": 8, "symmetric": False}}
        quantize_model(model, plan_layers(model, numbered([LayerRule.model_validate(rule)]), (bits,), full.example))
        calibrate_ranges(model, [(x, torch.tensor([40, 999]), given)])
    parts = pipeline_parts(source)
    assert parts is not None
    latents = torch.randn(8, *full.sample_shape, generator=dice)
    deployable = PartsToDeploy(parts, chosen_formats(parts, asked, str(source)), latents, inputs)
    scheduler = {**full.scheduler_config, STEPS: 3, GUIDANCE: SCALE}
    layers, path = integer_layers(model.eval()), folder / "openvino"
    request = ExportRequest(
        model, scheduler, layers, full.sample_shape, batch_size=2, conditions=inputs, pipeline_parts=deployable
    )
    if float_from is not None:
        request = replace(request, full=full.denoiser, in_float=StepsInFloat(float_from))
    export_model(request, path)
    return DeployedPipeline(parts, path, latents, model)


FLOAT = {"vae": "float", "text_encoder": "float"}
_MADE: dict[str, DeployedPipeline] = {}


def float_pipeline(kind: str, factory: pytest.TempPathFactory) -> DeployedPipeline:
    """Deployed pipeline of that name with its parts in floating point, made once for all tests, which must not change
    it.
    """
    if kind not in _MADE:
        _MADE[kind] = deployed(
            kind, factory.mktemp(kind), FLOAT if kind != "dit" else {**FLOAT, "text_encoder": "none"}
        )
    return _MADE[kind]


def dit_pipeline(folder: Path) -> Path:
    """DiTPipeline: class labels, latents 4x8x8, pictures 16x16."""
    torch.manual_seed(0)
    pipeline = DiTPipeline(transformer=dit().eval(), vae=tiny_vae(), scheduler=DDIMScheduler.from_config(SCHEDULER))
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def stable_diffusion(folder: Path) -> Path:
    """StableDiffusionPipeline: latents 4x8x8, pictures 16x16."""
    return _stable_diffusion(folder, text_unet)


def stable_diffusion_2(folder: Path) -> Path:
    """StableDiffusionPipeline like Stable Diffusion 2's, whose UNet has a level of half the size."""
    return _stable_diffusion(folder, two_level_unet, pad_token="!", hidden_act="gelu")


def _stable_diffusion(folder: Path, unet: Callable[[], nn.Module], pad_token: str | None = None, **text: Any) -> Path:
    torch.manual_seed(0)
    padding = {} if pad_token is None else {"pad_token": pad_token}
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(_text_config(WIDTH, **text)).eval(),
        tokenizer=tokenizer(folder / "words", **padding),
        unet=unet().eval(),
        scheduler=DDIMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def stable_diffusion_xl(folder: Path) -> Path:
    """StableDiffusionXLPipeline: two text encoders of half the width each, the second one pooled."""
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


def stable_diffusion_3(folder: Path) -> Path:
    """StableDiffusion3Pipeline: two CLIP encoders that together are narrower than T5, whose tokens follow theirs."""
    torch.manual_seed(0)
    clip = _text_config(8, projection_dim=POOLED // 2)
    pipeline = StableDiffusion3Pipeline(
        transformer=sd3().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(dict(SCHEDULERS["sd3"])),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(clip).eval(),
        tokenizer=tokenizer(folder / "words"),
        text_encoder_2=CLIPTextModelWithProjection(clip).eval(),
        tokenizer_2=tokenizer(folder / "words", pad_token="!"),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def flux_dev(folder: Path) -> Path:
    """FluxPipeline like FLUX.1 dev: CLIP's pooled text, T5's tokens, guidance as an input."""
    torch.manual_seed(0)
    pipeline = FluxPipeline(
        transformer=flux().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(dict(SCHEDULERS["flux"])),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(_text_config(POOLED)).eval(),
        tokenizer=tokenizer(folder / "words"),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def pixart_alpha(folder: Path) -> Path:
    """PixArtAlphaPipeline: T5's tokens with their mask."""
    torch.manual_seed(0)
    pipeline = PixArtAlphaPipeline(
        transformer=pixart().eval(),
        scheduler=DDIMScheduler.from_config(SCHEDULER),
        vae=tiny_vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


def t5() -> T5EncoderModel:
    """T5 encoder like T5 1.1: gated, with two layers and relative positions."""
    shape = {
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    return T5EncoderModel(T5Config(vocab_size=len(PIECES), is_encoder_decoder=False, **shape)).eval()


def t5_tokenizer() -> T5TokenizerFast:
    """T5's Unigram tokenizer with letters and a few words."""
    return T5TokenizerFast(vocab=list(PIECES), extra_ids=0, model_max_length=T5_TOKENS)


def tiny_vae(**more: Any) -> AutoencoderKL:
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, **kinds, scaling_factor=0.5, **more).eval()


def tokenizer(folder: Path, **more: Any) -> CLIPTokenizer:
    """CLIP's tokenizer with single bytes and two words; it is read from vocab.json and merges.txt, as in most
    pipelines.
    """
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


PIPELINES = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-2": stable_diffusion_2,
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux_dev,
    "pixart": pixart_alpha,
    "dit": dit_pipeline,
}
