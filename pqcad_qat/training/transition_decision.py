"""The decision of progressive quantization: when layers move to a narrower width, which layers, and how far.

Everything here is a pure function of the training step, the settings and the moving averages.

The method. Every layer has a ladder of widths, and its rungs are the widths still below its present one. A transition
moves a layer down one or more rungs. Two moving averages decide:

- The loss momentum is the averaged relative improvement of the training loss. While it is high, the model still
  recovers, and nothing moves. Once it is under a plateau, a transition is due.
- A layer's perturbation momentum is the averaged relative change that the next width would make to its weights. The
  least perturbed layers move first, and layers over a bound wait.

By a deadline every layer is at its target width, whatever the averages say.

A transition is either a jump or a blend. In a blend the layer computes (1 - lambda) Q_now(W) + lambda Q_next(W), and
lambda grows from 0 at every training step: lambda <- beta lambda + (1 - beta).

PQCAD-DM (arXiv 2506.16776) names a momentum-based mechanism that keeps low precision from perturbing the weights too
much. Its equations are not public, so this file is our reading of it.

Not here: the callback that applies the decision (bit_schedule.py), and the record of a transition (transition.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.training.transition import Cause, Transition

BLEND_ENDS_AT = 0.95
"""Share of the next width, lambda, at which a blend ends and the layer computes at the next width alone."""


@dataclass(frozen=True)
class BitScheduleSettings:
    """Settings of the decision.

    Attributes:
        momentum: beta, the decay of every exponential moving average and of the blend.
        plateau: relative improvement of the loss per step, below which a transition is due.
        perturbation: relative change of a layer's weights, above which the layer waits.
        layers_per_transition: largest share of the layers that may begin a transition together.
        deadline: training step at which every layer computes at its target width.
        rungs: widths that a layer with the longest ladder moves down to, the widest first.
        blends: whether a transition is a blend; if False it is a jump.
        fixed: whether all layers move at evenly spread steps, whatever the moving averages say.
    """

    momentum: float
    plateau: float
    perturbation: float
    layers_per_transition: float
    deadline: int
    rungs: tuple[int, ...]
    blends: bool = True
    fixed: bool = False

    @property
    def blend_momentum(self) -> float:
        """beta of the blend: the momentum, or less where a blend would otherwise take too long.

        Too long means more than half of the steps that the deadline leaves for each rung.
        """
        time = self.deadline // max(1, 2 * len(self.rungs))
        return min(self.momentum, float((1 - BLEND_ENDS_AT) ** (1 / max(1, time))))

    @property
    def blend_steps(self) -> int:
        """Training steps of a blend that never pauses.

        That is the first n at which lambda_n = 1 - beta^n reaches `BLEND_ENDS_AT`.
        """
        if not self.blends or self.blend_momentum == 0 or self.deadline <= 0:
            return 0
        steps = math.log(1 - BLEND_ENDS_AT) / math.log(self.blend_momentum)
        return math.ceil(round(steps, 6))  # rounded, so that an error in the last bits does not add a step

    @property
    def last_call(self) -> int:
        """Training step at which every waiting layer begins its last transition, to end it by the deadline."""
        return self.deadline - self.blend_steps

    def due(self, step: int) -> tuple[int, ...]:
        """The widths that a fixed schedule has reached by `step`.

        They are evenly spread in time, and the last one comes at the last call.
        """
        if step >= self.last_call:
            return self.rungs
        return self.rungs[: step * len(self.rungs) // self.last_call]

    @property
    def late_from(self) -> int:
        """Training step from which two blends, one after another, no longer fit before the deadline.

        From then on rungs are skipped and no blend pauses.
        """
        return self.deadline - 2 * self.blend_steps

    @property
    def warm_up(self) -> int:
        """Number of observations before the loss momentum is trusted.

        It is twice the horizon of the averages, but at most an eighth of the time up to the deadline.
        """
        return max(2, min(round(2 / (1 - self.momentum)), self.deadline // 8))


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

    It begins anew whenever a width changes, since losses at different widths cannot be compared.

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


@dataclass(frozen=True)
class LayerStatus:
    """What the decision knows of one layer.

    Attributes:
        name: path of the layer.
        bits: present width of its weights.
        rungs: the widths still below it on its ladder, the widest first.
        perturbation: its perturbation momentum.
        in_transition: whether a blend is under way.
    """

    name: str
    bits: int
    rungs: tuple[int, ...]
    perturbation: float
    in_transition: bool


def rungs(plan: Sequence[LayerPlan]) -> tuple[int, ...]:
    """The widths that the layers with the longest ladders move down to, the widest first.

    Layers with shorter ladders move along with them.
    """
    longest = max((len(layer.ladder) for layer in plan), default=0)
    narrower = {width for layer in plan if len(layer.ladder) == longest for width in layer.ladder[1:]}
    return tuple(sorted(narrower, reverse=True))


def decide(
    step: int,
    settings: BitScheduleSettings,
    loss_momentum: float | None,
    observed: int,
    *,
    layers: Sequence[LayerStatus],
) -> tuple[Transition, ...]:
    """The transitions that begin at `step`.

    In the momentum schedule:

    - From the last call on, every waiting layer begins a transition to its target width at once.
    - Before that, nothing begins while any layer is in transition, before the warm-up is over, or while the loss
      momentum is at the plateau or above it.
    - Otherwise the least perturbed layers move one rung down, as many as the settings allow. Layers over the
      perturbation bound wait. Late in training they move to their target width instead, since there is no time for the
      rungs between.

    In a fixed schedule every layer moves to the narrowest of its rungs that is due. The moving averages are only
    recorded in the transitions.

    Args:
        step: present training step.
        settings: settings of the decision.
        loss_momentum: value of the loss momentum, or None where there is none yet.
        observed: number of improvements averaged at the present widths.
        layers: status of every planned layer.
    """
    # A layer waits if it still has rungs below it and no blend is under way.
    waiting = [layer for layer in layers if layer.rungs and not layer.in_transition]
    if settings.fixed:
        # The rungs that a layer passes at this step are those at or above the narrowest due width; it goes to the last.
        due = min(settings.due(step), default=math.inf)
        reached = [(layer, [rung for rung in layer.rungs if rung >= due]) for layer in waiting]
        return tuple(
            _transition(step, layer, passed[-1], loss_momentum, cause="fixed") for layer, passed in reached if passed
        )
    if step >= settings.last_call:
        return tuple(_transition(step, layer, layer.rungs[-1], loss_momentum, cause="deadline") for layer in waiting)
    moving = any(layer.in_transition for layer in layers)
    if moving or loss_momentum is None or observed < settings.warm_up or loss_momentum >= settings.plateau:
        return ()
    allowed = max(1, math.floor(settings.layers_per_transition * len(layers)))
    calm = sorted(
        (layer for layer in waiting if layer.perturbation <= settings.perturbation),
        key=lambda layer: layer.perturbation,
    )
    rung = -1 if step >= settings.late_from else 0  # the target width when it is late, otherwise the next rung
    return tuple(
        _transition(step, layer, layer.rungs[rung], loss_momentum, cause="plateau") for layer in calm[:allowed]
    )


def _transition(
    step: int, layer: LayerStatus, to_bits: int, loss_momentum: float | None, *, cause: Cause
) -> Transition:
    """The record of a layer's transition to this width."""
    return Transition(step, layer.name, layer.bits, to_bits, loss_momentum, layer.perturbation, cause)


def next_lambda(lam: float, step: int, settings: BitScheduleSettings, loss_momentum: float | None) -> float:
    """lambda after one more training step: beta lambda + (1 - beta), or unchanged where the blend pauses.

    A blend of the momentum schedule pauses while the loss rises faster than the plateau allows, unless it is late.
    """
    worse = not settings.fixed and loss_momentum is not None and loss_momentum < -settings.plateau
    if worse and step < settings.late_from:
        return lam
    return settings.blend_momentum * lam + (1 - settings.blend_momentum)
