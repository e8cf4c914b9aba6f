"""Conditions of conditional models: the choices that a policy offers, and the choice for each trajectory.

Not here: guided predictions (guidance.py), which conditions a denoiser takes (families/), or how prompts become
embeddings (prompts.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.models.denoiser import Condition, DiffusionModel
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.families.table import family_of
from pqcad_qat.models.prompts import UNCONDITIONAL, Encoding, check_prompts, encode_prompts, stored_embeddings

if TYPE_CHECKING:
    from pqcad_qat.policy.schema import ConditionsPolicy

CONDITION = "condition."
"""Prefix of the names of condition tensors where they are stored beside states: in a calibration file and in a batch.
"""

GUIDANCE, NULL_CLASS = "guidance_scale", "unconditional_class"
"""Keys of a distilled model's scheduler config: its guidance scale, and the class label of its unconditional pass."""

CHOICE = 1
"""Last part of the random seed of a trajectory's condition, which separates it from the seed of the trajectory's noise.
"""


@dataclass(frozen=True)
class ConditionSet:
    """The conditions that trajectories and images choose from.

    Attributes:
        choices: mapping from name to a tensor (P, ...) with one row per choice; {} for an unconditional model.
        unconditional: mapping from name to a tensor (1, ...) for the unconditional pass of classifier-free guidance; {}
            where there is none.
    """

    choices: Condition = field(default_factory=dict)
    unconditional: Condition = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.choices.values()))) if self.choices else 0

    def drawn(self, seed: int, first: int, count: int) -> dict[str, Tensor]:
        """Return the conditions (count, ...) of trajectories `first` to `first + count` of a seed.

        The choice of a trajectory depends only on the seed and the trajectory's index, as its noise does.
        """
        rows = self.choice(seed, first, count)
        return {name: value[rows] for name, value in self.choices.items()}

    def choice(self, seed: int, first: int, count: int) -> list[int]:
        """Return which conditions these trajectories have, as rows of `choices`; [] for an unconditional model."""
        return [
            int(np.random.default_rng((seed, trajectory, CHOICE)).integers(len(self)))
            for trajectory in range(first, first + count)
            if self.choices
        ]

    @property
    def null_class(self) -> int | None:
        """The class label of the unconditional pass; None where that pass has no single label."""
        values = list(self.unconditional.values())
        return int(values[0]) if len(values) == 1 and values[0].shape == (1,) else None

    @property
    def digest(self) -> str | None:
        """SHA-256 over the names, shapes, dtypes and values of all tensors; None for an unconditional model."""
        if not self.choices:
            return None
        hashed = hashlib.sha256()
        for prefix, tensors in (("", self.choices), (UNCONDITIONAL, self.unconditional)):
            for name, value in sorted(tensors.items()):
                hashed.update(f"{prefix}{name} {tuple(value.shape)} {value.dtype}".encode())
                hashed.update(value.contiguous().numpy().tobytes())
        return hashed.hexdigest()


@dataclass(frozen=True)
class Conditioned:
    """The conditions that a denoiser takes.

    Attributes:
        source: name of the model in messages.
        inputs: the tensors that the denoiser takes beside x_t and t; () where it takes none.
        null_class: the label that stands for no class, where the denoiser has such a label.
        folder: folder of the denoiser's pipeline, from which its text encoders are read.
        sides: height and width of x_t; None for those of the pipeline.
    """

    source: str
    inputs: tuple[ConditionInput, ...]
    null_class: int | None = None
    folder: Path | None = None
    sides: tuple[int, int] | None = None

    @property
    def labels(self) -> ConditionInput | None:
        """The class-label input, where that is the denoiser's only condition; None otherwise."""
        alone = len(self.inputs) == 1 and self.inputs[0].shape == () and self.inputs[0].bound is not None
        return self.inputs[0] if alone else None

    def __str__(self) -> str:
        return f"{self.source} takes {', '.join(map(str, self.inputs)) or 'no conditions'}"


def conditioned(model: DiffusionModel) -> Conditioned:
    """Describe the conditions that a full-precision model takes."""
    null = family_of(model.denoiser).null_class(getattr(model.denoiser, "config", {}))
    return Conditioned(model.source, model.condition_inputs, null, model.folder, model.sample_shape[1:])


def chosen_conditions(model: Conditioned, section: ConditionsPolicy, store: Path | None = None) -> ConditionSet:
    """Return the choices that a policy's section offers; by default every class of a class-conditional model.

    Where a store is given, encoded prompts are kept there and read back on later calls.

    Raises:
        ModelError: the model takes other conditions, or a named file cannot be read.
    """
    if section.embeddings is not None:
        return read_conditions(Path(section.embeddings), model)
    if section.prompts is not None:
        prompts, folder = Path(section.prompts), model.folder or Path(model.source)
        encoding = Encoding(section.tokens, section.guidance, model.sides)
        if store is not None:
            return read_conditions(stored_embeddings(prompts, folder, store, encoding), model)
        return checked_conditions(encode_prompts(prompts, folder, encoding), model, section.prompts)
    if model.labels is not None or (section.classes, section.unconditional_class) != ("all", None):
        return class_conditions(model, section.classes, section.unconditional_class)
    if model.inputs:
        raise ModelError(
            f"conditions.embeddings: got nothing; allowed a safetensors file, or conditions.prompts: {model}"
        )
    return ConditionSet()


def check_choices(model: Conditioned, section: ConditionsPolicy, scale: float) -> None:
    """Raise the errors of `chosen_conditions` and `check_guidance` that are known before prompts are encoded."""
    if section.prompts is None or section.embeddings is not None:
        check_guidance(scale, chosen_conditions(model, section))
        return
    encoded = check_prompts(
        Path(section.prompts), model.folder or Path(model.source), Encoding(section.tokens, section.guidance)
    )
    if differing := encoded.symmetric_difference(wanted.name for wanted in model.inputs):
        raise ModelError(
            f"conditions.prompts: got prompts, which are encoded as {', '.join(sorted(encoded))}; allowed what the "
            f"model takes: {model}; the two differ in {', '.join(sorted(differing))}"
        )


def class_conditions(
    model: Conditioned, classes: Literal["all"] | Sequence[int], unconditional: int | None
) -> ConditionSet:
    """Return class labels to choose from, and the label that stands for no class: `unconditional`, or else the
    model's own.

    Raises:
        ModelError: the model takes no labels or also takes other conditions, or a label is outside its table.
    """
    if (labels := model.labels) is None or labels.bound is None:
        raise ModelError(f"conditions.classes: got class labels; allowed none: {model}")
    null = model.null_class if unconditional is None else unconditional
    chosen = [label for label in range(labels.bound) if label != null] if classes == "all" else list(classes)
    for key, checked in (("classes", chosen), ("unconditional_class", [] if null is None else [null])):
        if outside := [label for label in checked if not 0 <= label < labels.bound]:
            raise ModelError(
                f"conditions.{key}: got {outside[0]}; allowed 0 to {labels.bound - 1}, the classes of {model.source}"
            )
    return ConditionSet(
        {labels.name: torch.tensor(chosen)}, {} if null is None else {labels.name: torch.tensor([null])}
    )


def read_conditions(path: Path, model: Conditioned) -> ConditionSet:
    """Read conditions from a safetensors file.

    The file holds NAME (P, ...) for each tensor that the model takes, and unconditional.NAME (1, ...) for the
    unconditional pass.

    Raises:
        ModelError: the file is missing, or does not hold the tensors that the model takes.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"conditions.embeddings: got {path}, which is no file; allowed a safetensors file") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"conditions.embeddings: got {path}, which is not readable as safetensors ({error}); allowed such a file"
        ) from error
    return checked_conditions(tensors, model, str(path))


def save_conditions(conditions: ConditionSet, path: Path) -> None:
    """Write a safetensors file that `read_conditions` can read."""
    unconditional = {UNCONDITIONAL + name: value for name, value in conditions.unconditional.items()}
    save_tensors({**conditions.choices, **unconditional}, path)


def checked_conditions(tensors: Mapping[str, Tensor], model: Conditioned, where: str) -> ConditionSet:
    """Check the tensors of a file, and return them as a set in the dtypes that the model takes.

    Raises:
        ModelError: a tensor is missing, is not taken by the model, or has the wrong shape or values; the message names
            every fault.
    """
    choices = {name: value for name, value in tensors.items() if not name.startswith(UNCONDITIONAL)}
    unconditional = {
        name.removeprefix(UNCONDITIONAL): value for name, value in tensors.items() if name.startswith(UNCONDITIONAL)
    }
    wanted = {condition.name: condition for condition in model.inputs}
    count = max((len(value) for value in choices.values() if value.ndim), default=0)
    faults = list(_group_faults("", choices, wanted, count))
    if unconditional:  # these may be absent as a whole
        faults += _group_faults(UNCONDITIONAL, unconditional, wanted, 1)
    # The exported graph has one fixed input shape, so the conditions of both passes must have it.
    if not faults:
        faults = [
            f"{UNCONDITIONAL}{name}: got {tuple(value.shape[1:])}; allowed {tuple(choices[name].shape[1:])}, as {name}"
            for name, value in unconditional.items()
            if value.shape[1:] != choices[name].shape[1:]
        ]
    if faults or not wanted:
        rule = f"{where}: got tensors that do not fit; allowed what the model takes: {model}"
        raise ModelError("\n".join([rule, *(f"  - {fault}" for fault in faults)]))
    choices, unconditional = (
        {name: group[name].to(getattr(torch, wanted[name].dtype)) for name in wanted if group}
        for group in (choices, unconditional)
    )
    return ConditionSet(choices, unconditional)


def exported_inputs(inputs: Sequence[ConditionInput], conditions: ConditionSet) -> tuple[ConditionInput, ...]:
    """Return the inputs with their open sizes filled in from the data, such as the number of text tokens."""
    return tuple(replace(wanted, shape=tuple(conditions.choices[wanted.name].shape[1:])) for wanted in inputs)


def check_guidance(scale: float, conditions: ConditionSet) -> None:
    """Raise ModelError where guidance is on without a condition for the unconditional pass."""
    if scale != 1.0 and not conditions.unconditional:
        raise ModelError(
            f"sampler.guidance_scale: got {scale:g}; allowed 1, or a condition for the unconditional pass: "
            f"conditions.unconditional_class, or tensors {UNCONDITIONAL}NAME in the file of conditions.embeddings"
        )


def _group_faults(
    prefix: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, ConditionInput], rows: int
) -> Iterator[str]:
    """Yield the faults of the tensors whose names have this prefix in the file; each should have `rows` rows."""
    for name in wanted:
        if name not in tensors:
            yield f"{prefix}{name}: got nothing; allowed a tensor"
    for name in tensors:
        if name not in wanted:
            yield f"{prefix}{name}: got a tensor; allowed none: the model does not take it"
    for name, value in tensors.items():
        if name in wanted:
            yield from _tensor_faults(prefix + name, value, wanted[name], rows)


def _tensor_faults(name: str, value: Tensor, wanted: ConditionInput, rows: int) -> Iterator[str]:
    """Yield the faults of one tensor: its shape, values that are not finite, and labels that are not whole or out of
    bounds.
    """
    sizes = (rows, *wanted.shape)
    fits = value.ndim == len(sizes) and all(size in (None, got) for size, got in zip(sizes, value.shape, strict=True))
    if not fits or 0 in value.shape:
        sizes_text = ", ".join([str(rows or "P"), *("tokens" if size is None else str(size) for size in wanted.shape)])
        yield f"{name}: got shape {tuple(value.shape)}; allowed ({sizes_text})"
    elif not bool(torch.isfinite(value.double()).all()):
        yield f"{name}: got values that are not finite; allowed finite numbers"
    elif wanted.dtype == "int64":
        numbers = value.double()
        if bool((numbers != numbers.round()).any()):
            yield f"{name}: got {float(numbers[numbers != numbers.round()][0]):g}; allowed whole numbers"
        elif wanted.bound is not None and not 0 <= int(numbers.min()) <= int(numbers.max()) < wanted.bound:
            yield f"{name}: got {int(numbers.min())} to {int(numbers.max())}; allowed 0 to {wanted.bound - 1}"
