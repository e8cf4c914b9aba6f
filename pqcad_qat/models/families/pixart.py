"""PixArtTransformer2DModel, the denoiser of PixArt-alpha: a transformer that reads text encoded by T5 and its mask.

Not here: the rules that all transformers of patches share (config_faults.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pqcad_qat.models.families.config_faults import allowed, among, patched, total_width
from pqcad_qat.models.families.family import TEXT, TEXT_MASK, ConditionInput, Config, Family, Pipeline, text_inputs
from pqcad_qat.models.families.prompt_layouts import LAST, Arrays, Encoders, PromptLayout, Wanted


def _conditions(config: Config) -> tuple[ConditionInput, ...]:
    return text_inputs(config["caption_channels"] or config["cross_attention_dim"], masked=True)


def _faults(config: Config) -> Iterator[str]:
    wanted = config["use_additional_conditions"]
    if config["sample_size"] == 128 if wanted is None else wanted:
        yield "use_additional_conditions: got true (resolution and aspect ratio); allowed false"
    yield from among(config, "norm_type", ("ada_norm_single",))
    yield from among(config, "attention_type", ("default", None))
    for key in ("cross_attention_dim", "num_embeds_ada_norm"):
        if config[key] is None:
            yield allowed(key, None, "a number")
    if (width := total_width(config)) != config["cross_attention_dim"] and config["caption_channels"] is not None:
        yield allowed(
            "cross_attention_dim",
            config["cross_attention_dim"],
            f"{width}, as num_attention_heads times attention_head_dim",
        )
    yield from patched(config)


def _prompt(encoders: Encoders, prompt: str, _: Wanted) -> Arrays:
    encoder, cleaned = encoders["text_encoder"], prompt.lower().strip()
    return {TEXT: encoder(cleaned, [LAST])[LAST], TEXT_MASK: encoder.mask(cleaned).astype(np.float32)}


FAMILY = Family(
    name="PixArtTransformer2DModel",
    part="transformer",
    parameters=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "attention_mask",
        "encoder_attention_mask",
        "return_dict",
    ),
    conditions=_conditions,
    faults=_faults,
    former="ada_norm_single",
    pipelines=(
        Pipeline(
            "PixArtAlphaPipeline",
            PromptLayout(
                gives=(
                    "encoder_hidden_states",
                    "encoder_attention_mask",
                    "unconditional.encoder_hidden_states",
                    "unconditional.encoder_attention_mask",
                ),
                encoders=("text_encoder",),
                conditions=_prompt,
            ),
        ),
    ),
)
