"""Mixed precision: a width for every layer within a budget, written as rules that a person can read.

The choice weighs what each width costs against the error that it makes in the output.

Not here: the measurement of that error (layer_sensitivity.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pqcad_qat.errors import PlanError
from pqcad_qat.policy.layer_rules import LayerRule
from pqcad_qat.quantization.plan import LayerPlan


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
    hulls = {name: lower_hull(widths) for name, widths in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(option.cost for option in chosen.values())
    if spent > budget:
        raise PlanError(
            f"got a budget of {budget:,}; allowed at least {spent:,}, which all layers at their cheapest widths cost"
        )
    steps = [(name, below, above) for name, hull in hulls.items() for below, above in pairwise(hull)]
    for name, below, above in sorted(steps, key=lambda step: _slope(step[1], step[2])):
        if chosen[name] is below and spent + above.cost - below.cost <= budget:
            chosen[name], spent = above, spent + above.cost - below.cost
    return {name: option.bits for name, option in chosen.items()}


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
    """The plan with these widths of the weights."""
    return tuple(replace(layer, weights=replace(layer.weights, bits=bits[layer.name])) for layer in plan)


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
