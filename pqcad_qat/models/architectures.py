"""The denoisers that can be taken: what each class needs beside x_t and t, how its call is spelled, where its folder
is.

Not here: loading them, or calling them (denoiser.py), nor where conditions come from (conditions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import shown
from pqcad_qat.models import config_faults, flux
from pqcad_qat.models.config_faults import SIZES, sides_of
from pqcad_qat.models.config_values import check_values, with_defaults
from pqcad_qat.sampling.flow import settled
from pqcad_qat.sampling.schedulers import FLOW_SCHEDULER

Config = Mapping[str, Any]

SampleSize = int | tuple[int, ...]
"""Height and width of x_t; one number where they are alike."""

TEXT = "encoder_hidden_states"
"""The condition that is a sequence of text's tokens."""

TEXT_MASK = "encoder_attention_mask"
"""The condition that says which of its tokens count."""

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


def _called(denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: dict[str, Any]) -> Any:
    """As most classes are called: with x_t (B, C, H, W), and t (B,) by name."""
    return denoiser(x_t, timestep=t, **condition, return_dict=False)


@dataclass(frozen=True)
class Architecture:
    """How denoisers of one class are described and called.

    Attributes:
        name: diffusers' class.
        part: of a pipeline: the folder that holds it.
        conditions: config -> the tensors that it takes beside x_t and t.
        faults: config with every default -> what it asks for that we do not give, and values that do not go together.
        held_in: condition -> the keyword argument that is a dict with it.
        null_class: config -> the label that stands for no class, where the class has one of its own.
        call: (denoiser, x_t, t, keyword arguments) -> the prediction, at the head of a tuple or alone.
        patch: side of the patches of x_t whose pixels are the channels that the config counts.
        default_size: height and width of x_t where the config has no place for them.
        resizable: whether x_t may have another size than the config says.
        scheduler: (scheduler config, height and width of x_t, its file) -> with what the class's own pipeline adds to
            it.
    """

    name: str
    part: Literal["unet", "transformer"]
    conditions: Callable[[Config], tuple[ConditionInput, ...]]
    faults: Callable[[Config], Iterator[str]]
    held_in: Mapping[str, str] = field(default_factory=dict)
    null_class: Callable[[Config], int | None] = lambda _: None
    call: Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], Any] = _called
    patch: int = 1
    default_size: int | None = None
    resizable: bool = False
    scheduler: Callable[[Config, tuple[int, int], str], dict[str, Any]] = lambda config, *_: dict(config)

    def sample_shape(self, config: Config) -> tuple[int, int, int]:
        """(C, H, W) of x_t, as a checked diffusers config says it."""
        sides = sides_of(config)
        assert sides is not None
        return int(config["in_channels"]) // self.patch**2, *sides

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
        text = config["projection_class_embeddings_input_dim"] - SIZES * config["addition_time_embed_dim"]
        found += (
            ConditionInput("text_embeds", (text,), "float32"),
            ConditionInput("time_ids", (SIZES,), "int64", LARGEST_SIZE + 1),
        )
    return found + _class_labels(config)


def _dit_conditions(config: Config) -> tuple[ConditionInput, ...]:
    # its table has a row for no class
    return (ConditionInput("class_labels", (), "int64", config["num_embeds_ada_norm"] + 1),)


def _pixart_conditions(config: Config) -> tuple[ConditionInput, ...]:
    width = config["caption_channels"] or config["cross_attention_dim"]
    return ConditionInput(TEXT, (None, width), "float32"), ConditionInput(TEXT_MASK, (None,), "float32")


def _joint_attention(config: Config) -> tuple[ConditionInput, ...]:
    """Of SD3Transformer2DModel and FluxTransformer2DModel."""
    found: tuple[ConditionInput, ...] = (
        ConditionInput("encoder_hidden_states", (None, config["joint_attention_dim"]), "float32"),
        ConditionInput("pooled_projections", (config["pooled_projection_dim"],), "float32"),
    )
    return found + ((ConditionInput("guidance", (), "float32"),) if config.get("guidance_embeds") else ())


def _flux_scheduler(config: Config, size: tuple[int, int], where: str) -> dict[str, Any]:
    tokens = size[0] // flux.PATCH * (size[1] // flux.PATCH)
    return settled(config, tokens, where) if config.get("_class_name") == FLOW_SCHEDULER else dict(config)


ARCHITECTURES: Mapping[str, Architecture] = {
    found.name: found
    for found in (
        Architecture("UNet2DModel", "unet", _class_labels, config_faults.unet_2d, resizable=True),
        Architecture(
            "UNet2DConditionModel",
            "unet",
            _cross_attention,
            config_faults.unet_2d_condition,
            held_in={"text_embeds": "added_cond_kwargs", "time_ids": "added_cond_kwargs"},
            resizable=True,
        ),
        Architecture(
            "DiTTransformer2DModel",
            "transformer",
            _dit_conditions,
            config_faults.dit,
            null_class=lambda config: int(config["num_embeds_ada_norm"]),
        ),
        Architecture("PixArtTransformer2DModel", "transformer", _pixart_conditions, config_faults.pixart),
        Architecture("SD3Transformer2DModel", "transformer", _joint_attention, config_faults.sd3, resizable=True),
        Architecture(
            "FluxTransformer2DModel",
            "transformer",
            _joint_attention,
            config_faults.flux,
            call=flux.call,
            patch=flux.PATCH,
            default_size=flux.DEFAULT_SIZE,
            resizable=True,
            scheduler=_flux_scheduler,
        ),
    )
}
"""By the name of diffusers' class."""

FORMER = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""norm_type -> the class, of configs that name the Transformer2DModel of which it was a kind: those of DiT and PixArt
on the hub do.
"""


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
        raise ModelError(f"{where}: _class_name: got {shown(name)}; allowed {', '.join(ARCHITECTURES)}")
    return found


def checked_config(
    architecture: Architecture, config: Config, where: str, sample_size: SampleSize | None = None
) -> dict[str, Any]:
    """A diffusers config with every default of its class, and the height and width of x_t: those asked for, or its own.

    Raises:
        ModelError: a value that the class cannot be built with, or that asks for what we do not give; a size that it
            does not take.
    """
    check_values(architecture.name, config, where)
    if sample_size is not None and not architecture.resizable:
        raise ModelError(
            f"model.sample_size: got {shown(sample_size)}; allowed null: {architecture.name} keeps its own"
        )
    full = with_defaults(architecture.name, config)
    sides = sides_of({"sample_size": sample_size or full.get("sample_size") or architecture.default_size})
    if sides is None:
        raise ModelError(
            f"{where}: sample_size: got null; allowed the height and width of x_t, for which the model is exported"
        )
    full["sample_size"] = sides[0] if sides[0] == sides[1] else list(sides)
    if (fault := next(chain(architecture.faults(full), config_faults.channels(full)), None)) is not None:
        of_policy = sample_size is not None and fault.startswith("sample_size")
        raise ModelError(f"model.{fault}" if of_policy else f"{where}: {fault} ({architecture.name})")
    return full
