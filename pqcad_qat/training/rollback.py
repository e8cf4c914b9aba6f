"""Going back after a divergence: the choice of the checkpoint, and a record of every rollback.

The record lets a run that was killed and resumed come to the same decisions as one that was not.

Not here: what a divergence is (trouble_watch.py, trainer.py), and what the policy makes of it (training_stage.py).
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
from pqcad_qat.quantization.trained_part import changing_state, load_changing
from pqcad_qat.training.callback import Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, checkpoints, damage, step_of
from pqcad_qat.training.stage_end import Ending

RECORD = "rollbacks.json"
"""Name of the file, in the stage's checkpoint folder, that lists its rollbacks."""


@dataclass(frozen=True)
class Rollback:
    """One return to an earlier step.

    Attributes:
        step: training step at which training diverged.
        entered: training step that it went back to, 0 for the stage's start.
        cause: message of the divergence.
    """

    step: int
    entered: int
    cause: str


@dataclass(frozen=True)
class StageStart:
    """A copy, in memory, of a stage before its first step, for a rollback where no good checkpoint is left."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]
    ending: Ending | None
    scaler: dict[str, Any] | None

    @classmethod
    def copied(cls, state: TrainState, callbacks: Sequence[Callback]) -> StageStart:
        """A copy of the state as it is now."""
        return cls(
            changing_state(state.model, state.frozen),
            copy.deepcopy(state.optimizer.state_dict()),
            {callback.name: copy.deepcopy(callback.state_dict()) for callback in callbacks},
            state.ending,
            state.scaler.state_dict() if state.scaler else None,
        )

    def restore(self, state: TrainState, callbacks: Sequence[Callback]) -> None:
        """Put the state and the callbacks back to the stage's start."""
        load_changing(state.model, self.model, state.frozen)
        state.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        state.step, state.ending = 0, self.ending
        state.restart_ema()
        if state.scaler and self.scaler:
            state.scaler.load_state_dict(self.scaler)
        for callback in callbacks:
            callback.load_state_dict(copy.deepcopy(self.callbacks[callback.name]))


def read_rollbacks(folder: Path) -> list[Rollback]:
    """The stage's rollbacks so far, in order.

    Raises:
        CheckpointError: the record is damaged.
    """
    file = folder / RECORD
    try:
        return [Rollback(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file}: got a damaged record: {error}; allowed a JSON list of rollbacks; "
            f"delete {folder} and --resume trains this stage anew"
        ) from error


def good_checkpoint(folder: CheckpointFolder, good: int) -> Path | None:
    """The newest undamaged regular checkpoint of at most `good` steps.

    Checkpoints that Ctrl-C left between the regular ones do not count, so that an interruption never changes a
    decision.
    """
    candidates = [
        path for path in checkpoints(folder.path) if step_of(path) <= good and step_of(path) % folder.every == 0
    ]
    return next((path for path in reversed(candidates) if damage(path) is None), None)


def record_rollback(folder: CheckpointFolder, rollbacks: Sequence[Rollback]) -> None:
    """Delete the checkpoints after the one that the last rollback goes back to, then write the record.

    A process that is killed between the two resumes before the divergence, and meets it again.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        for path in checkpoints(folder.path):
            if step_of(path) > rollbacks[-1].entered:
                shutil.rmtree(path)
        write_file(folder.path / RECORD, json.dumps([asdict(rollback) for rollback in rollbacks], indent=1))
    except OSError as error:
        raise CheckpointError(
            f"{folder.path / RECORD}: got {error.strerror} on writing; allowed a folder that can be written"
        ) from error
