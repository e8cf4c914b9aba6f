"""Progressive quantization's schedules: when layers move to a narrower width, which layers, and how.

The decision is a pure function (`decide`), and a thin callback applies it (`MomentumBitSchedule`).

The method. Every layer has a ladder of widths, and its rungs are the widths still below its present one. A transition
moves a layer down one or more rungs. It is either a jump or a blend, in which the layer computes (1 - lambda) Q_now(W)
+ lambda Q_next(W) while lambda grows from 0: lambda <- beta lambda + (1 - beta). Two moving averages decide:

- The loss momentum is the averaged relative improvement of the training loss. While it is high, the model still
  recovers, and nothing moves. Once it is under a plateau, a transition is due.
- A layer's perturbation momentum is the averaged relative change that the next width would make to its weights. The
  least perturbed layers move first, and layers over a bound wait.

By a deadline every layer is at its target width, whatever the averages say.

PQCAD-DM (arXiv 2506.16776) names a momentum-based mechanism that keeps low precision from perturbing the weights too
much. Its equations are not public, so this file is our reading of it.

Not here: how a layer computes at a width or in a blend (quantization/quantized_layer.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.quantized_layer import (
    QuantizedLayer,
    begin_blend,
    blend_state,
    end_blend,
    perturbation,
    read_bits,
    set_blend,
    set_weight_bits,
)
from pqcad_qat.training.callback import Callback, StepReport, TrainState
from pqcad_qat.training.transition import Cause, Transition

OBSERVE_EVERY = 5
"""Training steps between two observations of the perturbations.

They change slowly, and each observation quantizes every weight twice.
"""


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
        return math.ceil(round(math.log(1 - BLEND_ENDS_AT) / math.log(self.blend_momentum), 6))

    @property
    def last_call(self) -> int:
        """Training step at which every waiting layer begins its last transition, to end it by the deadline."""
        return self.deadline - self.blend_steps

    def due(self, step: int) -> tuple[int, ...]:
        """The widths that a fixed schedule has reached by `step`.

        They are evenly spread in time, and the last one comes at the last call.
        """
        count = len(self.rungs)
        return self.rungs[: count if step >= self.last_call else step * count // self.last_call]

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
    return tuple(
        sorted({width for layer in plan if len(layer.ladder) == longest for width in layer.ladder[1:]}, reverse=True)
    )


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


@dataclass
class MomentumBitSchedule(Callback):
    """Moves the layers of a model down their ladders during training.

    No transition begins before `state.held_until`, even if the deadline then passes: that step follows a divergence.

    Attributes:
        layers: quantized layers by name.
        plan: their plans; each layer starts on its ladder's first rung and ends on its last.
        settings: settings of the decision.
        transitions: all transitions decided so far, in order.
    """

    layers: Mapping[str, QuantizedLayer]
    plan: Sequence[LayerPlan]
    settings: BitScheduleSettings
    transitions: list[Transition] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = "bit-schedule"
        self._ladders = {layer.name: layer.ladder for layer in self.plan}
        self._loss = LossMomentum.fresh(self.settings.momentum)
        self._perturbations = {layer.name: Momentum(self.settings.momentum) for layer in self.plan}

    def before_step(self, state: TrainState) -> None:
        """Move blends on, observe perturbations, and begin the transitions that are due, in this order.

        Whenever a layer's function changed for good, the loss momentum and the averaged weights begin anew: both would
        mix values of two different functions.
        """
        ended = self._advance_blends(state.step)
        if ended or state.step % OBSERVE_EVERY == 0:
            self._observe_perturbations()
        loss = self._loss.improvement
        held = state.step < state.held_until
        begun = () if held else decide(state.step, self.settings, loss.value, loss.count, layers=self._statuses())
        for transition in begun:
            self._begin(transition)
        jumped = bool(begun) and not self.settings.blend_steps
        if ended or jumped:  # a blend begins with lambda = 0, so that its beginning changes nothing yet
            self._loss = LossMomentum.fresh(self.settings.momentum)
            state.restart_ema()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Update the loss momentum with the loss of this step."""
        self._loss = self._loss.updated(report.loss)

    def _advance_blends(self, step: int) -> bool:
        """Move every blend on by one training step, and return whether any of them ended."""
        ended = False
        for name, layer in self.layers.items():
            blend = blend_state(layer)
            if blend is None:
                continue
            lam = next_lambda(blend.share, step, self.settings, self._believed())
            if lam >= BLEND_ENDS_AT - 1e-4:  # a tolerance, since the layer stores lambda in float32
                end_blend(layer)
                ended = True
                self._perturbations[name] = Momentum(self.settings.momentum)
            else:
                set_blend(layer, lam)
        return ended

    def _believed(self) -> float | None:
        """The loss momentum, or None before the warm-up is over.

        At first it only shows the noise of a few batches.
        """
        improvement = self._loss.improvement
        return improvement.value if improvement.count >= self.settings.warm_up else None

    def _observe_perturbations(self) -> None:
        """Update the perturbation momentum of every layer that waits and has a rung left."""
        for name, layer in self.layers.items():
            rungs = self._rungs(name)
            if rungs and blend_state(layer) is None:
                self._perturbations[name] = self._perturbations[name].updated(perturbation(layer, rungs[0]))

    def _rungs(self, name: str) -> tuple[int, ...]:
        """The widths still below the layer's present one on its ladder, the widest first."""
        bits = read_bits(self.layers[name])[0]
        return tuple(rung for rung in self._ladders[name] if rung < bits)

    def _statuses(self) -> list[LayerStatus]:
        return [self._status(name, layer) for name, layer in self.layers.items()]

    def _status(self, name: str, layer: QuantizedLayer) -> LayerStatus:
        """What the decision needs to know of a layer."""
        moving = blend_state(layer) is not None
        return LayerStatus(name, read_bits(layer)[0], self._rungs(name), self._perturbations[name].value or 0.0, moving)

    def _begin(self, transition: Transition) -> None:
        """Begin one transition, as a blend or as a jump, and record it."""
        layer = self.layers[transition.layer]
        if self.settings.blends and self.settings.blend_steps:
            begin_blend(layer, transition.to_bits)
        else:
            set_weight_bits(layer, transition.to_bits)
            self._perturbations[transition.layer] = Momentum(self.settings.momentum)
        self.transitions.append(transition)

    def scalars(self) -> dict[str, float]:
        """Values for the log: both momenta, mean lambda, and each layer's perturbation.

        The perturbation momentum is the mean over the layers that have rungs left.
        """
        lambdas = [blend.share for layer in self.layers.values() if (blend := blend_state(layer)) is not None]
        waiting = [
            value
            for name in self.layers
            if self._rungs(name) and (value := self._perturbations[name].value) is not None
        ]
        return {
            "perturbation": sum(waiting) / len(waiting) if waiting else 0.0,
            "loss_momentum": self._loss.improvement.value or 0.0,
            "blend_lambda": sum(lambdas) / len(lambdas) if lambdas else 0.0,
            **{f"layer/{name}/perturbation": momentum.value or 0.0 for name, momentum in self._perturbations.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss": asdict(self._loss),
            "perturbations": {name: asdict(momentum) for name, momentum in self._perturbations.items()},
            "transitions": [asdict(transition) for transition in self.transitions],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._loss = LossMomentum(Momentum(**saved["loss"]["smoothed"]), Momentum(**saved["loss"]["improvement"]))
        self._perturbations = {name: Momentum(**momentum) for name, momentum in saved["perturbations"].items()}
        self.transitions[:] = [Transition(**transition) for transition in saved["transitions"]]
