"""When, which and how layers go down in width: progressive quantization's schedules, as a pure decision and a thin
callback.

Not here: what a width is (quantization/quantized_layer.py). The paper (PQCAD-DM, arXiv 2506.16776) names a
momentum-based mechanism that keeps low precision from perturbing the weights too much; its equations are not public, so
what follows is our reading of it.
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
"""Steps between two observations of the perturbations: they change slowly, and each costs two quantizations of every
weight.
"""


BLEND_ENDS_AT = 0.95
"""Share of the next width at which a blend ends and the next width computes alone."""


@dataclass(frozen=True)
class BitScheduleSettings:
    """What decides a transition.

    Attributes:
        momentum: beta of every exponential moving average, and of the blend.
        plateau: relative improvement of the loss a step under which a transition is due.
        perturbation: relative change of a layer's weights over which it waits.
        layers_per_transition: share of the layers that may be in transition at once.
        deadline: step at which every layer computes at its target width.
        rungs: the widths that a layer with the longest ladder goes down to, the widest first.
        blends: False makes a transition a jump.
        fixed: all layers take the rungs at evenly spread steps, whatever the momenta say.
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
        """beta of the blend: the momentum, or less where a blend would take more than half of the time that there is
        for a rung.
        """
        time = self.deadline // max(1, 2 * len(self.rungs))
        return min(self.momentum, float((1 - BLEND_ENDS_AT) ** (1 / max(1, time))))

    @property
    def blend_steps(self) -> int:
        """Steps that an undisturbed blend lasts: lambda_n = 1 - beta^n reaches `BLEND_ENDS_AT`."""
        if not self.blends or self.blend_momentum == 0 or self.deadline <= 0:
            return 0
        return math.ceil(round(math.log(1 - BLEND_ENDS_AT) / math.log(self.blend_momentum), 6))

    @property
    def last_call(self) -> int:
        """Step from which every layer that still waits must leave at once to be at its target by the deadline."""
        return self.deadline - self.blend_steps

    def due(self, step: int) -> tuple[int, ...]:
        """Widths of a fixed schedule whose transition has come by `step`: spread evenly, the last at the last call."""
        count = len(self.rungs)
        return self.rungs[: count if step >= self.last_call else step * count // self.last_call]

    @property
    def late_from(self) -> int:
        """Step from which there is no time left for two blends, one after another: rungs are skipped and nothing
        pauses.
        """
        return self.deadline - 2 * self.blend_steps

    @property
    def warm_up(self) -> int:
        """Steps before the loss momentum is believed: twice the averages' horizon, at most an eighth of the time there
        is.
        """
        return max(2, min(round(2 / (1 - self.momentum)), self.deadline // 8))


@dataclass(frozen=True)
class Momentum:
    """An exponential moving average with Adam's bias correction (Kingma and Ba 2015, algorithm 1)."""

    beta: float
    average: float = 0.0
    count: int = 0

    def updated(self, value: float) -> Momentum:
        return replace(self, average=self.beta * self.average + (1 - self.beta) * value, count=self.count + 1)

    @property
    def value(self) -> float | None:
        return self.average / (1 - self.beta**self.count) if self.count else None


@dataclass(frozen=True)
class LossMomentum:
    """Momentum of the relative improvement (l_{n-1} - l_n) / l_{n-1} of the smoothed training loss l at the present
    widths.
    """

    smoothed: Momentum
    improvement: Momentum

    @classmethod
    def fresh(cls, beta: float) -> LossMomentum:
        return cls(Momentum(beta), Momentum(beta))

    def updated(self, loss: float) -> LossMomentum:
        before, smoothed = self.smoothed.value, self.smoothed.updated(loss)
        if before is None or before == 0:
            return replace(self, smoothed=smoothed)
        assert smoothed.value is not None
        return LossMomentum(smoothed, self.improvement.updated((before - smoothed.value) / before))


@dataclass(frozen=True)
class LayerStatus:
    """A layer as the decision sees it: its width, the rungs still below it, its perturbation momentum, and whether it
    is in transition.
    """

    name: str
    bits: int
    rungs: tuple[int, ...]
    perturbation: float
    in_transition: bool


def rungs(plan: Sequence[LayerPlan]) -> tuple[int, ...]:
    """The widths that the layers of the longest ladders go down to, the widest first; the others go along."""
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

    From the last call on, every layer that is not on its way is sent to its target at once. Before that, a transition
    is due when nothing is in transition, the loss momentum has been observed for the warm-up and is under the plateau;
    then the least perturbed layers go one rung down (to their target when it is late), as many as the share allows;
    those over the bound wait.

    In a fixed schedule every layer goes down to the narrowest of its rungs that is due; the momenta are only recorded.

    Args:
        step: the clock.
        loss_momentum: None where there is none yet.
        observed: steps that the loss momentum has seen at the present widths.
        layers: every planned layer.
    """
    waiting = [layer for layer in layers if layer.rungs and not layer.in_transition]
    if settings.fixed:
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
    rung = -1 if step >= settings.late_from else 0
    return tuple(
        _transition(step, layer, layer.rungs[rung], loss_momentum, cause="plateau") for layer in calm[:allowed]
    )


def _transition(
    step: int, layer: LayerStatus, to_bits: int, loss_momentum: float | None, *, cause: Cause
) -> Transition:
    return Transition(step, layer.name, layer.bits, to_bits, loss_momentum, layer.perturbation, cause)


def next_lambda(lam: float, step: int, settings: BitScheduleSettings, loss_momentum: float | None) -> float:
    """lambda <- beta lambda + (1 - beta); in the momentum schedule it pauses while training gets worse than the
    plateau, unless late.
    """
    worse = not settings.fixed and loss_momentum is not None and loss_momentum < -settings.plateau
    if worse and step < settings.late_from:
        return lam
    return settings.blend_momentum * lam + (1 - settings.blend_momentum)


@dataclass
class MomentumBitSchedule(Callback):
    """Moves the layers of a model down their ladders while it trains. Nothing begins before `state.held_until`, not
    even by the deadline.

    Attributes:
        layers: quantized layers by name.
        plan: their plans; each layer starts on its ladder's first rung and ends on its last.
        settings: of the decision.
        transitions: everything that was decided so far.
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
        ended = self._advance_blends(state.step)
        if ended or state.step % OBSERVE_EVERY == 0:
            self._observe_perturbations()
        loss = self._loss.improvement
        held = state.step < state.held_until
        begun = () if held else decide(state.step, self.settings, loss.value, loss.count, layers=self._statuses())
        for transition in begun:
            self._begin(transition)
        jumped = bool(begun) and not self.settings.blend_steps
        if ended or jumped:  # a blend that begins changes nothing yet
            self._loss = LossMomentum.fresh(self.settings.momentum)
            state.restart_ema()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        self._loss = self._loss.updated(report.loss)

    def _advance_blends(self, step: int) -> bool:
        """Move every blend one step on; True where one ended."""
        ended = False
        for name, layer in self.layers.items():
            blend = blend_state(layer)
            if blend is None:
                continue
            lam = next_lambda(blend.share, step, self.settings, self._believed())
            if lam >= BLEND_ENDS_AT - 1e-4:  # lambda is kept in float32
                end_blend(layer)
                ended = True
                self._perturbations[name] = Momentum(self.settings.momentum)
            else:
                set_blend(layer, lam)
        return ended

    def _believed(self) -> float | None:
        """The loss momentum, once it has been observed for the warm-up: before that it is the noise of a few
        batches.
        """
        improvement = self._loss.improvement
        return improvement.value if improvement.count >= self.settings.warm_up else None

    def _observe_perturbations(self) -> None:
        for name, layer in self.layers.items():
            rungs = self._rungs(name)
            if rungs and blend_state(layer) is None:
                self._perturbations[name] = self._perturbations[name].updated(perturbation(layer, rungs[0]))

    def _rungs(self, name: str) -> tuple[int, ...]:
        bits = read_bits(self.layers[name])[0]
        return tuple(rung for rung in self._ladders[name] if rung < bits)

    def _statuses(self) -> list[LayerStatus]:
        return [self._status(name, layer) for name, layer in self.layers.items()]

    def _status(self, name: str, layer: QuantizedLayer) -> LayerStatus:
        moving = blend_state(layer) is not None
        return LayerStatus(name, read_bits(layer)[0], self._rungs(name), self._perturbations[name].value or 0.0, moving)

    def _begin(self, transition: Transition) -> None:
        layer = self.layers[transition.layer]
        if self.settings.blends and self.settings.blend_steps:
            begin_blend(layer, transition.to_bits)
        else:
            set_weight_bits(layer, transition.to_bits)
            self._perturbations[transition.layer] = Momentum(self.settings.momentum)
        self.transitions.append(transition)

    def scalars(self) -> dict[str, float]:
        """For the log: both momenta (the perturbation's mean), lambda, and each layer's perturbation."""
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
