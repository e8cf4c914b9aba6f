"""The rule by which a stage of `steps: auto` ends: pure functions of the training step, the held-out loss and the time.

The method. The rate is warmed up and then falls slowly. Every few steps the loss of held-out states is measured. The
mean of the last quarter of the measurements is compared with the mean of the quarter before. Once it is better by less
than a threshold, the stage has reached its plateau. A cap in steps or in minutes may come first. Either way the stage
then ends with a decay of the rate to 0, which takes half as many steps as were made so far. A cap is met by beginning
the decay in time.

The quarters grow with the stage. An average of fixed length would take a slow model, whose loss falls by little from
one measurement to the next and for long, for one that has stopped.

Not here: measuring (held_out.py), and the learning rate itself (trainer.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pqcad_qat.training.stage_end import Ending

EVERY = 10
"""Training steps between two measurements of the held-out loss, and so between two decisions."""

PLATEAU = 0.02
"""Relative improvement of the held-out loss from one quarter of its measurements to the next, at the end of a stage.

Where the loss falls with a power of the steps, that is the power at which twice the steps would bring 4 %.
"""

OBSERVATIONS = 12
"""Smallest number of measurements that are compared, three for each of the last two quarters."""

SHORTEST_DECAY = 20
"""Smallest number of training steps over which the rate decays."""


@dataclass(frozen=True)
class Budget:
    """Caps of a stage.

    Attributes:
        steps: largest number of training steps.
        seconds: wall time that the stage may take, None for any.
    """

    steps: int
    seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """What the rule remembers of a stage.

    Attributes:
        losses: held-out losses since every layer is at its target width.
        settled_at: training step at which every layer was first seen at its target width; None before.
    """

    losses: tuple[float, ...] = ()
    settled_at: int | None = None

    def updated(self, step: int, loss: float | None, settled: bool) -> Progress:
        """The progress after one more measurement, or after none; it begins anew while widths change."""
        if not settled:
            return Progress()
        losses = self.losses if loss is None else (*self.losses, loss)
        return Progress(losses, step if self.settled_at is None else self.settled_at)

    @property
    def on_plateau(self) -> bool:
        """Whether the held-out loss has stopped improving."""
        quarter = len(self.losses) // 4
        if len(self.losses) < OBSERVATIONS:
            return False
        last, before = sum(self.losses[-quarter:]), sum(self.losses[-2 * quarter : -quarter])
        return not last < (1 - PLATEAU) * before  # also where a loss is not finite


def decay_steps(step: int) -> int:
    """Number of steps over which the rate decays if the decay begins at `step`."""
    return max(SHORTEST_DECAY, step // 2)


def ending(step: int, progress: Progress, budget: Budget, seconds: float, *, before: float = 0.0) -> Ending | None:
    """The end of a stage if its decay begins at `step`; None if the stage goes on until the next decision.

    A stage whose layers walk down to their target widths ends by plateau only when at least half of its steps are made
    at these widths, and never for want of minutes before they are reached.

    Args:
        step: number of finished training steps.
        progress: what was measured so far.
        budget: caps of the stage.
        seconds: wall time that the stage has taken so far.
        before: how much of it passed before the first step, and says nothing of how long a step takes.
    """
    last, following = step + decay_steps(step), step + EVERY
    if following + decay_steps(following) > budget.steps:
        return Ending(step, budget.steps, "max_steps")
    if progress.settled_at is None:
        return None
    if progress.on_plateau and last >= 2 * progress.settled_at:
        return Ending(step, last, "plateau")
    if budget.seconds is not None:
        per_step = (seconds - before) / max(1, step)
        if seconds + (EVERY + decay_steps(following)) * per_step > budget.seconds:
            return Ending(step, last, "minutes")
    return None
