"""Detection of trouble in a training stage: an exploding loss, ranges that collapse or saturate, oscillating weights.

Four things are watched, each by its own method:

- The loss, at every step. It is smoothed and compared with its lowest level so far. Widths that were dropped allow it
  to rise, since coarser rounding explains a larger error. A rise beyond that raises DivergedError.
- Finite values. The training loop finds that something is NaN or infinite, and `TroubleWatch.explain` looks for the
  tensor that it came from.
- Weights, at every fifth step. A sample of each layer's integers shows clipping, collapse, and how often weights turn
  back.
- Inputs, at every 25th step. A sample of what each layer reads shows clipping and collapse.

Trouble with weights or inputs is a warning, once for each layer and kind of trouble. Last, the watch keeps the step up
to which all was well, to which training may go back.

Not here: the smoothed loss (loss_level.py), the flips of weights (oscillation.py), the words of a warning
(trouble_warnings.py), what follows a divergence (rollback.py, training_stage.py), and how a tensor uses its grid
(quantization/grid_statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pqcad_qat.errors import DivergedError
from pqcad_qat.models.watched_layers import watched_inputs
from pqcad_qat.quantization.grid_statistics import input_use, not_finite, weight_use
from pqcad_qat.quantization.layer_state import QuantizedLayer, blend_state, read_bits
from pqcad_qat.training.callback import Batch, Callback, StepReport, TrainState
from pqcad_qat.training.loss_level import LossLevel, allowed_rise
from pqcad_qat.training.oscillation import OFTEN, Flips
from pqcad_qat.training.trouble_warnings import OSCILLATING, SATURATED, WARNINGS, Trouble

CALM = 0.1
"""Share of the allowed loss below which training counts as well."""

SETTLED = 10
"""Training steps after a change of width from which training can count as well again.

A transition that does harm shows it by then.
"""

WEIGHTS_EVERY, INPUTS_EVERY = 5, 25
"""Training steps between two looks at the weights' integers, and between two looks at the layers' inputs.

The first is odd: a weight that flips at every step shows it only at odd distances. All watching together takes 2 % of
a training step of a model as small as the one for digits, and less of larger ones.
"""

TRACKED_WEIGHTS, READ_VALUES = 256, 4096
"""Number of a layer's weights, and of its input's values, that are looked at; they are evenly spread.

The weights' state is so small that it fits into every checkpoint.
"""


@dataclass
class TroubleWatch(Callback):
    """Watches the loss, the weights and the inputs; raises DivergedError, or warns once for each layer and trouble.

    Attributes:
        stage: name of the stage, at the head of every warning.
        layers: quantized layers by name.
        warn: function that receives each warning as a sentence.
        good: last training step at which all was well: the loss was calm, and no width was changing or had just
            changed. An error at a later step can be undone by going back to a checkpoint of this step or an earlier
            one.
    """

    stage: str
    layers: Mapping[str, QuantizedLayer]
    warn: Callable[[str], None]
    good: int = 0
    _loss: LossLevel = field(default_factory=LossLevel)
    _judge_from: int = 0
    _changed_at: int = -1
    _busy_at: int = -SETTLED
    _moved: list[str] = field(default_factory=list)
    _warned: set[str] = field(default_factory=set)
    _flips: Flips | None = None
    _inputs: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    _reading: ExitStack = field(default_factory=ExitStack)
    _batch: Batch = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = "trouble"
        self._first = {name: read_bits(layer)[0] for name, layer in self.layers.items()}
        self._widths = dict(self._first)

    def before_step(self, state: TrainState) -> None:
        """Begin to read the layers' inputs, where it is time for that."""
        if state.step % INPUTS_EVERY == 0:
            watchers = [(layer, partial(self._read, name)) for name, layer in self.layers.items()]
            self._reading.enter_context(watched_inputs(watchers))

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        """Stop reading inputs; no loss term.

        The loop calls this after the callbacks that run the model. So neither what the backward pass computes again
        nor further micro-batches are read.
        """
        self._batch = batch
        self._reading.close()
        return {}

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Judge the loss, and the samples of inputs and weights where there are any."""
        self._look_at_inputs(state.step)
        self._judge(state.step, report.loss)
        if self.layers and state.step % WEIGHTS_EVERY == 0:
            self._look_at_weights(state.step)

    def explain(self, state: TrainState) -> Sequence[str]:
        """The likely causes of a loss or gradient that is not finite.

        If the batch itself is not finite, nothing else is named. Otherwise weights, ranges and other Parameters that
        are not finite are named. Only if all of these are finite is a gradient named: the last one in the model's
        order, where the backward pass begins.
        """
        self._look_at_inputs(state.step)
        if wrong := [name for name, value in self._batch.items() if not bool(value.isfinite().all())]:
            return [f"{', '.join(wrong)} of the batch not finite"]
        causes = [
            f"layer {name}: {', '.join(tensors)} not finite"
            for name, layer in self.layers.items()
            if (tensors := not_finite(layer))
        ]
        known = {id(parameter) for layer in self.layers.values() for parameter in layer.parameters()}
        named = dict(state.model.named_parameters())
        causes += [
            f"{name} is not finite"
            for name, value in named.items()
            if id(value) not in known and not bool(value.isfinite().all())
        ]
        broken = [
            name for name, value in named.items() if value.grad is not None and not bool(value.grad.isfinite().all())
        ]
        if broken and not causes:
            causes = [f"{self._owner(broken[-1])}: gradient not finite (the last of {len(broken)} such parameters)"]
        return [
            *causes[:5],
            *([f"and {len(causes) - 5} more"] if len(causes) > 5 else []),
            "lower training.learning_rate",
        ]

    def _owner(self, parameter: str) -> str:
        """The layer that a Parameter belongs to, or the Parameter's own name."""
        return next((f"layer {name}" for name in self.layers if parameter.startswith(f"{name}.")), parameter)

    def pause_judging(self, step: int) -> None:
        """Judge the loss again only after some steps, since training goes on from here with a lower learning rate."""
        self._judge_from = step + 2 * SETTLED

    # ---- the loss

    def _judge(self, step: int, loss: float) -> None:
        """Raise DivergedError where the loss has risen too far, and update `good`.

        The bits that were dropped count from the stage's start, for the layer that dropped most. A blend counts as its
        next width.
        """
        blends = {name: blend_state(layer) for name, layer in self.layers.items()}
        widths = {name: blend.next_bits if blend else read_bits(self.layers[name])[0] for name, blend in blends.items()}
        moved = [name for name, width in widths.items() if width != self._widths[name]]
        if moved:
            self._changed_at, self._widths, self._moved = step - 1, widths, moved
        self._loss = self._loss.updated(loss)
        dropped = max((self._first[name] - width for name, width in widths.items()), default=0)
        allowed = allowed_rise(dropped) * self._loss.lowest
        if self._loss.value > allowed and step >= self._judge_from:
            raise DivergedError(step, self._explosion(step, allowed))
        if moved or any(blends.values()):
            self._busy_at = step
        if self._loss.value <= CALM * allowed and step - self._busy_at >= SETTLED:
            self.good = step

    def _explosion(self, step: int, allowed: float) -> str:
        """The message of a loss that rose too far, with the last change of width as its likely cause."""
        level = self._loss
        text = (
            f"step {step}: training diverged: the smoothed loss is {level.value:.3g}, "
            f"{level.value / level.lowest:.0f} times its lowest"
        )
        text += f" ({level.lowest:.3g}); allowed {allowed / level.lowest:.0f} times"
        if self._changed_at < 0:
            return f"{text}; lower training.learning_rate"
        widths = [f"layer {name} from {self._first[name]} to {self._widths[name]} bits" for name in self._moved[:5]]
        more = f" and {len(self._moved) - 5} more" if len(self._moved) > 5 else ""
        return (
            f"{text}. The last change of width was at step {self._changed_at}: {', '.join(widths)}{more}; "
            "use progressive.transition: "
            "blend, a later progressive.deadline, more bits for these layers, or a lower training.learning_rate"
        )

    # ---- weights and inputs

    def _look_at_weights(self, step: int) -> None:
        """Look at a sample of each layer's weights for collapse, saturation and oscillation.

        Flips are counted anew after a change of width, since integers of different grids cannot be compared.
        """
        troubled: dict[Trouble, dict[str, str]] = {
            "collapsed weights": {},
            "saturated weights": {},
            "oscillating weights": {},
        }
        uses = {name: weight_use(layer, TRACKED_WEIGHTS) for name, layer in self.layers.items()}
        for name, use in uses.items():
            if use.collapsed:
                troubled["collapsed weights"][name] = f"{use.clipped:.0%} clipped"
            elif use.clipped > SATURATED:
                troubled["saturated weights"][name] = f"{use.clipped:.0%}"
        sizes = [len(use.integers) for use in uses.values()]
        integers = torch.cat([use.integers for use in uses.values()]).cpu()
        if self._flips is None or step - self._busy_at <= WEIGHTS_EVERY:
            self._flips = Flips.at_first_look(integers)
        self._flips.look(integers)
        shares = [float(part.double().mean()) for part in torch.split(self._flips.frequency >= OFTEN, sizes)]
        troubled["oscillating weights"] = {
            name: f"{share:.0%}" for name, share in zip(uses, shares, strict=True) if share > OSCILLATING
        }
        self._warn_once(step, troubled)

    def _read(self, name: str, tensor: Tensor) -> None:
        """Look at a sample of one input that a layer reads."""
        use = input_use(self.layers[name], tensor.detach(), READ_VALUES)
        self._inputs.setdefault(name, []).append((use.clipped, use.collapsed))

    def _look_at_inputs(self, step: int) -> None:
        """Warn of trouble with the inputs that were read in this step.

        A layer that was called several times has collapsed where every call's input did; its clipping is the mean.
        """
        troubled: dict[Trouble, dict[str, str]] = {"collapsed inputs": {}, "saturated inputs": {}}
        for name, uses in self._inputs.items():
            clipped = sum(share for share, _ in uses) / len(uses)
            if all(collapsed for _, collapsed in uses):
                troubled["collapsed inputs"][name] = f"{clipped:.0%} clipped"
            elif clipped > SATURATED:
                troubled["saturated inputs"][name] = f"{clipped:.0%}"
        self._inputs = {}
        self._warn_once(step, troubled)

    def _warn_once(self, step: int, troubled: Mapping[Trouble, Mapping[str, str]]) -> None:
        """Warn of trouble that was not warned of before."""
        for trouble, layers in troubled.items():
            new = {name: figure for name, figure in layers.items() if f"{trouble}: {name}" not in self._warned}
            if not new:
                continue
            self._warned |= {f"{trouble}: {name}" for name in new}
            description, advice = WARNINGS[trouble]
            listed = ", ".join(f"layer {name} ({figure})" for name, figure in new.items())
            self.warn(f"{self.stage}: step {step}: {description}: {listed}; {advice}")

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss": asdict(self._loss) | {"lowest": min(self._loss.lowest, 1e30)},
            "good": self.good,
            "judge_from": self._judge_from,
            "changed_at": self._changed_at,
            "busy_at": self._busy_at,
            "widths": self._widths,
            "moved": self._moved,
            "told": sorted(self._warned),
            "flips": {key: value.tolist() for key, value in vars(self._flips).items()} if self._flips else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state; warnings already given are not given again, even if training goes back to before them."""
        self._loss = LossLevel(**saved["loss"])
        self.good, self._judge_from = saved["good"], saved["judge_from"]
        self._changed_at, self._busy_at = saved["changed_at"], saved["busy_at"]
        self._widths, self._moved = dict(saved["widths"]), list(saved["moved"])
        self._warned |= set(saved["told"])
        self._flips = (
            Flips(**{key: torch.tensor(value) for key, value in saved["flips"].items()}) if saved["flips"] else None
        )
