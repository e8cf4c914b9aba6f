"""Names of the files that a stage which finds weights leaves in its run's folder.

Not here: the folder (run_folder.py), and the reading of the weights (trained_models.py).
"""

from __future__ import annotations

from pqcad_qat.stages.run_folder import CHECKPOINTS

WEIGHTS, TRANSITIONS, ENDS = "models/{}.safetensors", "models/{}.json", "models/{}-end.json"
"""Paths in a run's folder of what a trained stage leaves beside its log: weights, transitions, and how it ended."""


def trained_paths(stage: str) -> tuple[str, ...]:
    """Paths in a run's folder that a training stage leaves."""
    files = (path.format(stage) for path in (WEIGHTS, TRANSITIONS, ENDS))
    return (*files, f"logs/{stage}.jsonl", f"{CHECKPOINTS}/{stage}")
