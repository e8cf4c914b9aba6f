"""What a diffusers config asks for that is not given here, or whose values do not go together: class by class, by the
key at fault.

Not here: the kinds and bounds of single values (config_values.py), nor what each class takes (architectures.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pqcad_qat.machine.json_files import shown

Config = Mapping[str, Any]
"""With every default of its class, each value of the class's kind and within its bounds."""

ACTIVATIONS = ("swish", "silu", "mish", "gelu", "relu")
FEED_FORWARD = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "linear-silu", "swiglu")
"""Activations of UNets' blocks, and of transformers'."""

DOWN_BLOCKS = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SkipDownBlock2D",
    "AttnSkipDownBlock2D",
    "KDownBlock2D",
)
UP_BLOCKS = tuple(name.replace("Downsample", "Upsample").replace("Down", "Up") for name in DOWN_BLOCKS)
CROSS_DOWN = ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", *DOWN_BLOCKS)
CROSS_UP = tuple(name.replace("Downsample", "Upsample").replace("Down", "Up") for name in CROSS_DOWN)
CROSS_MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None)
"""Blocks of UNet2DModel, and of UNet2DConditionModel."""

ENCODER_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
DECODER_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
"""Of AutoencoderKL."""

REFINER = {"text": 1280, "sizes": 5}
"""Of SDXL's refiner: the width of its pooled text, and its sizes, the last of which is an aesthetic score."""

SIZES = 6
"""Of SDXL's `time_ids`."""

LARGEST_TABLE = 2**26
"""Numbers in a transformer's table of places."""


def allowed(key: str, got: object, rule: str) -> str:
    return f"{key}: got {shown(got)}; allowed {rule}"


def sides_of(config: Config) -> tuple[int, int] | None:
    """Height and width of x_t; None where the config does not say them."""
    size = config.get("sample_size")
    return None if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])


def size_fault(config: Config, multiple: int, why: str) -> Iterator[str]:
    """Where a side of x_t is no multiple."""
    if any(side % multiple for side in sides_of(config) or ()):
        yield allowed("sample_size", config["sample_size"], f"multiples of {multiple}, {why}")


def _among(config: Config, key: str, known: Sequence[str | None]) -> Iterator[str]:
    if config.get(key) not in known:
        yield allowed(key, config.get(key), ", ".join(map(str, known)))


def _nothing(config: Config, key: str, why: str) -> Iterator[str]:
    if config.get(key):
        yield allowed(key, config[key], f"null: {why}")


def unet_2d(config: Config) -> Iterator[str]:
    """UNet2DModel."""
    levels = len(config["block_out_channels"])
    yield from _among(config, "class_embed_type", (None, "timestep", "identity"))
    yield from _unet(config, DOWN_BLOCKS, UP_BLOCKS, ("UNetMidBlock2D", None))
    yield from _among(config, "downsample_type", ("conv", "resnet", None))
    yield from _among(config, "upsample_type", ("conv", "resnet", None))
    if config["time_embedding_type"] == "fourier":
        yield allowed(
            "time_embedding_type",
            "fourier",
            "positional, learned: a time of noise levels (score-based models) is no time step",
        )
    yield from _among(config, "time_embedding_type", ("positional", "learned"))
    if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
        yield allowed("num_train_timesteps", None, "a number, as the scheduler's: time_embedding_type is learned")
    if (width := config["attention_head_dim"]) is not None:
        kinds = (*config["down_block_types"], *reversed(config["up_block_types"]))
        channels = [c for kind, c in zip(kinds, (*config["block_out_channels"],) * 2, strict=False) if "Attn" in kind]
        channels += [config["block_out_channels"][-1]] if config["add_attention"] and config["mid_block_type"] else []
        if width > min(channels, default=width):
            yield allowed("attention_head_dim", width, f"at most {min(channels)}, the fewest channels under attention")
    yield from size_fault(config, 2 ** (levels - 1), f"which its {levels} levels halve {levels - 1} times")


def unet_2d_condition(config: Config) -> Iterator[str]:
    """UNet2DConditionModel."""
    width = config["cross_attention_dim"]
    if not isinstance(width, int) and len(set(width)) != 1:
        yield allowed("cross_attention_dim", width, "one width for all blocks")
    yield from _nothing(
        config, "time_cond_proj_dim", "the guidance that LCM's denoisers read beside the time is no input here"
    )
    yield from _among(config, "addition_embed_type", (None, "text_time"))
    yield from _among(config, "encoder_hid_dim_type", (None, "text_proj"))
    yield from _among(config, "class_embed_type", (None, "timestep", "identity", "projection", "simple_projection"))
    yield from _among(config, "time_embedding_type", ("positional",))
    yield from _among(config, "attention_type", ("default", None))
    yield from _nothing(config, "dual_cross_attention", "a second text is no input here")
    yield from _nothing(config, "num_attention_heads", "diffusers takes it as attention_head_dim alone")
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
    yield from _unet(config, CROSS_DOWN, CROSS_UP, CROSS_MID)
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
    """SDXL's further conditions."""
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


def _unet(config: Config, downs: Sequence[str], ups: Sequence[str], mids: Sequence[str | None]) -> Iterator[str]:
    """What both UNets have in common."""
    channels = config["block_out_channels"]
    if not channels:
        yield allowed("block_out_channels", channels, "the channels of one level or more")
        return
    yield from _among(config, "mid_block_type", mids)
    yield from _among(config, "act_fn", ACTIVATIONS)
    yield from _among(config, "resnet_time_scale_shift", ("default", "scale_shift", "ada_group", "spatial"))
    for key, known in (("down_block_types", downs), ("up_block_types", ups)):
        if len(config[key]) != len(channels):
            yield allowed(key, config[key], f"{len(channels)} blocks, as many as block_out_channels")
        if unknown := [kind for kind in config[key] if kind.removeprefix("UNetRes") not in known]:
            yield allowed(key, unknown[0], ", ".join(known))
    groups = config["norm_num_groups"]
    for index, count in enumerate(channels):
        kind = config["down_block_types"][index] if index < len(config["down_block_types"]) else ""
        if (
            groups is not None
            and count % groups
            and (index == 0 or not kind.endswith(("SkipDownBlock2D", "KDownBlock2D")))
        ):
            yield allowed("norm_num_groups", groups, f"divisors of {count}, of block_out_channels {shown(channels)}")
            break


def dit(config: Config) -> Iterator[str]:
    """DiTTransformer2DModel."""
    yield from _among(config, "norm_type", ("ada_norm_zero",))
    if config["num_embeds_ada_norm"] is None:
        yield allowed("num_embeds_ada_norm", None, "the number of classes")
    yield from _patched(config)


def pixart(config: Config) -> Iterator[str]:
    """PixArtTransformer2DModel."""
    wanted = config["use_additional_conditions"]
    if config["sample_size"] == 128 if wanted is None else wanted:
        yield "use_additional_conditions: got true (resolution and aspect ratio); allowed false"
    yield from _among(config, "norm_type", ("ada_norm_single",))
    yield from _among(config, "attention_type", ("default", None))
    for key in ("cross_attention_dim", "num_embeds_ada_norm"):
        if config[key] is None:
            yield allowed(key, None, "a number")
    if (width := _width(config)) != config["cross_attention_dim"] and config["caption_channels"] is not None:
        yield allowed(
            "cross_attention_dim",
            config["cross_attention_dim"],
            f"{width}, as num_attention_heads times attention_head_dim",
        )
    yield from _patched(config)


def _width(config: Config) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def _patched(config: Config) -> Iterator[str]:
    """Transformers of patches, with a table of places for each."""
    patch, width = config["patch_size"], _width(config)
    if "activation_fn" in config:
        yield from _among(config, "activation_fn", FEED_FORWARD)
    if width % 4:
        yield allowed(
            "attention_head_dim",
            config["attention_head_dim"],
            f"one whose {config['num_attention_heads']} heads are a multiple of 4",
        )
    tokens = (max(sides_of(config) or (0,)) // patch) ** 2
    if (
        max(tokens, (config.get("pos_embed_max_size") or 0) ** 2) * width > 8 * LARGEST_TABLE
        or tokens * width > LARGEST_TABLE
    ):
        yield allowed(
            "sample_size",
            config["sample_size"],
            f"at most {LARGEST_TABLE} numbers in its table of places of width {width}",
        )
    yield from size_fault(config, patch, "as patch_size")


def sd3(config: Config) -> Iterator[str]:
    """SD3Transformer2DModel."""
    patch, most, width = config["patch_size"], config["pos_embed_max_size"], _width(config)
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
    yield from _patched(config)


def flux(config: Config) -> Iterator[str]:
    """FluxTransformer2DModel; the pipeline packs patches of two by two."""
    if config["patch_size"] != 1:
        yield allowed("patch_size", config["patch_size"], "1: the pipeline packs its patches")
    if config["in_channels"] % 4:
        yield allowed("in_channels", config["in_channels"], "multiples of 4, the pixels of a patch")
    axes, width = config["axes_dims_rope"], config["attention_head_dim"]
    if len(axes) != 3 or sum(axes) != width or any(axis % 2 for axis in axes):
        yield allowed("axes_dims_rope", axes, f"three even numbers, together attention_head_dim ({width})")
    if any(side % 2 for side in sides_of(config) or ()):
        yield allowed("sample_size", config["sample_size"], "even numbers")


def channels(config: Config) -> Iterator[str]:
    """What is read beside the noisy sample, of any class."""
    inputs, outputs = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if outputs < inputs:
        more = f"{inputs - outputs} channels more than the {outputs} of its prediction"
        yield allowed(
            "in_channels",
            inputs,
            f"{outputs}, as out_channels: {more}, of another picture, a mask or a depth, are no input here",
        )
    elif outputs not in (inputs, 2 * inputs):  # twice: the prediction, then its variance
        yield allowed("out_channels", outputs, f"{inputs}, as in_channels, or {2 * inputs}, with a learned variance")


def autoencoder(config: Config) -> Iterator[str]:
    """AutoencoderKL."""
    levels = config["block_out_channels"]
    if not levels:
        yield allowed("block_out_channels", levels, "the channels of one level or more")
    for key, known in (("down_block_types", ENCODER_BLOCKS), ("up_block_types", DECODER_BLOCKS)):
        if len(config[key]) != len(levels):
            yield allowed(key, config[key], f"{len(levels)} blocks, as many as block_out_channels")
        if unknown := [kind for kind in config[key] if kind not in known]:
            yield allowed(key, unknown[0], ", ".join(known))
    yield from _among(config, "act_fn", ACTIVATIONS)
    if strange := [count for count in levels if count % config["norm_num_groups"]]:
        yield allowed(
            "norm_num_groups",
            config["norm_num_groups"],
            f"divisors of {strange[0]}, of block_out_channels {shown(levels)}",
        )
    if config["out_channels"] != 3:
        yield allowed("out_channels", config["out_channels"], "3: pictures")
    for key in ("latents_mean", "latents_std"):
        if config[key] is not None and len(config[key]) != config["latent_channels"]:
            yield allowed(key, config[key], f"{config['latent_channels']} numbers, one a latent channel")
