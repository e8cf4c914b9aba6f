"""A full-precision denoiser with its scheduler, and `predict`, the one function by which every denoiser is called.

Not here: loading and saving (model_loading.py), facts about each class of diffusers (families/), quantized denoisers
(quantization/conversion.py), and sampling.
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
from pqcad_qat.machine.accelerators import device_of
from pqcad_qat.models.families.family import TEXT_TOKENS, ConditionInput, Family
from pqcad_qat.models.families.table import family_of
from pqcad_qat.models.own_model import OwnModel

Condition = Mapping[str, Tensor]
"""The tensors (B, ...) that a denoiser takes beside x_t and t, by name; {} where it takes none."""

DenoiserInput = tuple[Tensor, Tensor, Condition]
"""(x_t (B, C, H, W), t (B,), condition)."""

PredictArguments = DenoiserInput | tuple[Tensor, Tensor]
"""Arguments of `predict` after the denoiser."""


@dataclass(frozen=True)
class DiffusionModel:
    """A full-precision denoiser with the scheduler it was trained for.

    Attributes:
        denoiser: module in float32 and evaluation mode; `predict` calls it.
        scheduler_config: diffusers' config of the scheduler.
        source: the value of `model.source` that names the model.
        digest: SHA-256 over the weights and both configs.
        own: the user's description of a module of their own; None for a class of diffusers, which its config describes.
        folder: folder of its pipeline, in diffusers' layout; None for a module of the user's own.
        decoder: whether its pipeline has a part that decodes latents into pictures.
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
        """Shape (C, H, W) of x_t."""
        if self.own:
            return self.own.sample_shape
        return self._family.sample_shape(cast(Any, self.denoiser).config)

    @property
    def latent(self) -> bool:
        """Whether its samples are latents: its pipeline decodes them, or their channels are neither one nor three."""
        return self.decoder or is_latent(self.sample_shape)

    @property
    def condition_inputs(self) -> tuple[ConditionInput, ...]:
        """The inputs that the denoiser takes beside x_t and t, in the order of the exported graph."""
        if self.own:
            return self.own.conditions
        return self._family.conditions(cast(Any, self.denoiser).config)

    @property
    def _family(self) -> Family:
        return family_of(self.denoiser)

    @property
    def example(self) -> DenoiserInput:
        """Valid input of one sample, all zeros, on the denoiser's device."""
        with next((parameter.device for parameter in self.denoiser.parameters()), torch.device("cpu")):
            condition = {
                wanted.name: torch.zeros(
                    1, *(size or TEXT_TOKENS for size in wanted.shape), dtype=getattr(torch, wanted.dtype)
                )
                for wanted in self.condition_inputs
            }
            return torch.zeros(1, *self.sample_shape), torch.zeros(1, dtype=torch.long), condition


def is_latent(sample_shape: tuple[int, int, int]) -> bool:
    """Return whether samples of this shape (C, H, W) are no pictures, which have one channel or three."""
    return sample_shape[0] not in (1, 3)


def predict(denoiser: nn.Module, x_t: Tensor, t: Tensor | float, condition: Condition | None = None) -> Tensor:
    """Return the denoiser's prediction (B, C, H, W) at x_t (B, C, H, W) and time step t, a number or (B,).

    A learned variance, in the channels after those of x_t, is cut off. A module of the user's own is called as
    `denoiser(x_t, t, **condition)`. The denoiser may be on another device: the prediction comes back to that of x_t.
    """
    if (device := device_of(denoiser) or x_t.device) != x_t.device:
        moved = {name: value.to(device) for name, value in (condition or {}).items()}
        return predict(denoiser, x_t.to(device), t, moved).to(x_t.device)
    steps = t.to(device) if isinstance(t, Tensor) else torch.tensor(t, device=device)
    steps = steps if steps.shape == x_t.shape[:1] else steps.expand(x_t.shape[0])
    family = family_of(denoiser)
    prediction = _prediction(denoiser, family.call(denoiser, x_t, steps, family.keywords(condition or {})))
    more = prediction.dim() == x_t.dim() and prediction.shape[1] > x_t.shape[1]
    return prediction[:, : x_t.shape[1]] if more else prediction


def _prediction(denoiser: nn.Module, output: Any) -> Tensor:
    """Return the tensor in a denoiser's output: the output itself, its first entry, or its `sample`.

    Raises:
        ModelError: the output has another form.
    """
    match output:
        case Tensor():
            return output
        case tuple() | list() if output and isinstance(output[0], Tensor):
            return output[0]
    sample = output.get("sample") if isinstance(output, Mapping) else getattr(output, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    keys = f" with {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
    raise ModelError(
        f"{type(denoiser).__name__}: got {type(output).__name__}{keys} from a call; allowed a tensor, a tuple or list "
        "that begins with one, or an object that holds one as `sample`"
    )


def check_time_table(model: DiffusionModel, train_timesteps: int) -> None:
    """Raise ModelError for a denoiser whose learned time embedding covers fewer time steps than its scheduler has."""
    config: Mapping[str, Any] = {} if model.own else cast(Any, model.denoiser).config
    known = config.get("num_train_timesteps")
    if config.get("time_embedding_type") == "learned" and known is not None and known < train_timesteps:
        raise ModelError(
            f"{model.source}: num_train_timesteps: got {known} in the denoiser's config, whose time_embedding_type is "
            f"learned; allowed {train_timesteps} or more, as in the scheduler's"
        )


@contextmanager
def recomputed_activations(denoiser: nn.Module, wanted: bool) -> Iterator[None]:
    """Save memory in training within this context, if wanted, by activation checkpointing (Chen et al. 2016).

    Each block of the denoiser keeps only its input, and computes its activations again in the backward pass.

    Raises:
        ModelError: diffusers does not offer this for the architecture, or for some of its blocks.
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
    # UNets have the switch in each block, transformers in the model itself.
    no_switch = not blocks and not hasattr(denoiser, "gradient_checkpointing")
    if not getattr(model, "_supports_gradient_checkpointing", False) or no_switch or without:
        modules = f"its blocks {', '.join(without)}" if without else type(denoiser).__name__
        raise ModelError(
            f"training.activation_checkpointing: got true; allowed false: diffusers has none for {modules}"
        )
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()
