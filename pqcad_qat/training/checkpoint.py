"""Checkpoints: everything that resuming needs, as safetensors and JSON.

A checkpoint is written completely or not at all: its files go to a folder with a temporary name, which is then
renamed. Every file's SHA-256 is stored with it, so that damage is found before anything is loaded. Nothing is pickled,
so loading runs no code.

Not here: when a checkpoint is written (trainer.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pqcad_qat.errors import CheckpointError
from pqcad_qat.machine.files import file_digest, room_for
from pqcad_qat.training.callback import Callback, TrainState
from pqcad_qat.training.stage_end import Ending

FORMAT = 3
"""Version of the checkpoint format; others are refused."""
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
"""Files of a checkpoint, each with a digest in digests.json."""


@dataclass(frozen=True)
class CheckpointFolder:
    """The folder that holds the checkpoints of one training stage, and which of them are kept.

    Checkpoints between the regular ones come from Ctrl-C or from the last step. They are deleted first, so that they
    do not influence which regular ones are kept.

    Attributes:
        path: the folder.
        every: training steps between two regular checkpoints.
        keep: number of newest regular checkpoints that are kept.
    """

    path: Path
    every: int = 100
    keep: int = 2


def write_checkpoint(folder: CheckpointFolder, state: TrainState, callbacks: Sequence[Callback]) -> Path:
    """Write the checkpoint `step_000123/`, then delete the oldest ones.

    Raises:
        DiskError: the disk is full. Older checkpoints are unchanged, and no draft is left.
        CheckpointError: the folder cannot be written.
    """
    final = folder.path / f"step_{state.step:06d}"
    draft = folder.path / f".{final.name}.{os.getpid()}"
    tensors, groups = _flatten_optimizer(state.optimizer)
    files = {"model": _own(state.model.state_dict()), "ema": _own(state.ema or {}), "optimizer": _own(tensors)}
    try:
        with room_for(final, sum(value.nbytes for part in files.values() for value in part.values())):
            draft.mkdir(parents=True)
            _write_files(draft, files, _facts(state, groups, callbacks))
            if final.exists():
                shutil.rmtree(final)
            draft.rename(final)
    except OSError as error:
        raise CheckpointError(
            f"{final}: got {error.strerror} on writing this checkpoint; allowed a folder that can be written; "
            "older checkpoints are intact, and --resume goes on from them"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    # Of the regular checkpoints the newest are kept. Of the others only the one just written is.
    present = checkpoints(folder.path)
    regular = [path for path in present if step_of(path) % folder.every == 0]
    for old in present:
        if old not in (final, *regular[-folder.keep :]):
            shutil.rmtree(old)
    return final


def _facts(state: TrainState, groups: list[dict[str, Any]], callbacks: Sequence[Callback]) -> dict[str, Any]:
    """The content of state.json: everything but the tensors."""
    return {
        "step": state.step,
        "has_ema": state.ema is not None,
        "ema_since": state.ema_since,
        "setbacks": state.setbacks,
        "held_until": state.held_until,
        "ending": None if state.ending is None else asdict(state.ending),
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "optimizer_groups": groups,
        "callbacks": {callback.name: callback.state_dict() for callback in callbacks},
    }


def _write_files(draft: Path, files: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write all files of a checkpoint with their digests, and wait until they are on the disk."""
    for name, tensors in files.items():
        save_file(dict(tensors), draft / f"{name}.safetensors")
    (draft / "state.json").write_text(json.dumps(facts), encoding="utf-8")
    digests = {name: file_digest(draft / name) for name in FILES}
    (draft / "digests.json").write_text(json.dumps({"format": FORMAT, "sha256": digests}, indent=1), encoding="utf-8")
    for path in draft.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a message for each damaged one that was passed over."""
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        fault = damage(path)
        if fault is None:
            return path, complaints
        complaints.append(f"{path}: got {fault}; using the one before it")
    return None, complaints


def damage(path: Path) -> str | None:
    """What is there instead of an undamaged checkpoint, as a message names it, or None if nothing is wrong.

    Every file must exist and have its stored digest.
    """
    try:
        header = json.loads((path / "digests.json").read_text(encoding="utf-8"))
        digests = header["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return "no digests.json that can be read"
    if header.get("format") != FORMAT:
        return f"format {header.get('format')!r} instead of {FORMAT}"
    for name in FILES:
        if not (path / name).is_file():
            return f"no {name}"
        if file_digest(path / name) != digests.get(name):
            return f"a damaged {name}, whose SHA-256 is not the one it was written with"
    return None


def load_checkpoint(path: Path, state: TrainState, callbacks: Sequence[Callback]) -> None:
    """Load a checkpoint into a state that was built as for the first step.

    Raises:
        CheckpointError: the checkpoint is damaged, or it belongs to another model or to other callbacks.
    """
    fault = damage(path)
    if fault is not None:
        raise CheckpointError(f"{path}: got {fault}; allowed a checkpoint as it was written")
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    try:
        state.model.load_state_dict(load_file(path / "model.safetensors"), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: got weights of another model: {error}; allowed those of this run's model"
        ) from error
    _load_optimizer(state.optimizer, load_file(path / "optimizer.safetensors"), facts["optimizer_groups"])
    saved = load_file(path / "ema.safetensors")  # to where the Parameters are, which may be an accelerator
    ema = {name: value.to(state.parameters[name].device, copy=True) for name, value in saved.items()}
    state.ema = ema if facts["has_ema"] else None
    for name in ("step", "ema_since", "setbacks", "held_until"):
        setattr(state, name, facts[name])
    state.ending = None if facts.get("ending") is None else Ending(**facts["ending"])
    if state.scaler and (scale := facts.get("scaler")):
        state.scaler.load_state_dict(scale)
    names = {callback.name for callback in callbacks}
    if names != set(facts["callbacks"]):
        raise CheckpointError(
            f"{path}: callbacks: got {sorted(facts['callbacks'])}; allowed those of this run, {sorted(names)}"
        )
    for callback in callbacks:
        callback.load_state_dict(facts["callbacks"][callback.name])


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, damaged ones too, the oldest first."""
    return sorted((path for path in folder.glob("step_[0-9]*") if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Number of finished training steps of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory, since safetensors refuses tensors that do."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimizer's state as tensors named `INDEX.KEY`, and the JSON values of its groups."""
    saved = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": torch.as_tensor(value)
        for index, entry in saved["state"].items()
        for key, value in entry.items()
    }
    return tensors, [{key: value for key, value in group.items() if _is_json(value)} for group in saved["param_groups"]]


def _is_json(value: object) -> bool:
    """Whether a setting of the optimizer can be stored as JSON."""
    return isinstance(value, bool | int | float | str | list | tuple | None)


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """The inverse of `_flatten_optimizer`."""
    entries: dict[int, dict[str, Tensor]] = {}
    for flat, value in tensors.items():
        index, key = flat.split(".", 1)
        entries.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
