"""The callback of progressive quantization: it moves the layers of a model down their ladders during training.

Before every training step it updates the averages, asks `decide` which transitions begin, and carries them out.

Not here: the decision and the method behind it (transition_decision.py), and how a layer computes at a width or in a
blend (quantization/layer_state.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pqcad_qat.quantization.layer_state import (
    QuantizedLayer,
    begin_blend,
    blend_state,
    end_blend,
    perturbation,
    read_bits,
    set_blend,
    set_weight_bits,
)
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.training.callback import Callback, StepReport, TrainState
from pqcad_qat.training.transition import Transition
from pqcad_qat.training.transition_decision import (
    BLEND_ENDS_AT,
    BitScheduleSettings,
    LayerStatus,
    LossMomentum,
    Momentum,
    decide,
    next_lambda,
)

OBSERVE_EVERY = 5
"""Training steps between two observations of the perturbations.

They change slowly, and each observation quantizes every weight twice.
"""


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
        begun: tuple[Transition, ...] = ()
        if state.step >= state.held_until:
            begun = decide(state.step, self.settings, loss.value, loss.count, layers=self._statuses())
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
            lam = next_lambda(blend.share, step, self.settings, self._trusted_momentum())
            if lam >= BLEND_ENDS_AT - 1e-4:  # a tolerance, since the layer stores lambda in float32
                end_blend(layer)
                ended = True
                self._perturbations[name] = Momentum(self.settings.momentum)
            else:
                set_blend(layer, lam)
        return ended

    def _trusted_momentum(self) -> float | None:
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
