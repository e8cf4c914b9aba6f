"""A program for test_kills.py: the pipeline in forked processes, killed at random moments until that many kills have been.

    python killed_runs.py MODEL FOLDER SEED KILLS

A run that ends before its next kill is followed by a new one. The last run is left to end. Not here: any test.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from conftest import POLICIES, tiny_overrides
from rich.console import Console

from pqcad_qat import pipeline
from pqcad_qat.policy.loading import load_policy

ONLY = ("evaluation.variants=[fixed-bit, pq]", "evaluation.images=2", "evaluation.batch_size=2", "training.checkpoint_every=1")

LONGEST = 2.5
"""Seconds until a kill, at most: a run takes about as long."""


def main(model: Path, folder: Path, seed: int, kills: int) -> None:
    """Print how many runs there were, each in `FOLDER/NUMBER/run`."""
    torch.set_num_threads(1)
    dice, number = random.Random(seed), 0
    while kills:
        process = started(model, folder / str(number) / "run")
        time.sleep(dice.uniform(0, LONGEST))
        os.kill(process, signal.SIGKILL)
        number += ended(process)
        kills -= 1
    assert ended(started(model, folder / str(number) / "run"))
    print(number + 1)


def started(model: Path, path: Path) -> int:
    """The id of a process that begins a run, or goes on with it."""
    process = os.fork()
    if process:
        return process
    try:
        policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(model, *ONLY))
        pipeline.run(policy, path, "command", Console(file=(path.parent.parent / "printed").open("a")), resume=True)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def ended(process: int) -> bool:
    """Whether the process had ended well by itself; one that failed ends this program too."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"a run failed with code {code}")
    return code == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
