"""Rules that configs of several classes of diffusers share: what is asked for that is not given here, or values that do
not go together, by the key at fault.

Not here: the rules of one family (its own file), nor the kinds and bounds of single values (models/config_values.py).
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


ENCODER_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
DECODER_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
"""The blocks of AutoencoderKL."""


LARGEST_TABLE = 2**26
"""Numbers in a transformer's table of places."""


def allowed(key: str, got: object, rule: str) -> str:
    """The sentence that refuses a value of a key."""
    return f"{key}: got {shown(got)}; allowed {rule}"


def sides_of(config: Config) -> tuple[int, int] | None:
    """Height and width of x_t; None where the config does not say them."""
    size = config.get("sample_size")
    return None if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])


def size_fault(config: Config, multiple: int, why: str) -> Iterator[str]:
    """A fault where a side of x_t is no multiple."""
    if any(side % multiple for side in sides_of(config) or ()):
        yield allowed("sample_size", config["sample_size"], f"multiples of {multiple}, {why}")


def among(config: Config, key: str, known: Sequence[str | None]) -> Iterator[str]:
    """A fault where a key has none of the known values."""
    if config.get(key) not in known:
        yield allowed(key, config.get(key), ", ".join(map(str, known)))


def nothing(config: Config, key: str, why: str) -> Iterator[str]:
    """A fault where a key asks for something."""
    if config.get(key):
        yield allowed(key, config[key], f"null: {why}")


def total_width(config: Config) -> int:
    """The width of a transformer: that of all its heads."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def patched(config: Config) -> Iterator[str]:
    """What is wrong with a transformer of patches, which has a table of their places."""
    patch, width = config["patch_size"], total_width(config)
    if "activation_fn" in config:
        yield from among(config, "activation_fn", FEED_FORWARD)
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


def channels(config: Config) -> Iterator[str]:
    """What is wrong with the channels of x_t and of the prediction, in any class."""
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
    """What is wrong with an AutoencoderKL."""
    levels = config["block_out_channels"]
    if not levels:
        yield allowed("block_out_channels", levels, "the channels of one level or more")
    for key, known in (("down_block_types", ENCODER_BLOCKS), ("up_block_types", DECODER_BLOCKS)):
        if len(config[key]) != len(levels):
            yield allowed(key, config[key], f"{len(levels)} blocks, as many as block_out_channels")
        if unknown := [kind for kind in config[key] if kind not in known]:
            yield allowed(key, unknown[0], ", ".join(known))
    yield from among(config, "act_fn", ACTIVATIONS)
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
