"""A full-precision denoiser with what it takes beside x_t and t, and the one signature by which every denoiser is
called.

Not here: loading and saving one (model_loading.py), what is known of each class of diffusers (families/), quantized
denoisers (quantization/conversion.py), and sampling.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.models.families.family import TEXT_TOKENS, ConditionInput, Family
from pqcad_qat.models.families.table import family_of
from pqcad_qat.models.own_model import OwnModel

Condition = Mapping[str, Tensor]
"""What a denoiser takes beside x_t and t, by name, each (B, ...); {} where it takes nothing."""

DenoiserInput = tuple[Tensor, Tensor, Condition]
"""(x_t (B, C, H, W), t (B,), condition)."""

PredictArguments = DenoiserInput | tuple[Tensor, Tensor]
"""What follows the denoiser in a call of `predict`."""


@dataclass(frozen=True)
class DiffusionModel:
    """A full-precision denoiser with the scheduler it was trained for.

    Attributes:
        denoiser: called by `predict`; float32, in evaluation mode.
        scheduler_config: diffusers' scheduler config.
        source: as the user named it.
        digest: SHA-256 over the weights and both configs.
        own: what the user says of a module of their own; None for a class of diffusers, whose config says it.
        folder: in diffusers' layout, of the pipeline that it is part of; None of a module of the user's own.
        decoder: whether its pipeline has a part that makes pictures of what it makes.
    """

    denoiser: nn.Module
    scheduler_config: dict[str, Any]
    source: str
    digest: str
    own: OwnModel | None = None
    folder: Path | None = None
    decoder: bool = False

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t."""
        if self.own:
            return self.own.sample_shape
        return self._family.sample_shape(cast(Any, self.denoiser).config)

    @property
    def latent(self) -> bool:
        """Whether what it makes is no picture: its pipeline decodes it, or its channels are neither one nor three."""
        return self.decoder or is_latent(self.sample_shape)

    @property
    def condition_inputs(self) -> tuple[ConditionInput, ...]:
        """What the denoiser takes beside x_t and t, in the order in which it is exported."""
        if self.own:
            return self.own.conditions
        return self._family.conditions(cast(Any, self.denoiser).config)

    @property
    def _family(self) -> Family:
        return family_of(self.denoiser)

    @property
    def example(self) -> DenoiserInput:
        """One sample of zeros, which the denoiser accepts, on its device."""
        with next((parameter.device for parameter in self.denoiser.parameters()), torch.device("cpu")):
            condition = {
                wanted.name: torch.zeros(
                    1, *(size or TEXT_TOKENS for size in wanted.shape), dtype=getattr(torch, wanted.dtype)
                )
                for wanted in self.condition_inputs
            }
            return torch.zeros(1, *self.sample_shape), torch.zeros(1, dtype=torch.long), condition


def is_latent(sample_shape: tuple[int, int, int]) -> bool:
    """Whether an x_0 (C, H, W) is no picture: neither of one channel nor of three."""
    return sample_shape[0] not in (1, 3)


def predict(denoiser: nn.Module, x_t: Tensor, t: Tensor | float, condition: Condition | None = None) -> Tensor:
    """The denoiser's prediction (B, C, H, W) at x_t (B, C, H, W) and time step t, a number or (B,).

    Channels after those of x_t, a learned variance, are cut off. A plain module is called as `denoiser(x_t, t,
    **condition)`.
    """
    steps = t.to(x_t.device) if isinstance(t, Tensor) else torch.tensor(t, device=x_t.device)
    steps = steps if steps.shape == x_t.shape[:1] else steps.expand(x_t.shape[0])
    family = family_of(denoiser)
    prediction = _prediction(denoiser, family.call(denoiser, x_t, steps, family.keywords(condition or {})))
    more = prediction.dim() == x_t.dim() and prediction.shape[1] > x_t.shape[1]
    return prediction[:, : x_t.shape[1]] if more else prediction


def _prediction(denoiser: nn.Module, found: Any) -> Tensor:
    """What a denoiser returned: its tensor, the first of several, or the one that is called `sample`.

    Raises:
        ModelError: something else.
    """
    match found:
        case Tensor():
            return found
        case tuple() | list() if found and isinstance(found[0], Tensor):
            return found[0]
    sample = found.get("sample") if isinstance(found, Mapping) else getattr(found, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    keys = f" with {', '.join(map(repr, found))}" if isinstance(found, Mapping) else ""
    raise ModelError(
        f"{type(denoiser).__name__} returned {type(found).__name__}{keys}; "
        "allowed a tensor, a tuple or list that begins with one, or what has one as `sample`"
    )


def check_time_table(model: DiffusionModel, train_timesteps: int) -> None:
    """Raise ModelError for a denoiser that has learned fewer time steps than its scheduler counts."""
    config: Mapping[str, Any] = {} if model.own else cast(Any, model.denoiser).config
    known = config.get("num_train_timesteps")
    if config.get("time_embedding_type") == "learned" and known is not None and known < train_timesteps:
        raise ModelError(
            f"{model.source}: num_train_timesteps: got {known} in the denoiser's config, whose "
            "time_embedding_type is learned; allowed "
            f"{train_timesteps} or more, as in the scheduler's"
        )


@contextmanager
def recomputed_activations(denoiser: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, if wanted, the denoiser's blocks keep their inputs alone and compute the rest again in the backward pass
    (Chen et al. 2016).

    Raises:
        ModelError: diffusers cannot do so for this architecture, or for some of its blocks.
    """
    if not wanted:
        yield
        return
    model = cast(Any, denoiser)
    blocks = {
        name: block
        for name, block in denoiser.named_modules()
        if re.fullmatch(r"(down_blocks|up_blocks)\.\d+|mid_block", name)
    }
    without = [
        f"{name} ({type(block).__name__})"
        for name, block in blocks.items()
        if not hasattr(block, "gradient_checkpointing")
    ]
    # of a transformer the model itself holds the switch
    kept_whole = not blocks and not hasattr(denoiser, "gradient_checkpointing")
    if not getattr(model, "_supports_gradient_checkpointing", False) or kept_whole or without:
        what = f"its blocks {', '.join(without)}" if without else type(denoiser).__name__
        raise ModelError(f"training.activation_checkpointing: got true; allowed false: diffusers has none for {what}")
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()
