"""The classes that describe a model family: its denoiser, the conditions that it takes beside x_t and t, and its
pipelines.

Not here: the families themselves (one file each, beside this one), or the search by name (table.py). Torch tensors and
modules pass through some of these functions, but this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pqcad_qat.models.families.config_faults import sides_of
from pqcad_qat.models.families.latent_rows import PATCH
from pqcad_qat.models.families.prompt_layouts import PromptLayout

Config = Mapping[str, Any]

Part = Literal["unet", "transformer"]
DENOISER_FOLDERS: tuple[str, ...] = get_args(Part)
"""Folders of a pipeline that may hold its denoiser, as diffusers and optimum-intel name them."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders of a pipeline's text encoders, in diffusers' pipelines and in deployed folders."""

TEXT = "encoder_hidden_states"
"""Name of the condition that holds the text as a sequence of token embeddings."""

TEXT_MASK = "encoder_attention_mask"
"""Name of the condition that marks which of the text's tokens count."""

TEXT_TOKENS = 77
"""Number of text tokens of an example input, CLIP's, where only the data decide the number."""

LARGEST_SIZE = 4096
"""Largest value in SDXL's `time_ids`, in pixels."""

PIPELINE_ROOT = "DiffusionPipeline"
"""Base class of diffusers' pipelines, which an index names where there is no pipeline for a denoiser alone."""

SCALING = ("shift_factor", "latents_mean", "latents_std")
"""Keys of a VAE's config that, beside scaling_factor, say how latents are scaled for its decoder."""


def factor_of(blocks: Sequence[Any]) -> int:
    """Return the ratio of the sides before and after a network of so many levels, each half as large as the one before.

    For a VAE it is that of a picture's side to the side of its latents.
    """
    return int(2 ** (len(blocks) - 1))


@dataclass(frozen=True)
class ConditionInput:
    """A tensor that a denoiser takes beside x_t and t.

    Attributes:
        name: its name in diffusers.
        shape: shape of one sample's tensor; None stands for a length that the data decide.
        dtype: dtype in batches and in the exported graph.
        bound: upper limit of whole numbers, which lie in [0, bound); None where there is none.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: Literal["float32", "int64"]
    bound: int | None = None

    def __str__(self) -> str:
        sizes = ", ".join("tokens" if size is None else str(size) for size in self.shape)
        return f"{self.name} ({sizes}) {self.dtype}" + (f" in [0, {self.bound})" if self.bound is not None else "")


def text_inputs(width: int, masked: bool = False) -> tuple[ConditionInput, ...]:
    """Return the inputs of a text with token embeddings of `width` numbers, and of its mask if `masked`."""
    mask = (ConditionInput(TEXT_MASK, (None,), "float32"),) if masked else ()
    return ConditionInput(TEXT, (None, width), "float32"), *mask


def condition_inputs(entries: Iterable[Mapping[str, Any]]) -> tuple[ConditionInput, ...]:
    """Return the inputs that the entries of a deployed folder's manifest describe."""
    return tuple(ConditionInput(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries)


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline class that a family's denoiser belongs to.

    Attributes:
        name: diffusers' class.
        prompts: how it turns a prompt into conditions; None where it takes no prompt.
        scaling: the keys of SCALING in its VAE's config that it uses.
        genai: whether OpenVINO GenAI has a pipeline of this class.
    """

    name: str
    prompts: PromptLayout | None = None
    scaling: tuple[str, ...] = ()
    genai: bool = False


def _called(denoiser: Any, x_t: Any, t: Any, condition: dict[str, Any]) -> Any:
    """Call the denoiser as most classes take it: x_t (B, C, H, W) by position, and t (B,) by name."""
    return denoiser(x_t, timestep=t, **condition, return_dict=False)


@dataclass(frozen=True, kw_only=True)
class Family:
    """All denoisers of one diffusers class: how they are described, called, packed into pipelines, and deployed.

    Attributes:
        name: diffusers' class of the denoiser.
        part: folder of a pipeline that holds it.
        parameters: arguments of its `forward` in order, for calls by position.
        conditions: function from a config to the tensors that the denoiser takes beside x_t and t.
        faults: function from a config with all defaults to messages about unsupported features and values that do not
            fit together.
        former: the norm_type that marks this class in configs of the older class Transformer2DModel.
        pipelines: diffusers' pipelines with this denoiser, as far as their other parts are supported.
        alone: diffusers' pipeline of a scheduler and a denoiser that takes no condition.
        held_in: mapping from a condition to the dictionary argument that contains it.
        null_class: function from a config to the label that stands for no class; the result is None without such a
            label.
        call: function (denoiser, x_t, t, keyword arguments) -> the prediction, alone or first in a tuple.
        takes_rows: whether its pipeline packs x_t into rows of patches and divides timesteps by 1000 (latent_rows.py).
        default_size: height and width of x_t where the config has no key for them.
        resizable: whether x_t may have another size than the config's.
        scheduler: function (scheduler config, height and width of x_t, file name) -> the config with what the pipeline
            adds.
        rotations: classes of modules that compute only from patch positions, and so are constants of a graph of one
            size.
        multiple: function from a config to the number by which the class divides the height and width of x_t.
        float_ports: conditions of whole numbers that a graph takes as float32, as diffusers' pipelines pass them.
        runtime: module and class that stand for the denoiser in a deployed folder's model_index.json.
    """

    name: str
    part: Part
    parameters: tuple[str, ...]
    conditions: Callable[[Config], tuple[ConditionInput, ...]] = lambda _: ()
    faults: Callable[[Config], Iterator[str]] = lambda _: iter(())
    former: str | None = None
    pipelines: tuple[Pipeline, ...] = ()
    alone: str = PIPELINE_ROOT
    held_in: Mapping[str, str] = field(default_factory=dict)
    null_class: Callable[[Config], int | None] = lambda _: None
    call: Callable[[Any, Any, Any, dict[str, Any]], Any] = _called
    takes_rows: bool = False
    default_size: int | None = None
    resizable: bool = False
    scheduler: Callable[[Config, tuple[int, int], str], dict[str, Any]] = lambda config, *_: dict(config)
    rotations: tuple[str, ...] = ()
    multiple: Callable[[Config], int] = lambda _: 1
    float_ports: tuple[str, ...] = ()
    runtime: tuple[str, str] = ("pqcad_qat.serving.runtime", "OVUNet2DModel")

    @property
    def channel_factor(self) -> int:
        """Number of channels in the config per channel of x_t: the pixels of a patch where x_t is packed into rows,
        else 1.
        """
        return PATCH**2 if self.takes_rows else 1

    def sample_shape(self, config: Config) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of x_t, from a checked diffusers config."""
        sides = sides_of(config)
        assert sides is not None
        return int(config["in_channels"]) // self.channel_factor, *sides

    def keywords(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        """Return a condition, given by name, as keyword arguments of the class."""
        spelled: dict[str, Any] = {}
        for name, value in condition.items():
            if (holder := self.held_in.get(name)) is None:
                spelled[name] = value
            else:
                spelled.setdefault(holder, {})[name] = value
        return spelled
