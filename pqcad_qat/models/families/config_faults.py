"""Config rules that several of diffusers' classes share: features that are not supported, and values that do not fit
together. Each rule yields messages that begin with the key at fault.

Not here: the rules of one family (its own file), or the types and bounds of single values (models/config_values.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pqcad_qat.machine.json_files import shown

Config = Mapping[str, Any]
"""Config with every default of its class filled in, where each value has the right type and lies within its bounds."""

ACTIVATIONS = ("swish", "silu", "mish", "gelu", "relu")
FEED_FORWARD = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "linear-silu", "swiglu")
"""Activations of UNet blocks (ACTIVATIONS) and of the feed-forward layers of transformers (FEED_FORWARD)."""


ENCODER_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
DECODER_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
"""Block types of the encoder and decoder of AutoencoderKL and VQModel."""


LARGEST_TABLE = 2**26
"""Largest number of values in a transformer's table of position embeddings."""


def allowed(key: str, got: object, rule: str) -> str:
    """Return the message that refuses a value of a key."""
    return f"{key}: got {shown(got)}; allowed {rule}"


def sides_of(config: Config) -> tuple[int, int] | None:
    """Return height and width of x_t; None where the config does not give them."""
    size = config.get("sample_size")
    return None if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])


def size_fault(config: Config, multiple: int, why: str) -> Iterator[str]:
    """Yield a fault where a side of x_t is not a multiple of `multiple`; `why` ends the message."""
    if any(side % multiple for side in sides_of(config) or ()):
        yield allowed("sample_size", config["sample_size"], f"multiples of {multiple}, {why}")


def among(config: Config, key: str, known: Sequence[str | None]) -> Iterator[str]:
    """Yield a fault where the value of a key is not among the known values."""
    if config.get(key) not in known:
        yield allowed(key, config.get(key), ", ".join(map(str, known)))


def nothing(config: Config, key: str, why: str) -> Iterator[str]:
    """Yield a fault where a key turns on an unsupported feature; `why` ends the message."""
    if config.get(key):
        yield allowed(key, config[key], f"null: {why}")


def total_width(config: Config) -> int:
    """Return the hidden width of a transformer, in features: the sum over its attention heads."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def patched(config: Config) -> Iterator[str]:
    """Yield the faults of a transformer of patches that has a table of position embeddings."""
    patch, width = config["patch_size"], total_width(config)
    if "activation_fn" in config:
        yield from among(config, "activation_fn", FEED_FORWARD)
    if width % 4:
        yield allowed(
            "attention_head_dim",
            config["attention_head_dim"],
            f"a number whose product with num_attention_heads ({config['num_attention_heads']}) is a multiple of 4",
        )
    tokens = (max(sides_of(config) or (0,)) // patch) ** 2
    # A table stored for pos_embed_max_size may be eight times as large as the part that sample_size uses.
    if (
        max(tokens, (config.get("pos_embed_max_size") or 0) ** 2) * width > 8 * LARGEST_TABLE
        or tokens * width > LARGEST_TABLE
    ):
        yield allowed(
            "sample_size",
            config["sample_size"],
            f"a size with at most {LARGEST_TABLE} numbers in its table of position embeddings, of width {width}",
        )
    yield from size_fault(config, patch, "as patch_size")


def channels(config: Config) -> Iterator[str]:
    """Yield the faults in the channels of x_t and of the prediction, for any class."""
    inputs, outputs = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if outputs < inputs:
        more = f"{inputs - outputs} more channels, of another picture, a mask or a depth, are no input here"
        yield allowed("in_channels", inputs, f"{outputs}, as out_channels: {more}")
    elif outputs not in (inputs, 2 * inputs):  # twice as many: the prediction is followed by its variance
        yield allowed("out_channels", outputs, f"{inputs}, as in_channels, or {2 * inputs}, with a learned variance")


def autoencoder(config: Config) -> Iterator[str]:
    """Yield the faults of a decoder's config, of AutoencoderKL or VQModel."""
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
        if config.get(key) is not None and len(config[key]) != config["latent_channels"]:
            yield allowed(key, config[key], f"{config['latent_channels']} numbers, one a latent channel")
