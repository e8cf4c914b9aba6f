"""The decision of progressive quantization: how far each layer moves towards its next width in a training step.

Everything here is a pure function of the training step, the settings and the pace.

The method. Every layer has a ladder of widths, and its rungs are the widths still below its present one. A transition
moves a layer down one rung: the layer computes the blend (1 - lambda) Q_now(W) + lambda Q_next(W), and lambda goes from
0 to 1. A step of lambda changes the layer's weights by that step times the layer's perturbation,
||Q_next(W) - Q_now(W)|| / ||Q_now(W)||. So the schedule sets a pace, the relative change of weights in one training
step, and each layer's lambda goes as fast as this pace allows. A layer that the next width changes little is there in
a few steps; one that it changes much takes as many more.

The pace has momentum: pace <- beta pace + (1 - beta) bound, from 0. The first steps, which find the optimizer without
any knowledge of its gradients, thus change little.

By a deadline every layer is at its target width: no layer is slower than it would have to be from now on, evenly.

PQCAD-DM (arXiv 2506.16776) names a momentum-based mechanism that keeps low precision from perturbing the weights too
much. Its equations are not public, so this file is our reading of it. Blends with a slowly moving share are also those
of BinaryDM (arXiv 2404.05662) and QVGen (arXiv 2505.11497).

Not here: the callback that applies the decision (bit_schedule.py), and the record of a transition (transition.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BitScheduleSettings:
    """Settings of the decision.

    Attributes:
        momentum: beta, the decay per training step of the pace.
        perturbation: largest relative change of a layer's weights in one training step.
        deadline: training step at which every layer computes at its target width.
        blends: whether a transition is a blend; if False the layer jumps to the next width when the blend would end.
        fixed: whether all layers move evenly until the deadline, at no pace.
    """

    momentum: float
    perturbation: float
    deadline: int
    blends: bool = True
    fixed: bool = False


def next_pace(pace: float, settings: BitScheduleSettings) -> float:
    """The pace after one more training step: the relative change of weights that it allows."""
    return settings.momentum * pace + (1 - settings.momentum) * settings.perturbation


def paced_distance(pace: float, perturbation: float, settings: BitScheduleSettings) -> float:
    """How far the pace lets a layer move in one training step, in rungs, if its next rung perturbs it so much."""
    if settings.fixed:
        return 0.0
    return pace / perturbation if perturbation > pace else 1.0


def even_distance(rungs_left: float, step: int, settings: BitScheduleSettings) -> float:
    """How far a layer has to move in this training step, in rungs, to be evenly at its target by the deadline."""
    return rungs_left / max(1, settings.deadline - step)
