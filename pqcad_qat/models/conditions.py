"""What conditional models are conditioned on: the choices a policy gives, the choice of a trajectory, and
classifier-free guidance.

Not here: what a denoiser takes (families/), nor how prompts become embeddings (prompts.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.models.denoiser import Condition, DiffusionModel, predict
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.families.table import family_of
from pqcad_qat.models.prompts import UNCONDITIONAL, Encoding, check_prompts, encode_prompts, kept_prompts
from pqcad_qat.sampling.ddim import Array
from pqcad_qat.sampling.trajectory import guided

if TYPE_CHECKING:
    from pqcad_qat.policy.schema import ConditionsPolicy

CONDITION = "condition."
"""Before the name of a condition's tensor where it stands beside states: in the file of a calibration set, in a
batch.
"""

GUIDANCE, NULL_CLASS = "guidance_scale", "unconditional_class"
"""Keys of a scheduler config that say how a distilled model is sampled: its scale, and the label of its other pass."""

CHOICE = 1
"""Tells the dice of a trajectory's condition from those of its noise."""


@dataclass(frozen=True)
class ConditionSet:
    """What trajectories and images are conditioned on.

    Attributes:
        choices: name -> (P, ...), a row a choice; {} for an unconditional model.
        unconditional: name -> (1, ...), of the other pass of classifier-free guidance; {} where there is none.
    """

    choices: Condition = field(default_factory=dict)
    unconditional: Condition = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.choices.values()))) if self.choices else 0

    def of(self, seed: int, first: int, count: int) -> dict[str, Tensor]:
        """The conditions (count, ...) of trajectories `first` to `first + count` of a seed; each chooses for itself, as
        with its noise.
        """
        rows = [
            int(np.random.default_rng((seed, number, CHOICE)).integers(len(self)))
            for number in range(first, first + count)
            if self.choices
        ]
        return {name: value[rows] for name, value in self.choices.items()}

    @property
    def null_class(self) -> int | None:
        """The label of the unconditional pass, where that is a label."""
        values = list(self.unconditional.values())
        return int(values[0]) if len(values) == 1 and values[0].shape == (1,) else None

    @property
    def digest(self) -> str | None:
        """SHA-256 of everything in it; None where there is nothing."""
        if not self.choices:
            return None
        found = hashlib.sha256()
        for prefix, part in (("", self.choices), (UNCONDITIONAL, self.unconditional)):
            for name, value in sorted(part.items()):
                found.update(f"{prefix}{name} {tuple(value.shape)} {value.dtype}".encode())
                found.update(value.contiguous().numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Guidance:
    """How samples are conditioned and guided.

    Attributes:
        condition: name -> (B, ...), of the samples.
        unconditional: name -> (1, ...), of the other pass.
        scale: of classifier-free guidance, 1 for none.
    """

    condition: Condition = field(default_factory=dict)
    unconditional: Condition = field(default_factory=dict)
    scale: float = 1.0

    def follow(self, denoiser: nn.Module, device: torch.device) -> Callable[[Tensor, float], Tensor]:
        """(x_t, t) -> the prediction of the denoiser that sampling follows."""
        condition, other = (
            {name: value.to(device) for name, value in part.items()} for part in (self.condition, self.unconditional)
        )
        return guided_call(partial(predict, denoiser), condition, other, self.scale)


def rows_of(condition: Mapping[str, Array], count: int) -> dict[str, Array]:
    """A condition of one sample for `count` of them."""
    return {name: value[[0] * count] for name, value in condition.items()}  # type: ignore[index]


def guided_call(
    call: Callable[[Array, float, Mapping[str, Array]], Array],
    condition: Mapping[str, Array],
    unconditional: Mapping[str, Array],
    scale: float,
) -> Callable[[Array, float], Array]:
    """The prediction that sampling follows, as (x_t, t) -> prediction: of one pass at scale 1, of two guided ones
    above.

    Args:
        call: the denoiser, as (x_t, t, condition).
        condition: of the samples, (B, ...).
        unconditional: of the other pass, (1, ...).
    """

    def one(x_t: Array, t: float) -> Array:
        return call(x_t, t, condition)

    def both(x_t: Array, t: float) -> Array:
        return guided(call(x_t, t, condition), call(x_t, t, rows_of(unconditional, len(x_t))), scale)  # type: ignore[arg-type]

    return one if scale == 1.0 else both


@dataclass(frozen=True)
class Conditioned:
    """What a denoiser is conditioned on.

    Attributes:
        source: names it in messages.
        inputs: what it takes beside x_t and t; () where nothing.
        null_class: the label that stands for no class, where it has one of its own.
        folder: of its pipeline, for the text encoders there.
        sides: height and width of x_t; None where the pipeline's own are meant.
    """

    source: str
    inputs: tuple[ConditionInput, ...]
    null_class: int | None = None
    folder: Path | None = None
    sides: tuple[int, int] | None = None

    @property
    def labels(self) -> ConditionInput | None:
        """The class label, where that is all."""
        alone = len(self.inputs) == 1 and self.inputs[0].shape == () and self.inputs[0].bound is not None
        return self.inputs[0] if alone else None

    def __str__(self) -> str:
        return f"{self.source} takes {', '.join(map(str, self.inputs)) or 'no conditions'}"


def conditioned(model: DiffusionModel) -> Conditioned:
    """What a full-precision model is conditioned on."""
    null = family_of(model.denoiser).null_class(getattr(model.denoiser, "config", {}))
    return Conditioned(model.source, model.condition_inputs, null, model.folder, model.sample_shape[1:])


def chosen_conditions(asked: Conditioned, section: ConditionsPolicy, store: Path | None = None) -> ConditionSet:
    """What a policy's section gives to choose from; by default every class of a class-conditional model.

    Encoded prompts are kept in the store, where one is given, and read back from there.

    Raises:
        ModelError: the model takes something else, or what is named cannot be read.
    """
    if section.embeddings is not None:
        return read_conditions(Path(section.embeddings), asked)
    if section.prompts is not None:
        prompts, folder = Path(section.prompts), asked.folder or Path(asked.source)
        encoding = Encoding(section.tokens, section.guidance, asked.sides)
        if store is not None:
            return read_conditions(kept_prompts(prompts, folder, store, encoding), asked)
        return checked_conditions(encode_prompts(prompts, folder, encoding), asked, section.prompts)
    if asked.labels is not None or (section.classes, section.unconditional_class) != ("all", None):
        return class_conditions(asked, section.classes, section.unconditional_class)
    if asked.inputs:
        raise ModelError(f"conditions.embeddings: got nothing; {asked}")
    return ConditionSet()


def check_choices(asked: Conditioned, section: ConditionsPolicy, scale: float) -> None:
    """Raise ModelError where `chosen_conditions` or `check_guidance` will, as far as that is known before a prompt is
    encoded.
    """
    if section.prompts is None or section.embeddings is not None:
        check_guidance(scale, chosen_conditions(asked, section))
        return
    made = check_prompts(
        Path(section.prompts), asked.folder or Path(asked.source), Encoding(section.tokens, section.guidance)
    )
    if apart := made.symmetric_difference(wanted.name for wanted in asked.inputs):
        raise ModelError(
            f"conditions.prompts: got prompts, which make {', '.join(sorted(made))}; {asked}: apart: "
            f"{', '.join(sorted(apart))}"
        )


def class_conditions(
    asked: Conditioned, classes: Literal["all"] | Sequence[int], unconditional: int | None
) -> ConditionSet:
    """Labels to choose from, and the one that stands for no class: the one given, or the model's own.

    Raises:
        ModelError: the model takes no labels or more than them, or one is outside its table.
    """
    if (labels := asked.labels) is None or labels.bound is None:
        raise ModelError(f"conditions.classes: got class labels; {asked}")
    null = asked.null_class if unconditional is None else unconditional
    chosen = [label for label in range(labels.bound) if label != null] if classes == "all" else list(classes)
    for key, given in (("classes", chosen), ("unconditional_class", [] if null is None else [null])):
        if outside := [label for label in given if not 0 <= label < labels.bound]:
            raise ModelError(
                f"conditions.{key}: got {outside[0]}; allowed 0 to {labels.bound - 1}, the classes of {asked.source}"
            )
    return ConditionSet(
        {labels.name: torch.tensor(chosen)}, {} if null is None else {labels.name: torch.tensor([null])}
    )


def read_conditions(path: Path, asked: Conditioned) -> ConditionSet:
    """The conditions of a safetensors file: NAME (P, ...) for each tensor that the model takes, and unconditional.NAME
    (1, ...).

    Raises:
        ModelError: no such file, or one that does not hold what the model takes.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"conditions.embeddings: got {path}: no such file; allowed a safetensors file") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"conditions.embeddings: got {path}, which is not readable as safetensors ({error}); allowed such a file"
        ) from error
    return checked_conditions(tensors, asked, str(path))


def save_conditions(conditions: ConditionSet, path: Path) -> None:
    """Write the file that `read_conditions` reads."""
    other = {UNCONDITIONAL + name: value for name, value in conditions.unconditional.items()}
    save_tensors({**conditions.choices, **other}, path)


def checked_conditions(tensors: Mapping[str, Tensor], asked: Conditioned, where: str) -> ConditionSet:
    """The tensors of a file as a set, in the model's own dtypes.

    Raises:
        ModelError: it lacks a tensor that the model takes, has one that it does not, or one of another shape; every
            fault is named.
    """
    choices = {name: value for name, value in tensors.items() if not name.startswith(UNCONDITIONAL)}
    unconditional = {
        name.removeprefix(UNCONDITIONAL): value for name, value in tensors.items() if name.startswith(UNCONDITIONAL)
    }
    wanted = {part.name: part for part in asked.inputs}
    count = max((len(value) for value in choices.values() if value.ndim), default=0)
    faults: list[str] = []
    for prefix, part, rows in (("", choices, count), (UNCONDITIONAL, unconditional, 1)):
        if part or not prefix:
            faults += [f"{prefix}{name}: missing" for name in wanted if name not in part]
        faults += [f"{prefix}{name}: not taken by the model" for name in part if name not in wanted]
        faults += [
            fault
            for name, value in part.items()
            if name in wanted
            for fault in _faults(prefix + name, value, wanted[name], rows)
        ]
    if not faults:  # the exported graph has one shape, which both passes must fit
        faults = [
            f"{UNCONDITIONAL}{name}: got {tuple(value.shape[1:])}; allowed {tuple(choices[name].shape[1:])}, as {name}"
            for name, value in unconditional.items()
            if value.shape[1:] != choices[name].shape[1:]
        ]
    if faults or not wanted:
        raise ModelError("\n".join([f"{where}: {asked}", *(f"  - {fault}" for fault in faults)]))
    one, other = (
        {name: part[name].to(getattr(torch, wanted[name].dtype)) for name in wanted if part}
        for part in (choices, unconditional)
    )
    return ConditionSet(one, other)


def exported_inputs(inputs: Sequence[ConditionInput], conditions: ConditionSet) -> tuple[ConditionInput, ...]:
    """The inputs with the sizes that the data decide."""
    return tuple(replace(wanted, shape=tuple(conditions.choices[wanted.name].shape[1:])) for wanted in inputs)


def check_guidance(scale: float, conditions: ConditionSet) -> None:
    """Raise ModelError for guidance without a condition for its other pass."""
    if scale != 1.0 and not conditions.unconditional:
        raise ModelError(
            f"sampler.guidance_scale: got {scale:g}; allowed 1 without a condition for the other pass: "
            "conditions.unconditional_class, or "
            f"tensors {UNCONDITIONAL}NAME in the file of conditions.embeddings"
        )


def _faults(name: str, value: Tensor, wanted: ConditionInput, rows: int) -> Iterator[str]:
    sizes = (rows, *wanted.shape)
    fits = value.ndim == len(sizes) and all(size in (None, got) for size, got in zip(sizes, value.shape, strict=True))
    if not fits or 0 in value.shape:
        shown = ", ".join([str(rows or "P"), *("tokens" if size is None else str(size) for size in wanted.shape)])
        yield f"{name}: got shape {tuple(value.shape)}; allowed ({shown})"
    elif not bool(torch.isfinite(value.double()).all()):
        yield f"{name}: holds values that are not finite"
    elif wanted.dtype == "int64":
        numbers = value.double()
        if bool((numbers != numbers.round()).any()):
            yield f"{name}: got {float(numbers[numbers != numbers.round()][0]):g}; allowed whole numbers"
        elif wanted.bound is not None and not 0 <= int(numbers.min()) <= int(numbers.max()) < wanted.bound:
            yield f"{name}: got {int(numbers.min())} to {int(numbers.max())}; allowed 0 to {wanted.bound - 1}"
