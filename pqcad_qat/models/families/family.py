"""The words in which a family of models is described: its denoiser, what that takes beside x_t and t, its pipelines.

Not here: the families themselves (a file each, beside this one), or finding one by name (table.py). Torch tensors and
modules pass through some of these functions; none of them imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pqcad_qat.models.families.config_faults import sides_of
from pqcad_qat.models.families.latent_rows import PATCH
from pqcad_qat.models.families.prompt_layouts import PromptLayout

Config = Mapping[str, Any]

Part = Literal["unet", "transformer"]
DENOISER_FOLDERS: tuple[str, ...] = get_args(Part)
"""The folders of a pipeline that a denoiser may lie in, by its family, as diffusers and optimum-intel have them."""

TEXT = "encoder_hidden_states"
"""The condition that is a sequence of text's tokens."""

TEXT_MASK = "encoder_attention_mask"
"""The condition that says which of its tokens count."""

TEXT_TOKENS = 77
"""The tokens of an example where only the data say how many there are: CLIP's."""

LARGEST_SIZE = 4096
"""The largest of SDXL's `time_ids`, in pixels."""

PIPELINE_ROOT = "DiffusionPipeline"
"""The root of diffusers' pipelines: where it has none for a denoiser alone, an index names the root."""

SCALING = ("shift_factor", "latents_mean", "latents_std")
"""Keys of a VAE's config, beside scaling_factor, that say how latents are scaled for its decoder."""


@dataclass(frozen=True)
class ConditionInput:
    """A tensor that a denoiser takes beside x_t and t.

    Attributes:
        name: its name in diffusers.
        shape: the shape of one sample's; None is a length that the data decide.
        dtype: the type in our batches and in the exported graph.
        bound: whole numbers lie in [0, bound).
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: Literal["float32", "int64"]
    bound: int | None = None

    def __str__(self) -> str:
        sizes = ", ".join("tokens" if size is None else str(size) for size in self.shape)
        return f"{self.name} ({sizes}) {self.dtype}" + (f" in [0, {self.bound})" if self.bound is not None else "")


def text_inputs(width: int, masked: bool = False) -> tuple[ConditionInput, ...]:
    """A text of tokens of so many numbers, and the mask that says which of its tokens count, where there is one."""
    mask = (ConditionInput(TEXT_MASK, (None,), "float32"),) if masked else ()
    return ConditionInput(TEXT, (None, width), "float32"), *mask


def condition_inputs(entries: Iterable[Mapping[str, Any]]) -> tuple[ConditionInput, ...]:
    """The inputs that the entries of a deployed folder's manifest describe."""
    return tuple(ConditionInput(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries)


@dataclass(frozen=True)
class Pipeline:
    """A class of diffusers' pipelines that a family's denoiser belongs to.

    Attributes:
        name: diffusers' class.
        prompts: what it makes of a prompt; None where it takes none.
        scaling: the keys of SCALING that it heeds in its VAE's config.
    """

    name: str
    prompts: PromptLayout | None = None
    scaling: tuple[str, ...] = ()


def _called(denoiser: Any, x_t: Any, t: Any, condition: dict[str, Any]) -> Any:
    """The call of most classes: x_t (B, C, H, W) by place, and t (B,) by name."""
    return denoiser(x_t, timestep=t, **condition, return_dict=False)


@dataclass(frozen=True, kw_only=True)
class Family:
    """All denoisers of one class of diffusers: how they are described, called, packed into pipelines, and deployed.

    Attributes:
        name: diffusers' class of the denoiser.
        part: the folder of a pipeline that holds it.
        parameters: the arguments of its `forward`, in order, as far as they are given by place.
        conditions: config -> the tensors that it takes beside x_t and t.
        faults: config with every default -> what it asks for that we do not give, and values that do not go together.
        former: the norm_type by which configs of the older class Transformer2DModel mean this one.
        pipelines: the pipelines whose denoiser it is, as far as their other parts are known.
        alone: diffusers' pipeline of a scheduler and a denoiser that takes no condition.
        held_in: condition -> the keyword argument that is a dict with it.
        null_class: config -> the label that stands for no class, where the class has one of its own.
        call: (denoiser, x_t, t, keyword arguments) -> the prediction, at the head of a tuple or alone.
        takes_rows: whether its pipeline packs x_t into rows of patches and gives times in thousandths (latent_rows.py).
        default_size: height and width of x_t where the config has no place for them.
        resizable: whether x_t may have another size than the config says.
        scheduler: (scheduler config, height and width of x_t, its file) -> the same with what the pipeline adds.
        rotations: classes of modules that compute from the places of patches alone, and so are constants of a graph.
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
    runtime: tuple[str, str] = ("pqcad_qat.serving.runtime", "OVUNet2DModel")

    @property
    def channel_factor(self) -> int:
        """The channels that the config counts for each channel of x_t: the pixels of a patch, where rows hold them."""
        return PATCH**2 if self.takes_rows else 1

    def sample_shape(self, config: Config) -> tuple[int, int, int]:
        """(C, H, W) of x_t, from a checked diffusers config."""
        sides = sides_of(config)
        assert sides is not None
        return int(config["in_channels"]) // self.channel_factor, *sides

    def keywords(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        """A condition by name as the keyword arguments of the class."""
        spelled: dict[str, Any] = {}
        for name, value in condition.items():
            if (holder := self.held_in.get(name)) is None:
                spelled[name] = value
            else:
                spelled.setdefault(holder, {})[name] = value
        return spelled
