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
from pqcad_qat.training.callback import Batch, BatchSource, Callback, averaged_weights
from pqcad_qat.training.held_out import measured
from pqcad_qat.training.rate_search import FIRST, RATES, searched, trial_steps
from pqcad_qat.training.short_training import step_seconds, train_shortly
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
        steps: training steps of each trial.
    """

    trials: tuple[RateTrial, ...]
    seconds: float
    step_s: float | None
    steps: int


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
    stage_s: float | None,
) -> RateTrials:
    """Try learning rates from the model's weights, or read back from the file what was tried; the model stays as it is.

    The stage may take `stage_s` seconds, None for any number; where that is little, trials are short.

    Raises:
        InterruptedByUserError: Ctrl-C; all trials are then made again.
    """
    if file.exists():
        with suppress(ValidationError):  # of a version that kept less; the trials are made again
            return _TRIALS.validate_json(file.read_bytes())
    begun, step_times = monotonic(), list[float]()
    with working(console, f"{stage}: time of a training step") as tell:
        # all processes make trials of the first one's number of steps
        steps = round(exchanged(_steps_of_a_trial(training, model, loss, batches, stage_s=stage_s))[0][0])
        tell(f"{stage}: learning rate, {steps} training steps at each of a few")

        def trial(rate: float) -> float:
            loop = LoopSettings(steps, rate, shape="constant", ema=training.ema)
            copied, trial_begun = copy.deepcopy(model), monotonic()
            try:
                state = train_shortly(copied, [loss], batches, loop=loop, training=training)
            except DivergedError:
                return math.inf
            step_times.append((monotonic() - trial_begun) / steps)
            with averaged_weights(state):
                own = measured(state, held_out, [loss])
            return exchanged(own)[0][0]  # all processes go on with the first one's measurement

        trials = searched(trial)
    # all processes count the first one's time
    seconds, fastest = exchanged(monotonic() - begun, min(step_times, default=math.nan))[0]
    found = RateTrials(trials, seconds, fastest if math.isfinite(fastest) else None, steps)
    if is_first():
        write_file(file, json.dumps(asdict(found)))
    return found


def _steps_of_a_trial(
    training: TrainingPolicy, model: nn.Module, loss: Callback, batches: BatchSource, *, stage_s: float | None
) -> int:
    """Number of training steps of a trial, by the time of one."""
    if stage_s is None:
        return trial_steps(None, math.inf)
    seconds = step_seconds(copy.deepcopy(model), [loss], batches, RATES[FIRST], training=training)
    return trial_steps(stage_s, 0.001 if seconds is None else seconds)
