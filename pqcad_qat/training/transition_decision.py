"""The decision of progressive quantization: how far each layer moves towards its next width in a training step.

Everything here is a pure function of the training step, the settings and the moving averages.

The method. Every layer has a ladder of widths, and its rungs are the widths still below its present one. A transition
moves a layer down one rung: the layer computes the blend (1 - lambda) Q_now(W) + lambda Q_next(W), and lambda goes from
0 to 1. A step of lambda changes the layer's weights by that step times the layer's perturbation,
||Q_next(W) - Q_now(W)|| / ||Q_now(W)||. So the schedule sets a pace, the relative change of weights in one training
step, and each layer's lambda goes as fast as this pace allows. A layer that the next width changes little is there in
a few steps; one that it changes much takes as many more.

The pace has momentum: pace <- beta pace + (1 - beta) bound. The bound is the policy's, or 0 while the loss rises faster
than the policy tolerates. The pace thus begins slowly, brakes slowly and goes on by itself once the model recovers.

By a deadline every layer is at its target width: no layer is slower than it would have to be from now on, evenly.

PQCAD-DM (arXiv 2506.16776) names a momentum-based mechanism that keeps low precision from perturbing the weights too
much. Its equations are not public, so this file is our reading of it. Blends with a slowly moving share are also those
of BinaryDM (arXiv 2404.05662) and QVGen (arXiv 2505.11497).

Not here: the callback that applies the decision (bit_schedule.py), and the record of a transition (transition.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BitScheduleSettings:
    """Settings of the decision.

    Attributes:
        momentum: beta, the decay per training step of the pace and of the averages of the loss.
        perturbation: largest relative change of a layer's weights in one training step.
        loss_rise: relative rise of the averaged loss per training step, over which the pace falls.
        deadline: training step at which every layer computes at its target width.
        blends: whether a transition is a blend; if False the layer jumps to the next width when the blend would end.
        fixed: whether all layers move evenly until the deadline, whatever the moving averages say.
    """

    momentum: float
    perturbation: float
    loss_rise: float
    deadline: int
    blends: bool = True
    fixed: bool = False


@dataclass(frozen=True)
class Momentum:
    """An exponential moving average with Adam's bias correction (Kingma and Ba 2015, algorithm 1).

    Attributes:
        beta: decay of the average.
        average: the average before the correction.
        count: number of values averaged so far.
    """

    beta: float
    average: float = 0.0
    count: int = 0

    def updated(self, value: float) -> Momentum:
        """The average with one more value."""
        return replace(self, average=self.beta * self.average + (1 - self.beta) * value, count=self.count + 1)

    @property
    def value(self) -> float | None:
        """The corrected average, or None before the first value."""
        return self.average / (1 - self.beta**self.count) if self.count else None


@dataclass(frozen=True)
class LossMomentum:
    """The loss momentum: the averaged relative improvement (l_{n-1} - l_n) / l_{n-1} of the smoothed training loss l.

    Attributes:
        smoothed: average of the loss.
        improvement: average of the relative improvement of `smoothed`.
    """

    smoothed: Momentum
    improvement: Momentum

    @classmethod
    def fresh(cls, beta: float) -> LossMomentum:
        """A momentum before its first loss."""
        return cls(Momentum(beta), Momentum(beta))

    def updated(self, loss: float) -> LossMomentum:
        """The momentum after one more loss; its first loss gives no improvement yet."""
        before, smoothed = self.smoothed.value, self.smoothed.updated(loss)
        if before is None or before == 0:
            return replace(self, smoothed=smoothed)
        assert smoothed.value is not None
        return LossMomentum(smoothed, self.improvement.updated((before - smoothed.value) / before))


def next_pace(pace: float, loss_momentum: float | None, settings: BitScheduleSettings) -> float:
    """The pace after one more training step: the relative change of weights that it allows."""
    rising = loss_momentum is not None and -loss_momentum > settings.loss_rise
    return settings.momentum * pace + (1 - settings.momentum) * (0.0 if rising else settings.perturbation)


def paced_distance(pace: float, perturbation: float, settings: BitScheduleSettings) -> float:
    """How far the pace lets a layer move in one training step, in rungs, if its next rung perturbs it so much."""
    if settings.fixed:
        return 0.0
    return pace / perturbation if perturbation > pace else 1.0


def even_distance(rungs_left: float, step: int, settings: BitScheduleSettings) -> float:
    """How far a layer has to move in this training step, in rungs, to be evenly at its target by the deadline."""
    return rungs_left / max(1, settings.deadline - step)
