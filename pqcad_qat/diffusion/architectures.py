"""The denoisers that can be taken: what each class needs beside x_t and t, how its call is spelled, where its folder is.

Not here: loading them, or calling them (denoiser.py), nor where conditions come from (conditions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pqcad_qat.errors import ModelError

Config = Mapping[str, Any]

TEXT_TOKENS = 77
"""Tokens of an example where only the data say how many there are: CLIP's."""

LARGEST_SIZE = 4096
"""Of SDXL's `time_ids`, in pixels."""


@dataclass(frozen=True)
class ConditionInput:
    """A tensor that a denoiser takes beside x_t and t.

    Attributes:
        name: as diffusers calls it.
        shape: of one sample's; None is a length that the data decide.
        dtype: as our batches and the exported graph hold it.
        bound: whole numbers lie in [0, bound).
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: Literal["float32", "int64"]
    bound: int | None = None

    def __str__(self) -> str:
        sizes = ", ".join("tokens" if size is None else str(size) for size in self.shape)
        return f"{self.name} ({sizes}) {self.dtype}" + (f" in [0, {self.bound})" if self.bound is not None else "")


def condition_inputs(entries: Iterable[Mapping[str, Any]]) -> tuple[ConditionInput, ...]:
    """From the entries of a deployed folder's manifest."""
    return tuple(ConditionInput(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries)


@dataclass(frozen=True)
class Architecture:
    """How denoisers of one class are described and called.

    Attributes:
        name: diffusers' class.
        part: of a pipeline: the folder that holds it.
        conditions: config -> the tensors that it takes beside x_t and t.
        unsupported: config -> what it asks for that we do not give, or "".
        held_in: condition -> the keyword argument that is a dict with it.
        null_class: config -> the label that stands for no class, where the class has one of its own.
    """

    name: str
    part: Literal["unet", "transformer"]
    conditions: Callable[[Config], tuple[ConditionInput, ...]]
    unsupported: Callable[[Config], str] = lambda _: ""
    held_in: Mapping[str, str] = field(default_factory=dict)
    null_class: Callable[[Config], int | None] = lambda _: None

    def keywords(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        """A condition by name as the keyword arguments of the class."""
        spelled: dict[str, Any] = {}
        for name, value in condition.items():
            if (holder := self.held_in.get(name)) is None:
                spelled[name] = value
            else:
                spelled.setdefault(holder, {})[name] = value
        return spelled


def _class_labels(config: Config) -> tuple[ConditionInput, ...]:
    """Of UNet2DModel and UNet2DConditionModel."""
    match config.get("class_embed_type"):
        case None:
            classes = config.get("num_class_embeds")
            return () if classes is None else (ConditionInput("class_labels", (), "int64", classes),)
        case "timestep":
            return (ConditionInput("class_labels", (), "int64", config.get("num_train_timesteps") or 1000),)
        case "identity":
            return (ConditionInput("class_labels", (_time_width(config),), "float32"),)
        case _:
            return (ConditionInput("class_labels", (config["projection_class_embeddings_input_dim"],), "float32"),)


def _time_width(config: Config) -> int:
    return int(config.get("time_embedding_dim") or 4 * config["block_out_channels"][0])


def _cross_attention(config: Config) -> tuple[ConditionInput, ...]:
    """Of UNet2DConditionModel."""
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    found: tuple[ConditionInput, ...] = (
        ConditionInput("encoder_hidden_states", (None, width if isinstance(width, int) else width[0]), "float32"),
    )
    if config.get("addition_embed_type") == "text_time":  # SDXL
        sizes = 6
        text = config["projection_class_embeddings_input_dim"] - sizes * config["addition_time_embed_dim"]
        found += (ConditionInput("text_embeds", (text,), "float32"), ConditionInput("time_ids", (sizes,), "int64", LARGEST_SIZE + 1))
    return found + _class_labels(config)


def _unet_2d_fault(config: Config) -> str:
    return _not_among(config, "class_embed_type", (None, "timestep", "identity"))


def _cross_attention_fault(config: Config) -> str:
    width = config["cross_attention_dim"]
    if not isinstance(width, int) and len(set(width)) > 1:
        return f"cross_attention_dim: got {width}; allowed one width for all blocks"
    return (
        _not_among(config, "addition_embed_type", (None, "text_time"))
        or _not_among(config, "encoder_hid_dim_type", (None, "text_proj"))
        or _not_among(config, "class_embed_type", (None, "timestep", "identity", "projection", "simple_projection"))
    )


def _not_among(config: Config, key: str, allowed: tuple[str | None, ...]) -> str:
    got = config.get(key)
    return "" if got in allowed else f"{key}: got {got!r}; allowed {', '.join(map(str, allowed))}"


def _dit_conditions(config: Config) -> tuple[ConditionInput, ...]:
    return (ConditionInput("class_labels", (), "int64", config["num_embeds_ada_norm"] + 1),)  # its table has a row for no class


def _dit_fault(config: Config) -> str:
    return _not_among(config, "norm_type", ("ada_norm_zero",))


def _pixart_conditions(config: Config) -> tuple[ConditionInput, ...]:
    width = config["caption_channels"] or config["cross_attention_dim"]
    return ConditionInput("encoder_hidden_states", (None, width), "float32"), ConditionInput("encoder_attention_mask", (None,), "float32")


def _pixart_fault(config: Config) -> str:
    asked = config.get("use_additional_conditions")
    asked = config.get("sample_size") == 128 if asked is None else asked
    return "use_additional_conditions: got true (resolution and aspect ratio); allowed false" if asked else ""


ARCHITECTURES: Mapping[str, Architecture] = {
    found.name: found
    for found in (
        Architecture("UNet2DModel", "unet", _class_labels, _unet_2d_fault),
        Architecture(
            "UNet2DConditionModel",
            "unet",
            _cross_attention,
            _cross_attention_fault,
            held_in={"text_embeds": "added_cond_kwargs", "time_ids": "added_cond_kwargs"},
        ),
        Architecture(
            "DiTTransformer2DModel",
            "transformer",
            _dit_conditions,
            _dit_fault,
            null_class=lambda config: int(config["num_embeds_ada_norm"]),
        ),
        Architecture("PixArtTransformer2DModel", "transformer", _pixart_conditions, _pixart_fault),
    )
}
"""By the name of diffusers' class."""

FORMER = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""norm_type -> the class, of configs that name the Transformer2DModel of which it was a kind: those of DiT and PixArt on the hub do."""


def architecture_of(denoiser: nn.Module) -> Architecture | None:
    """Of a denoiser, also one that is wrapped for several processes; None for a plain module."""
    module = denoiser.module if isinstance(denoiser, DistributedDataParallel) else denoiser
    return ARCHITECTURES.get(type(module).__name__)


def known_architecture(config: Config, where: str) -> Architecture:
    """Of a diffusers config.

    Raises:
        ModelError: a class, or a variant of it, that cannot be taken.
    """
    name = config.get("_class_name")
    name = FORMER.get(str(config.get("norm_type")), name) if name == "Transformer2DModel" else name
    found = ARCHITECTURES.get(str(name))
    if found is None:
        raise ModelError(f"{where}: _class_name: got {name!r}; allowed {', '.join(ARCHITECTURES)}")
    return found


def check_config(architecture: Architecture, config: Config, where: str) -> None:
    """Raise ModelError for a config, with every default of its class, that asks for what we do not give."""
    if fault := architecture.unsupported(config):
        raise ModelError(f"{where}: {fault}")
    inputs, outputs = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if outputs not in (inputs, 2 * inputs):  # twice: the prediction, then its variance
        raise ModelError(
            f"{where}: out_channels: got {outputs}; allowed {inputs}, as in_channels, or {2 * inputs}, with a learned variance"
        )
