"""Going back after a divergence: to which checkpoint, and the record of it, by which a killed run comes to the same
decisions.

Not here: what a divergence is (divergence.py, trainer.py), nor what follows from the policy (training_stage.py).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pqcad_qat.errors import CheckpointError
from pqcad_qat.machine.files import write_file
from pqcad_qat.training.callback import Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, checkpoints, damage, step_of

RECORD = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """Training diverged at `step` and went back to `entered`, 0 being the stage's start."""

    step: int
    entered: int
    cause: str


@dataclass(frozen=True)
class StageStart:
    """A stage before its first step, in memory: where training goes back to when no good checkpoint is left."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]
    scaler: dict[str, Any] | None

    @classmethod
    def of(cls, state: TrainState, callbacks: Sequence[Callback]) -> StageStart:
        return cls(
            {name: value.detach().clone() for name, value in state.model.state_dict().items()},
            copy.deepcopy(state.optimizer.state_dict()),
            {callback.name: copy.deepcopy(callback.state_dict()) for callback in callbacks},
            state.scaler.state_dict() if state.scaler else None,
        )

    def restore(self, state: TrainState, callbacks: Sequence[Callback]) -> None:
        state.model.load_state_dict(self.model)
        state.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        state.step = 0
        state.restart_ema()
        if state.scaler and self.scaler:
            state.scaler.load_state_dict(self.scaler)
        for callback in callbacks:
            callback.load_state_dict(copy.deepcopy(self.callbacks[callback.name]))


def read_rollbacks(folder: Path) -> list[Rollback]:
    """What happened to a stage so far, in order. Raises CheckpointError where the record is damaged."""
    file = folder / RECORD
    try:
        return [Rollback(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file}: damaged: {error}; delete {folder} and --resume trains this stage anew"
        ) from error


def good_checkpoint(folder: CheckpointFolder, good: int) -> Path | None:
    """The newest undamaged checkpoint of at most `good` steps; those that Ctrl-C left do not count, so that it never
    decides anything.
    """
    found = [path for path in checkpoints(folder.path) if step_of(path) <= good and step_of(path) % folder.every == 0]
    return next((path for path in reversed(found) if damage(path) is None), None)


def record_rollback(folder: CheckpointFolder, rollbacks: Sequence[Rollback]) -> None:
    """Drop the checkpoints after the last rollback's, then write it down: a process killed between the two meets the
    divergence again.
    """
    try:
        for path in checkpoints(folder.path):
            if step_of(path) > rollbacks[-1].entered:
                shutil.rmtree(path)
        write_file(folder.path / RECORD, json.dumps([asdict(rollback) for rollback in rollbacks], indent=1))
    except OSError as error:
        raise CheckpointError(f"{folder.path / RECORD}: cannot be written: {error.strerror}") from error
