"""The files that a stage which finds weights leaves in its run's folder: their names, and how runs share them.

Not here: the folder (run_folder.py), and the reading of the weights (trained_models.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pqcad_qat.machine.content_store import shared_folder
from pqcad_qat.machine.processes import agreed
from pqcad_qat.stages.prepared import SHARED
from pqcad_qat.stages.run_folder import CHECKPOINTS, RunFolder

WEIGHTS, TRANSITIONS, ENDS = "models/{}.safetensors", "models/{}.json", "models/{}-end.json"
"""Paths in a run's folder of what a trained stage leaves beside its log: weights, transitions, and how it ended."""


def trained_paths(stage: str) -> tuple[str, ...]:
    """Paths in a run's folder that a training stage leaves."""
    files = (path.format(stage) for path in (WEIGHTS, TRANSITIONS, ENDS))
    return (*files, f"logs/{stage}.jsonl", f"{CHECKPOINTS}/{stage}")


def make_in(run: RunFolder, stage: str, make: Callable[[Path], None], *, shared: bool) -> None:
    """Let `make` write a stage's files into the run's folder; all processes of the run call this.

    If they are shared, a run beside this one with an equal recipe has made them for both, and they are copied.
    """
    if shared:
        made = shared_folder(run.path.parent / SHARED, run.decides(stage), make, together=True)
        with agreed() as first:
            if first:
                shutil.copytree(made, run.path, dirs_exist_ok=True)
    else:
        make(run.path)
