"""Mixed precision: a width for every layer within a budget, written as rules that a person can read.

The choice weighs what each width costs against the error that it makes in the output.

Not here: the measurement of that error (layer_sensitivity.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from pqcad_qat.errors import PlanError
from pqcad_qat.policy.layer_rules import LayerRule
from pqcad_qat.policy.value_types import SIZE_LIMIT
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.plan_facts import expected_bytes


def limit_in_bytes(limit: str, whole: int) -> int:
    """Bytes of a size limit such as 2.5MB or 0.15x, for a model that takes `whole` bytes in float32."""
    size = re.fullmatch(SIZE_LIMIT, limit)
    assert size is not None, "not a size limit"
    return int(float(size[1]) * (whole if size[2] == "x" else 1e6))


@dataclass(frozen=True)
class Costs:
    """Costs of a model by the widths of its layers, in any unit that can be added, such as bytes of weights.

    Attributes:
        whole: cost of which a budget may be a share.
        fixed: cost of everything that is not planned.
        layers: planned layer -> width -> cost.
    """

    whole: int
    fixed: int
    layers: Mapping[str, Mapping[int, int]]

    @property
    def least(self) -> int:
        """Cost of the model with every layer at its cheapest width."""
        return self.fixed + sum(min(costs.values()) for costs in self.layers.values())

    def total(self, bits: Mapping[str, int]) -> int:
        """Cost of the whole model with these widths."""
        return self.fixed + sum(self.layers[name][width] for name, width in bits.items())

    def at(self, widths: Collection[int]) -> Costs:
        """The same costs, restricted to these widths."""
        return replace(
            self, layers={name: {bits: costs[bits] for bits in widths} for name, costs in self.layers.items()}
        )


def weight_costs(model: nn.Module, plan: Sequence[LayerPlan], widths: Collection[int], *, packed: bool) -> Costs:
    """Bytes of the deployed weights, scales included, for each layer at each width.

    Shares refer to the size of all parameters in float32.

    Args:
        model: the floating-point model.
        plan: plan of its layers.
        widths: widths in bits.
        packed: whether weights are packed, so that narrow ones take less.
    """
    # `expected_bytes` gives the size of the whole model, so a layer's cost is a difference: the size with this layer
    # alone quantized, minus the float32 size, plus the layer's own float32 weights.
    full = expected_bytes(model, (), packed=False)
    weights = {layer.name: 4 * model.get_parameter(f"{layer.name}.weight").numel() for layer in plan}
    layers: dict[str, dict[int, int]] = {}
    for layer in plan:
        at = {bits: expected_bytes(model, with_bits([layer], {layer.name: bits}), packed) for bits in widths}
        layers[layer.name] = {bits: size - full + weights[layer.name] for bits, size in at.items()}
    return Costs(full, full - sum(weights.values()), layers)


@dataclass(frozen=True)
class Option:
    """One width that a layer may get.

    Attributes:
        bits: width.
        cost: its cost, in any unit that can be added.
        error: error that it makes.
    """

    bits: int
    cost: int
    error: float


def choose_bits(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, int]:
    """Layer -> width, so that the sum of errors is as small as the budget allows.

    Every layer starts at its cheapest width. Steps to a larger width are then taken in the order of the error that
    they save for their cost, as long as they fit. Since each layer's options lie on their lower convex hull, a layer's
    steps come in their own order. The choice is the best one for the cost that it reaches (the greedy solution of the
    multiple-choice knapsack; Sinha and Zoltners 1979).

    Raises:
        PlanError: even the cheapest widths cost more than the budget.
    """
    chosen = {name: lower_hull(widths)[0] for name, widths in options.items()}
    spent = sum(option.cost for option in chosen.values())
    if spent > budget:
        raise PlanError(
            f"got a budget of {budget:,}; allowed at least {spent:,}, which all layers at their cheapest widths cost"
        )
    for name, below, above in _steps_up(options):
        if chosen[name] == below and spent + above.cost - below.cost <= budget:
            chosen[name], spent = above, spent + above.cost - below.cost
    return {name: option.bits for name, option in chosen.items()}


def choices_by_size(options: Mapping[str, Sequence[Option]]) -> list[dict[str, int]]:
    """All choices of layer -> width that `choose_bits` makes without a rest of its budget, the cheapest first.

    Each has one layer at a larger width than the one before it. The last has every layer at its width of least error.
    """
    choices = [{name: lower_hull(widths)[0].bits for name, widths in options.items()}]
    for name, _, above in _steps_up(options):
        choices.append({**choices[-1], name: above.bits})
    return choices


def _steps_up(options: Mapping[str, Sequence[Option]]) -> list[tuple[str, Option, Option]]:
    """(layer, option, next larger option), in the order of the error that the step saves for its cost."""
    steps = [(name, below, above) for name, widths in options.items() for below, above in pairwise(lower_hull(widths))]
    return sorted(steps, key=lambda step: _slope(step[1], step[2]))


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over cost, cheapest first.

    From each option to the next the cost rises and the error falls, and each step saves less error for its cost than
    the one before it.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error, -option.bits)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(below: Option, above: Option) -> float:
    """Change of error per cost from one option to the next; the more negative, the better."""
    return (above.error - below.error) / (above.cost - below.cost)


def with_bits(plan: Sequence[LayerPlan], bits: Mapping[str, int]) -> tuple[LayerPlan, ...]:
    """The plan with these widths of the weights; each layer's ladder ends there."""
    return tuple(
        replace(
            layer,
            weights=replace(layer.weights, bits=bits[layer.name]),
            ladder=(*(rung for rung in layer.ladder if rung > bits[layer.name]), bits[layer.name]),
        )
        for layer in plan
    )


def patterns(names: Collection[str], excluded: Collection[str]) -> list[str]:
    """Globs and paths that match all of these layers and none of the excluded ones.

    A glob is used wherever it can stand for two layers or more.
    """
    return list(_covering("", list(names), list(excluded)))


def _covering(prefix: str, names: Sequence[str], excluded: Sequence[str]) -> Iterator[str]:
    """The patterns below a prefix: one glob where it matches no other layer, else those of each part of the path."""
    if len(names) > 1 and not excluded and prefix:
        yield f"{prefix}*"
        return
    children = dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in names)
    for child in children:
        path, below = f"{prefix}{child}", f"{prefix}{child}."
        if path in names:
            yield path
        inside, outside = ([path for path in paths if path.startswith(below)] for paths in (names, excluded))
        if inside:
            yield from _covering(below, inside, outside)


def mixed_rules(
    rules: Mapping[str, LayerRule], plan: Sequence[LayerPlan], names: Collection[str], bits: Mapping[str, int]
) -> dict[str, LayerRule]:
    """The rules that give the planned layers these widths; `names` are all layers that rules can match.

    A rule becomes one rule for each width of its layers, widest first, with the width after its name. It stays as it
    is where all its layers keep its own width.
    """
    mixed: dict[str, LayerRule] = {}
    for name, rule in rules.items():
        planned = [layer for layer in plan if layer.rule == name]
        widths = sorted({bits[layer.name] for layer in planned}, reverse=True)
        if rule.weights is None or widths == [rule.weights.bits]:
            mixed[name] = rule
        else:
            for width in widths:
                match = _only([layer.name for layer in planned if bits[layer.name] == width], names)
                weights = rule.weights.model_copy(update={"bits": width})
                mixed[f"{name}-{width}"] = rule.model_copy(update={"match": tuple(match), "weights": weights})
    return mixed


def _only(layers: Sequence[str], names: Collection[str]) -> list[str]:
    """Patterns that match these layers and no other."""
    return patterns(layers, [name for name in names if name not in layers])
