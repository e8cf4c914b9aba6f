"""Widths layer by layer within a budget, from what each costs and what it does to the output; and as rules that a person can read.

Not here: how far the output moves (sensitivity.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pqcad_qat.errors import PlanError
from pqcad_qat.quantization.plan import LayerPlan


@dataclass(frozen=True)
class Option:
    """A width that a layer may get: what it costs, in any unit that adds up, and the error that it makes."""

    bits: int
    cost: int
    error: float


def choose_bits(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, int]:
    """Layer -> width: the sum of errors as small as the budget of costs allows.

    Every layer starts at its cheapest width; the steps up that save most error for their cost are taken first, as long as they fit. On
    the lower convex hull of each layer's options this is the best choice for the cost that it comes to (the greedy solution of the
    multiple-choice knapsack; Sinha and Zoltners 1979).

    Raises:
        PlanError: even the cheapest widths cost more.
    """
    hulls = {name: lower_hull(found) for name, found in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(option.cost for option in chosen.values())
    if spent > budget:
        raise PlanError(f"got a budget of {budget:,}; allowed at least {spent:,}, which all layers at their cheapest widths cost")
    steps = [(name, below, above) for name, hull in hulls.items() for below, above in pairwise(hull)]
    for name, below, above in sorted(steps, key=lambda step: _slope(step[1], step[2])):
        if chosen[name] is below and spent + above.cost - below.cost <= budget:
            chosen[name], spent = above, spent + above.cost - below.cost
    return {name: option.bits for name, option in chosen.items()}


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options worth a thought, cheapest first: each step up costs more, errs less, and saves less error for its cost than the last."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.error, -option.bits)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(below: Option, above: Option) -> float:
    """Error that a step up takes away, for its cost: the more negative, the better."""
    return (above.error - below.error) / (above.cost - below.cost)


def with_bits(plan: Sequence[LayerPlan], bits: Mapping[str, int]) -> tuple[LayerPlan, ...]:
    """The plan with other widths of the weights."""
    return tuple(replace(layer, weights=replace(layer.weights, bits=bits[layer.name])) for layer in plan)


def patterns(names: Collection[str], others: Collection[str]) -> list[str]:
    """Globs and paths that match these layers and none of the others, a glob wherever it stands for two layers or more."""
    return list(_covering("", list(names), list(others)))


def _covering(prefix: str, names: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    if len(names) > 1 and not others and prefix:
        yield f"{prefix}*"
        return
    parts = dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in names)
    for part in parts:
        path, below = f"{prefix}{part}", f"{prefix}{part}."
        if path in names:
            yield path
        inside, outside = ([name for name in given if name.startswith(below)] for given in (names, others))
        if inside:
            yield from _covering(below, inside, outside)
