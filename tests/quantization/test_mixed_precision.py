"""Widths within a budget, against every combination there is; and patterns, against the names that they match.

Not here: where the errors come from (test_sensitivity.py).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise, product

import pytest

from pqcad_qat.errors import PlanError
from pqcad_qat.policy.layer_rules import LayerRule
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.mixed_precision import (
    Costs,
    Option,
    choices_by_size,
    choose_bits,
    limit_in_bytes,
    lower_hull,
    mixed_rules,
    patterns,
    with_bits,
)
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.stages.prepared import Prepared, prepare

WIDTHS = (2, 3, 4, 7)


def invented(seed: int) -> dict[str, list[Option]]:
    """Five layers of random sizes, whose errors fall by about 6 dB a bit, with some noise."""
    draw = random.Random(seed)
    layers = {}
    for name in "abcde":
        size, error = draw.randint(10, 99), draw.uniform(0.1, 10)
        layers[name] = [Option(bits, size * bits, error * draw.uniform(0.7, 1.4) * 4.0**-bits) for bits in WIDTHS]
    return layers


def total(options: Mapping[str, Sequence[Option]], bits: Mapping[str, int]) -> tuple[int, float]:
    """(cost, error) of a choice."""
    chosen = [option for name, found in options.items() for option in found if option.bits == bits[name]]
    return sum(option.cost for option in chosen), sum(option.error for option in chosen)


def best(options: Mapping[str, Sequence[Option]], budget: int) -> float:
    """The smallest error that any combination within the budget has."""
    choices = (dict(zip(options, widths, strict=True)) for widths in product(WIDTHS, repeat=len(options)))
    return min(error for cost, error in (total(options, choice) for choice in choices) if cost <= budget)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_keeps_to_its_budget_and_no_combination_of_its_cost_is_much_better(seed: int) -> None:
    options = invented(seed)
    least, most = (sum(width * found[0].cost // 2 for found in options.values()) for width in (2, 7))
    for budget in range(least, most + 40, 40):
        cost, error = total(options, choose_bits(options, budget))
        assert cost <= budget
        dearest = max(
            a.error - b.error
            for found in options.values()
            for a in found
            for b in found
            if a.bits < b.bits and b.cost > budget - cost
        )
        assert best(options, budget) <= error <= best(options, budget) + dearest


@pytest.mark.parametrize("seed", range(5))
def test_on_the_hull_the_choice_is_the_best_of_all(seed: int) -> None:
    options = invented(seed)
    slopes = sorted(
        (above.error - below.error) / (above.cost - below.cost)
        for hull in map(lower_hull, options.values())
        for below, above in pairwise(hull)
    )
    for slope in slopes:  # all steps up that are at least as steep: no budget is left over
        bits = {
            name: min(hull, key=lambda option: option.error - slope * 0.999999 * option.cost).bits
            for name, hull in ((name, lower_hull(found)) for name, found in options.items())
        }
        cost, error = total(options, bits)
        assert total(options, choose_bits(options, cost)) == (cost, pytest.approx(error))
        assert error == pytest.approx(best(options, cost))


def test_a_budget_for_everything_gives_every_layer_its_best_width() -> None:
    options = invented(0)
    assert choose_bits(options, 10**9) == {
        name: min(found, key=lambda option: option.error).bits for name, found in options.items()
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_choices_by_size_are_those_that_use_their_whole_budget(seed: int) -> None:
    options = invented(seed)
    choices = choices_by_size(options)
    costs = [total(options, choice)[0] for choice in choices]
    assert costs == sorted(set(costs))
    assert [choose_bits(options, cost) for cost in costs] == choices
    assert set(choices[0].values()) == {2}
    assert total(options, choices[-1])[1] == min(total(options, dict.fromkeys(options, width))[1] for width in WIDTHS)


def test_of_widths_that_cost_the_same_the_one_with_the_least_error_is_taken() -> None:
    """As 2 and 4 bits do, packed two a byte."""
    assert choose_bits({"a": [Option(2, 5, 0.3), Option(3, 5, 0.2), Option(4, 5, 0.1), Option(7, 9, 0.01)]}, 8) == {
        "a": 4
    }


def test_a_budget_too_small_is_refused_with_the_least_that_would_do() -> None:
    with pytest.raises(PlanError, match="got a budget of 9; allowed at least 11"):
        choose_bits({"a": [Option(2, 5, 1.0)], "b": [Option(2, 6, 1.0), Option(3, 9, 0.5)]}, 9)


def test_a_limit_is_a_share_or_megabytes() -> None:
    assert [limit_in_bytes(limit, 1000) for limit in ("0.25x", ".5MB", "2 MB")] == [250, 500_000, 2_000_000]


def test_costs_add_up() -> None:
    costs = Costs(100, 10, {"a": {4: 5, 8: 9}, "b": {4: 7, 8: 6}})
    assert (costs.least, costs.total({"a": 8, "b": 4}), costs.at([4]).least) == (10 + 5 + 6, 10 + 9 + 7, 10 + 5 + 7)


# ---- rules
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tiny_policy: Policy) -> Prepared:
    return prepare(tiny_policy)


def mixed(policy: Policy, prepared: Prepared, bits: Mapping[str, int]) -> tuple[tuple[LayerRule, ...], dict[str, int]]:
    """The rules for these widths, and the widths that they plan."""
    rules = mixed_rules(policy.quantization.layers, prepared.plan, list(quantizable_layers(prepared.split)), bits)
    planned = plan_layers(prepared.split, rules, policy.progressive.ladder, prepared.model.example)
    return rules, {layer.name: layer.weights.bits for layer in planned}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("own", [True, False])
def test_rules_plan_what_was_chosen(tiny_policy: Policy, prepared: Prepared, seed: int, own: bool) -> None:
    draw = random.Random(seed)
    bits = {layer.name: layer.weights.bits if own else draw.choice(WIDTHS) for layer in prepared.plan}
    rules, planned = mixed(tiny_policy, prepared, bits)
    assert planned == bits
    assert (rules == tiny_policy.quantization.layers) == own


def test_a_layers_ladder_ends_at_its_new_width(prepared: Prepared) -> None:
    own = {layer.name: layer.ladder for layer in prepared.plan}
    assert set(own.values()) == {(8, 4), (8, 7)}
    for layer in with_bits(prepared.plan, dict.fromkeys(own, 6)):
        assert (layer.weights.bits, layer.ladder) == (6, (8, 6) if own[layer.name][-1] == 4 else (8, 7, 6))


NAMES = [
    "conv_in",
    *(
        f"down.{block}.{layer}"
        for block in (0, 1, 10)
        for layer in ("conv1", "conv2", "attention.to_q", "attention.to_k")
    ),
    "conv_out",
]


@pytest.mark.parametrize("seed", range(20))
def test_patterns_match_their_layers_and_no_other(seed: int) -> None:
    wanted = random.Random(seed).sample(NAMES, seed % len(NAMES) + 1)
    found = patterns(wanted, [name for name in NAMES if name not in wanted])
    assert {name for name in NAMES if any(fnmatchcase(name, pattern) for pattern in found)} == set(wanted)
    assert len(found) <= len(wanted)


def test_patterns_are_globs_where_a_whole_block_is_meant() -> None:
    wanted = [name for name in NAMES if name.startswith(("down.1.", "down.0.attention"))]
    others = [name for name in NAMES if name not in wanted]
    assert patterns(wanted, others) == ["down.0.attention.*", "down.1.*"]
