"""SD3Transformer2DModel, the denoiser of Stable Diffusion 3: a transformer of patches with joint attention over text
and image (Esser et al. 2024).

Not here: the rules that all transformers of patches share (config_faults.py), or Flux, which also uses joint attention
(flux.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pqcad_qat.models.families.config_faults import allowed, patched, sides_of, total_width
from pqcad_qat.models.families.family import TEXT, ConditionInput, Config, Family, Pipeline, text_inputs
from pqcad_qat.models.families.prompt_layouts import LAST, Arrays, Encoders, PromptLayout, Wanted, two_clips

POOLED = "pooled_projections"
"""Name of the condition that holds the text as one vector."""


def joint_attention(config: Config) -> tuple[ConditionInput, ...]:
    """Return the inputs of joint attention: text as tokens and as one vector, and guidance where the denoiser takes it
    as an input.
    """
    pooled = ConditionInput(POOLED, (config["pooled_projection_dim"],), "float32")
    inputs = (*text_inputs(config["joint_attention_dim"]), pooled)
    return inputs + ((ConditionInput("guidance", (), "float32"),) if config.get("guidance_embeds") else ())


def _faults(config: Config) -> Iterator[str]:
    patch, most, width = config["patch_size"], config["pos_embed_max_size"], total_width(config)
    if any(side % patch or side > patch * most for side in sides_of(config) or ()):
        rule = f"multiples of {patch} up to {patch * most}, which its table of places holds"
        yield allowed("sample_size", config["sample_size"], rule)
        return
    if config["caption_projection_dim"] != width:
        yield allowed(
            "caption_projection_dim",
            config["caption_projection_dim"],
            f"{width}, as num_attention_heads times attention_head_dim",
        )
    yield from patched(config)


def _prompt(encoders: Encoders, prompt: str, wanted: Wanted) -> Arrays:
    """Return the text condition (tokens of CLIP, then of T5) and both CLIPs' vectors of the whole text.

    CLIP's tokens are padded with zeros to T5's width. Zeros stand for T5's tokens where T5 is left out.
    """
    states, pooled = two_clips(encoders, prompt)
    text = np.zeros((1, *wanted.shapes[TEXT]), np.float32)
    tokens, width = states.shape[1:]
    text[:, :tokens, :width] = states
    if "text_encoder_3" in encoders:
        text[:, tokens:] = encoders["text_encoder_3"](prompt, [LAST])[LAST]
    return {TEXT: text, POOLED: np.concatenate(pooled, -1)}


FAMILY = Family(
    name="SD3Transformer2DModel",
    part="transformer",
    parameters=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs",
        "return_dict",
        "skip_layers",
    ),
    conditions=joint_attention,
    faults=_faults,
    pipelines=(
        Pipeline(
            "StableDiffusion3Pipeline",
            PromptLayout(
                gives=(
                    "encoder_hidden_states",
                    "unconditional.encoder_hidden_states",
                    "pooled_projections",
                    "unconditional.pooled_projections",
                ),
                encoders=("text_encoder", "text_encoder_2"),
                optional=("text_encoder_3",),
                conditions=_prompt,
                reads_denoiser=True,  # without T5, it pads with zeros of the width in the transformer's config
                before_t5="text_encoder",
            ),
            scaling=("shift_factor",),
            genai=True,
        ),
    ),
    resizable=True,
    multiple=lambda config: int(config.get("patch_size") or 2),
    runtime=("pqcad_qat.serving.transformer", "OVTransformer2DModel"),
)
