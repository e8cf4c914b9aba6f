"""The callback of progressive quantization: it moves the layers of a model down their ladders during training.

Before every training step it updates the pace and moves every layer on that is not at its target width yet.

Not here: the decision and the method behind it (transition_decision.py), and how a layer computes at a width or in a
blend (quantization/layer_state.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from pqcad_qat.quantization.brevitas_layers import trained_weight
from pqcad_qat.quantization.layer_state import (
    QuantizedLayer,
    begin_blend,
    end_blend,
    move_within_levels,
    perturbation,
    read_bits,
    set_blend,
    set_weight_bits,
)
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.training.callback import Callback, TrainState
from pqcad_qat.training.transition import Cause, Transition
from pqcad_qat.training.transition_decision import (
    BitScheduleSettings,
    even_distance,
    next_pace,
    paced_distance,
)

WHOLE = 1 - 1e-6
"""Value of lambda from which on a transition is over; the steps to it add up with rounding errors."""


@dataclass
class Move:
    """A transition under way.

    Attributes:
        perturbation: relative change of the layer's weights by the whole transition.
        began: training step at which it began.
        share: lambda, the share of it that is done.
    """

    perturbation: float
    began: int
    share: float = 0.0


@dataclass
class MomentumBitSchedule(Callback):
    """Moves the layers of a model down their ladders during training.

    Nothing moves before `state.held_until`, even if the deadline then passes: that step follows a divergence.

    Attributes:
        layers: quantized layers by name.
        plan: their plans; each layer starts on its ladder's first rung and ends on its last.
        settings: settings of the decision.
        within: by name of a layer, how far each of its weights is to lie from its level, in the units of weights. On
            the way down the weights lie on their levels, so that narrower widths change little. At its target width a
            layer's are moved by this much, as far as they stay rounded as they are.
        transitions: all transitions that have ended, in order.
    """

    layers: Mapping[str, QuantizedLayer]
    plan: Sequence[LayerPlan]
    settings: BitScheduleSettings
    within: Mapping[str, Tensor] = field(default_factory=dict)
    transitions: list[Transition] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = "bit-schedule"
        self._ladders = {layer.name: layer.ladder for layer in self.plan}
        self._pace = 0.0
        self._moves: dict[str, Move] = {}
        self._change = 0.0

    def before_step(self, state: TrainState) -> None:
        """Move every layer on that is above its target width.

        Whenever a layer has reached another width, the averaged weights begin anew: they would mix two functions.
        """
        self._change = 0.0
        waiting = [name for name in self.layers if self._rungs(name)]
        if not waiting or state.step < state.held_until:
            return
        self._pace = next_pace(self._pace, self.settings)
        reached = [self._move(name, state.step) for name in waiting]  # every layer moves, so no short cut by any()
        if any(reached):
            state.restart_ema()

    def _move(self, name: str, step: int) -> bool:
        """Move one layer on by one training step, and return whether it has reached another width."""
        reached = False
        while self._rungs(name):
            move = self._moves.get(name) or self.begin(name, step)
            paced = paced_distance(self._pace, move.perturbation, self.settings)
            even = even_distance(len(self._rungs(name)) - move.share, step, self.settings)
            before, move.share = move.share, min(1.0, move.share + max(paced, even))
            self._change = max(self._change, (move.share - before) * move.perturbation)
            if move.share < WHOLE:
                if self.settings.blends:
                    set_blend(self.layers[name], move.share)
                break
            self._end(name, step, "momentum" if paced >= even else "deadline")
            reached = True
            if step < self.settings.deadline - 1:  # its next rung begins in the next step, unless this is the last one
                break
        return reached

    def begin(self, name: str, step: int, share: float = 0.0) -> Move:
        """Begin a layer's transition to its next rung, of which this share is done already."""
        layer, to_bits = self.layers[name], self._rungs(name)[0]
        self._moves[name] = Move(perturbation(layer, to_bits), step, share)
        if self.settings.blends:
            begin_blend(layer, to_bits)
            set_blend(layer, share)
        return self._moves[name]

    def _end(self, name: str, step: int, paced_by: Cause) -> None:
        """End a layer's transition at its new width, and record it."""
        layer, bits, to_bits = self.layers[name], read_bits(self.layers[name])[0], self._rungs(name)[0]
        if self.settings.blends:
            end_blend(layer)
        else:
            set_weight_bits(layer, to_bits)
        if name in self.within and not self._rungs(name):
            move_within_levels(layer, trained_weight(layer).detach() + self.within[name].to(layer.weight.device))
        move, cause = self._moves.pop(name), "fixed" if self.settings.fixed else paced_by
        self.transitions.append(Transition(step, name, bits, to_bits, move.perturbation, cause, began=move.began))

    def _rungs(self, name: str) -> tuple[int, ...]:
        """The widths still below the layer's present one on its ladder, the widest first."""
        bits = read_bits(self.layers[name])[0]
        return tuple(rung for rung in self._ladders[name] if rung < bits)

    def scalars(self) -> dict[str, float]:
        """Values for the log: the pace, the change of weights, mean lambda, and perturbations.

        The change is the largest relative change of a layer's weights by this step's move.
        """
        shares = [move.share for move in self._moves.values()]
        perturbations = {transition.layer: transition.perturbation for transition in self.transitions}
        perturbations |= {name: move.perturbation for name, move in self._moves.items()}
        return {
            "pace": self._pace,
            "weight_change": self._change,
            "blend_lambda": sum(shares) / len(shares) if shares else 0.0,
            **{f"layer/{name}/perturbation": value for name, value in perturbations.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "deadline": self.settings.deadline,
            "pace": self._pace,
            "moves": {name: asdict(move) for name, move in self._moves.items()},
            "transitions": [asdict(transition) for transition in self.transitions],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.settings = replace(self.settings, deadline=saved["deadline"])  # a sooner one would make layers jump
        self._pace = saved["pace"]
        self._moves = {name: Move(**move) for name, move in saved["moves"].items()}
        self.transitions[:] = [Transition(**transition) for transition in saved["transitions"]]
