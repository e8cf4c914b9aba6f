"""The short trials by which a training stage finds its learning rate, before its first step.

What was found is kept beside the stage's checkpoints, so that a run that goes on does so at the same rate. The trials
also tell how long a training step takes, before the first one of the stage.

Not here: which rates are tried (training/rate_search.py).
"""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from torch import nn

from pqcad_qat.errors import DivergedError
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import exchanged, is_first
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.training_sections import TrainingPolicy
from pqcad_qat.stages.short_training import train_shortly
from pqcad_qat.training.callback import Batch, BatchSource, Callback, averaged_weights
from pqcad_qat.training.held_out import measured
from pqcad_qat.training.rate_search import TRIAL_STEPS, searched
from pqcad_qat.training.stage_end import RateTrial
from pqcad_qat.training.trainer import LoopSettings


@dataclass(frozen=True)
class RateTrials:
    """The trials of a stage.

    Attributes:
        trials: the trials, in their order.
        seconds: wall time that all of them took.
        step_s: wall time of one training step in seconds, of the fastest trial: the first one may compile kernels.
            None where every trial diverged.
    """

    trials: tuple[RateTrial, ...]
    seconds: float
    step_s: float | None


_TRIALS = TypeAdapter(RateTrials)


def rate_trials(
    training: TrainingPolicy,
    console: Console,
    model: nn.Module,
    loss: Callback,
    *,
    stage: str,
    batches: BatchSource,
    held_out: Batch,
    file: Path,
) -> RateTrials:
    """Try learning rates from the model's weights, or read back from the file what was tried; the model stays as it is.

    Raises:
        InterruptedByUserError: Ctrl-C; all trials are then made again.
    """
    if file.exists():
        with suppress(ValidationError):  # of a version that kept less; the trials are made again
            return _TRIALS.validate_json(file.read_bytes())
    begun, step_times = monotonic(), list[float]()
    with working(console, f"{stage}: learning rate, {TRIAL_STEPS} training steps at each of a few"):

        def trial(rate: float) -> float:
            loop = LoopSettings(TRIAL_STEPS, rate, shape="constant", ema=training.ema)
            copied, trial_begun = copy.deepcopy(model), monotonic()
            try:
                state = train_shortly(copied, [loss], batches, loop=loop, training=training)
            except DivergedError:
                return math.inf
            step_times.append((monotonic() - trial_begun) / TRIAL_STEPS)
            with averaged_weights(state):
                own = measured(state, held_out, [loss])
            return exchanged(own)[0][0]  # all processes go on with the first one's measurement

        trials = searched(trial)
    # all processes count the first one's time
    seconds, fastest = exchanged(monotonic() - begun, min(step_times, default=math.nan))[0]
    found = RateTrials(trials, seconds, fastest if math.isfinite(fastest) else None)
    if is_first():
        write_file(file, json.dumps(asdict(found)))
    return found
