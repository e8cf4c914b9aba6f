"""UNet2DConditionModel, the denoiser of Stable Diffusion 1, 2 and XL: a UNet with text as a condition.

Not here: the parts that it shares with the UNet without text (unet.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pqcad_qat.models.families.config_faults import allowed, among, nothing
from pqcad_qat.models.families.family import (
    LARGEST_SIZE,
    TEXT,
    ConditionInput,
    Config,
    Family,
    Pipeline,
    factor_of,
    text_inputs,
)
from pqcad_qat.models.families.prompt_layouts import (
    LAST,
    PROJECTED,
    Arrays,
    Encoders,
    PromptLayout,
    Wanted,
    two_clips,
)
from pqcad_qat.models.families.unet import DOWN_BLOCKS, class_labels, level_faults

CROSS_DOWN = ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", *DOWN_BLOCKS)
CROSS_UP = tuple(name.replace("Downsample", "Upsample").replace("Down", "Up") for name in CROSS_DOWN)
CROSS_MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None)
"""Block types of the UNet with text, on the way down, on the way up, and in the middle."""

REFINER = {"text": 1280, "sizes": 5}
"""Width of the pooled text of SDXL's refiner, and the number of its sizes, the last of which is an aesthetic score."""

SIZES = 6
"""Number of values in SDXL's `time_ids`."""


def _conditions(config: Config) -> tuple[ConditionInput, ...]:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    inputs = text_inputs(width if isinstance(width, int) else width[0])
    if config.get("addition_embed_type") == "text_time":  # SDXL's further conditions
        text = config["projection_class_embeddings_input_dim"] - SIZES * config["addition_time_embed_dim"]
        inputs += (
            ConditionInput("text_embeds", (text,), "float32"),
            ConditionInput("time_ids", (SIZES,), "int64", LARGEST_SIZE + 1),
        )
    return inputs + class_labels(config)


def _faults(config: Config) -> Iterator[str]:
    width = config["cross_attention_dim"]
    if not isinstance(width, int) and len(set(width)) != 1:
        yield allowed("cross_attention_dim", width, "one width for all blocks")
    yield from nothing(
        config, "time_cond_proj_dim", "the guidance that LCM's denoisers read beside the time is no input here"
    )
    yield from among(config, "addition_embed_type", (None, "text_time"))
    yield from among(config, "encoder_hid_dim_type", (None, "text_proj"))
    yield from among(config, "class_embed_type", (None, "timestep", "identity", "projection", "simple_projection"))
    yield from among(config, "time_embedding_type", ("positional",))
    yield from among(config, "attention_type", ("default", None))
    yield from nothing(config, "dual_cross_attention", "a second text is no input here")
    yield from nothing(config, "num_attention_heads", "diffusers takes it as attention_head_dim alone")
    if config["encoder_hid_dim_type"] and config["encoder_hid_dim"] is None:
        yield allowed("encoder_hid_dim", None, f"a width, as encoder_hid_dim_type is {config['encoder_hid_dim_type']}")
    if config["class_embeddings_concat"] and config["class_embed_type"] is None and config["num_class_embeds"] is None:
        yield allowed("class_embeddings_concat", True, "false without class_embed_type or num_class_embeds")
    if (
        str(config["class_embed_type"]).endswith("projection")
        and config["projection_class_embeddings_input_dim"] is None
    ):
        yield allowed(
            "projection_class_embeddings_input_dim",
            None,
            f"a width, as class_embed_type is {config['class_embed_type']}",
        )
    yield from _text_and_sizes(config)
    yield from level_faults(config, CROSS_DOWN, CROSS_UP, CROSS_MID)
    for key in ("conv_in_kernel", "conv_out_kernel"):
        if config[key] % 2 == 0:
            yield allowed(key, config[key], "odd numbers, which keep the size of x_t")
    levels = len(config["block_out_channels"])
    per_level = (
        "layers_per_block",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "attention_head_dim",
        "only_cross_attention",
    )
    for key in (*per_level, "reverse_transformer_layers_per_block"):
        if isinstance(config[key], list | tuple) and len(config[key]) != levels:
            yield allowed(key, config[key], f"{levels} numbers, as many as block_out_channels")
    heads = config["attention_head_dim"]
    for channels, count in zip(
        config["block_out_channels"], [heads] * levels if isinstance(heads, int) else heads, strict=False
    ):
        if count > channels:
            yield allowed(
                "attention_head_dim", heads, f"at most {channels} for {channels} channels: it is the number of heads"
            )
            return


def _text_and_sizes(config: Config) -> Iterator[str]:
    """Yield the faults in SDXL's further conditions."""
    if config["addition_embed_type"] != "text_time":
        return
    width, total = config["addition_time_embed_dim"], config["projection_class_embeddings_input_dim"]
    if width is None or total is None:
        key = "addition_time_embed_dim" if width is None else "projection_class_embeddings_input_dim"
        yield allowed(key, None, "a width, as addition_embed_type is text_time")
    elif total == REFINER["text"] + REFINER["sizes"] * width:
        rule = (
            f"{REFINER['text'] + SIZES * width}: SDXL's refiner, which reads an aesthetic score, is not "
            "taken; its base model is"
        )
        yield allowed("projection_class_embeddings_input_dim", total, rule)
    elif total <= SIZES * width:
        yield allowed(
            "projection_class_embeddings_input_dim",
            total,
            f"over {SIZES * width}: {SIZES} sizes of {width}, and a text",
        )


def _prompt(encoders: Encoders, prompt: str, _: Wanted) -> Arrays:
    return {TEXT: encoders["text_encoder"](prompt, [LAST])[LAST]}


def _prompt_of_xl(encoders: Encoders, prompt: str, wanted: Wanted) -> Arrays:
    states, pooled = two_clips(encoders, prompt)
    # original size, offset of the crop (none), and target size, in pixels
    sizes = np.array([[*wanted.picture, 0, 0, *wanted.picture]], np.int64)
    return {TEXT: states, PROJECTED: pooled[1], "time_ids": sizes}


FAMILY = Family(
    name="UNet2DConditionModel",
    part="unet",
    parameters=(
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
        "return_dict",
    ),
    conditions=_conditions,
    faults=_faults,
    pipelines=(
        Pipeline(
            "StableDiffusionPipeline",
            PromptLayout(
                gives=("encoder_hidden_states", "unconditional.encoder_hidden_states"),
                encoders=("text_encoder",),
                conditions=_prompt,
            ),
            genai=True,
        ),
        Pipeline(
            "StableDiffusionXLPipeline",
            PromptLayout(
                gives=(
                    "encoder_hidden_states",
                    "unconditional.encoder_hidden_states",
                    "text_embeds",
                    "unconditional.text_embeds",
                ),
                encoders=("text_encoder", "text_encoder_2"),
                conditions=_prompt_of_xl,
            ),
            scaling=("latents_mean", "latents_std"),
            genai=True,
        ),
    ),
    held_in={"text_embeds": "added_cond_kwargs", "time_ids": "added_cond_kwargs"},
    resizable=True,
    multiple=lambda config: factor_of(config.get("block_out_channels") or [0]),
    float_ports=("time_ids",),
)
