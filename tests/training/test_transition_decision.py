"""The decision of progressive quantization, without a model: its moving averages, its transitions and its blends.

Not here: the callback that applies it (test_bit_schedule.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pqcad_qat.training.transition_decision import (
    BLEND_ENDS_AT,
    BitScheduleSettings,
    LayerStatus,
    LossMomentum,
    Momentum,
    decide,
    next_lambda,
)

SETTINGS = BitScheduleSettings(
    momentum=0.9, plateau=0.01, perturbation=0.3, layers_per_transition=0.5, deadline=120, rungs=(6, 4)
)


def layer(
    name: str, perturbation: float = 0.1, bits: int = 8, rungs: tuple[int, ...] = (6, 4), moving: bool = False
) -> LayerStatus:
    return LayerStatus(name, bits, rungs, perturbation, moving)


def test_momentum_is_adams_bias_corrected_average() -> None:
    momentum = Momentum(0.9)
    assert momentum.value is None
    values = [3.0, -1.0, 2.0]
    for value in values:
        momentum = momentum.updated(value)
    weights = [0.1 * 0.9 ** (2 - i) for i in range(3)]
    assert momentum.value == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))


def test_loss_momentum_of_a_geometric_loss_tends_to_its_rate() -> None:
    momentum = LossMomentum.fresh(0.9)
    for n in range(400):
        momentum = momentum.updated(0.97**n)
    assert momentum.improvement.value == pytest.approx(0.03, rel=1e-3)


def test_loss_momentum_of_a_constant_loss_is_zero() -> None:
    momentum = LossMomentum.fresh(0.9)
    for _ in range(5):
        momentum = momentum.updated(2.0)
    assert momentum.improvement.value == pytest.approx(0.0, abs=1e-12)


def test_the_least_perturbed_layers_go_first_as_many_as_the_share_allows() -> None:
    layers = [layer("a", 0.2), layer("b", 0.05), layer("c", 0.1), layer("d", 0.15)]
    begun = decide(50, SETTINGS, 0.001, 99, layers=layers)
    assert [(t.layer, t.from_bits, t.to_bits, t.cause) for t in begun] == [
        ("b", 8, 6, "plateau"),
        ("c", 8, 6, "plateau"),
    ]
    assert begun[0].loss_momentum == 0.001
    assert begun[0].perturbation == 0.05


def test_a_layer_over_the_bound_waits() -> None:
    begun = decide(50, SETTINGS, 0.001, 99, layers=[layer("a", 0.4), layer("b", 0.29)])
    assert [t.layer for t in begun] == ["b"]


@pytest.mark.parametrize(
    ("momentum", "observed", "moving"),
    [(0.02, 99, False), (None, 99, False), (0.001, 3, False), (0.001, 99, True)],
    ids=["still improving", "nothing observed", "too early", "another is moving"],
)
def test_nothing_begins_while(momentum: float | None, observed: int, moving: bool) -> None:
    assert decide(50, SETTINGS, momentum, observed, layers=[layer("a"), layer("b", moving=moving)]) == ()


def test_the_deadline_sends_every_waiting_layer_to_its_target_whatever_its_perturbation() -> None:
    layers = [layer("a", 9.0), layer("b", rungs=(), bits=4), layer("c", bits=6, rungs=(4,)), layer("d", moving=True)]
    begun = decide(SETTINGS.last_call, SETTINGS, 0.5, 0, layers=layers)
    assert [(t.layer, t.from_bits, t.to_bits, t.cause) for t in begun] == [
        ("a", 8, 4, "deadline"),
        ("c", 6, 4, "deadline"),
    ]


def test_lambda_follows_its_closed_form_and_takes_blend_steps() -> None:
    lam, steps = 0.0, 0
    while lam < BLEND_ENDS_AT:
        lam, steps = next_lambda(lam, 0, SETTINGS, None), steps + 1
        assert lam == pytest.approx(1 - 0.9**steps)
    assert steps == SETTINGS.blend_steps == math.ceil(math.log(0.05) / math.log(0.9))


def test_lambda_pauses_while_training_gets_worse_but_not_once_the_deadline_is_near() -> None:
    assert next_lambda(0.3, 10, SETTINGS, -0.05) == 0.3
    assert next_lambda(0.3, 10, SETTINGS, -0.005) > 0.3
    assert next_lambda(0.3, SETTINGS.late_from, SETTINGS, -0.05) > 0.3


def test_when_it_is_late_a_transition_goes_straight_to_the_target() -> None:
    early, late = (
        decide(step, SETTINGS, 0.001, 99, layers=[layer("a")])[0]
        for step in (SETTINGS.late_from - 1, SETTINGS.late_from)
    )
    assert (early.to_bits, late.to_bits, late.cause) == (6, 4, "plateau")


def test_a_blend_takes_as_long_as_the_momentum_says_up_to_half_of_a_rungs_time() -> None:
    slow = replace(SETTINGS, momentum=0.95)
    assert [replace(slow, rungs=rungs).blend_steps for rungs in ((2,), (4, 2), (6, 4, 2))] == [59, 30, 20]
    assert replace(SETTINGS, rungs=(2,)).blend_steps == 29


def test_jumps_take_no_steps() -> None:
    settings = BitScheduleSettings(0.9, 0.01, 0.3, 0.5, 100, (6, 4), blends=False)
    assert settings.blend_steps == 0
    assert decide(99, settings, 0.5, 0, layers=[layer("a")]) == ()
    assert decide(100, settings, 0.5, 0, layers=[layer("a")])[0].to_bits == 4


FIXED = replace(SETTINGS, fixed=True)


def test_a_fixed_schedule_moves_all_layers_at_evenly_spread_steps_whatever_the_momenta_say() -> None:
    half = math.ceil(FIXED.last_call / 2)
    layers = [layer("a", 9.0), layer("b", rungs=(6,)), layer("c", rungs=(), bits=8)]
    assert decide(half - 1, FIXED, 0.0, 99, layers=layers) == ()
    begun = decide(half, FIXED, 0.5, 0, layers=layers)
    assert [(t.layer, t.from_bits, t.to_bits, t.cause) for t in begun] == [("a", 8, 6, "fixed"), ("b", 8, 6, "fixed")]
    assert decide(FIXED.last_call - 1, FIXED, 0.0, 99, layers=[layer("a", bits=6, rungs=(4,))]) == ()
    assert decide(FIXED.last_call, FIXED, None, 0, layers=[layer("a", bits=6, rungs=(4,))])[0].to_bits == 4


def test_a_fixed_schedule_never_pauses_a_blend() -> None:
    assert next_lambda(0.3, 10, FIXED, -0.05) == pytest.approx(0.9 * 0.3 + 0.1)


@pytest.mark.parametrize("deadline", [1, 2, 7, 10, 40, 120])
@pytest.mark.parametrize("blends", [True, False])
@pytest.mark.parametrize("widths", [(4,), (6, 4), (7, 6, 5, 4, 3, 2)])
def test_a_fixed_schedule_is_at_its_target_by_the_deadline(
    deadline: int, blends: bool, widths: tuple[int, ...]
) -> None:
    settings = BitScheduleSettings(0.9, 0.01, 0.3, 0.5, deadline, widths, blends, fixed=True)
    bits, ends, moves = 8, -1, []
    for step in range(deadline + 1):
        for transition in decide(
            step,
            settings,
            None,
            0,
            layers=[layer("a", bits=bits, rungs=tuple(w for w in widths if w < bits), moving=step < ends)],
        ):
            bits, ends = transition.to_bits, step + settings.blend_steps
            moves.append(step)
    assert bits == widths[-1]
    assert ends <= deadline
    if deadline >= 40:
        assert len(moves) == len(widths)
        gaps = [after - before for before, after in zip([0, *moves], moves, strict=False)]
        assert max(gaps) - min(gaps) <= 1
