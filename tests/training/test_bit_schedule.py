"""The callback of progressive quantization on a small quantized network.

Not here: the decision that it applies (test_transition_decision.py).
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from small_networks import Timeless, timeless
from torch import nn

from pqcad_qat.policy.layer_rules import InputQuantizer, LayerRule, WeightQuantizer, numbered
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import (
    blend_state,
    level_size,
    move_onto_levels,
    perturbation,
    quantized_weight,
    read_bits,
)
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.callback import StepReport, TrainState
from pqcad_qat.training.trainer import LoopSettings, new_state
from pqcad_qat.training.transition_decision import BitScheduleSettings

SETTINGS = BitScheduleSettings(momentum=0.5, perturbation=0.02, deadline=60)


def network(settings: BitScheduleSettings = SETTINGS) -> tuple[nn.Module, TrainState, MomentumBitSchedule]:
    torch.manual_seed(0)
    model = Timeless(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3))
    rule = LayerRule(
        match="type:Conv2d", weights=WeightQuantizer(bits=3, scale="learned"), inputs=InputQuantizer(bits=8)
    )
    example = timeless(torch.randn(2, 1, 8, 8))
    plan = plan_layers(model, numbered([rule]), [8, 4], example)
    quantize_model(model, plan)
    calibrate_ranges(model, [example])
    state = new_state(model, LoopSettings(steps=80, learning_rate=1e-3, ema=0.9), Accelerator(cpu=True))
    return model, state, MomentumBitSchedule(quantized_layers(model), plan, settings)


def walk(state: TrainState, schedule: MomentumBitSchedule, upto: int, loss: float = 1.0) -> None:
    while state.step < upto:
        schedule.before_step(state)
        state.step += 1
        schedule.after_step(state, StepReport(loss, {}, 0.0, 0.0, 8))


def widths(model: nn.Module) -> set[int]:
    return {read_bits(layer)[0] for layer in quantized_layers(model).values()}


def at_target(model: nn.Module) -> bool:
    return widths(model) == {3} and all(blend_state(layer) is None for layer in quantized_layers(model).values())


def test_every_layer_walks_its_ladder_at_the_pace_of_the_momentum() -> None:
    model, state, schedule = network()
    walk(state, schedule, SETTINGS.deadline)
    assert at_target(model)
    assert {(t.from_bits, t.to_bits) for t in schedule.transitions} == {(8, 4), (4, 3)}
    assert {t.cause for t in schedule.transitions} == {"momentum"}
    assert state.ema_since == max(t.step for t in schedule.transitions) < SETTINGS.deadline / 2


def test_no_step_changes_a_layers_weights_by_more_than_the_bound() -> None:
    model, state, schedule = network()
    layers = quantized_layers(model)
    weights = {name: quantized_weight(layer) for name, layer in layers.items()}
    norms = {name: float(weight.norm()) for name, weight in weights.items()}
    largest = 0.0
    while not at_target(model):
        walk(state, schedule, state.step + 1)
        after = {name: quantized_weight(layer) for name, layer in layers.items()}
        changes = [float((after[name] - weights[name]).norm()) / norms[name] for name in layers]
        assert max(changes) == pytest.approx(schedule.scalars()["weight_change"], rel=0.1)
        largest, weights = max(largest, *changes), after
    # a perturbation is relative to the weights before the transition, whose norm changes a little with the width
    assert largest == pytest.approx(SETTINGS.perturbation, rel=0.1)


def test_a_layer_takes_as_long_as_its_next_width_changes_it() -> None:
    model, state, schedule = network(BitScheduleSettings(0.0, 0.01, 1000))
    first = {name: perturbation(layer, 4) for name, layer in quantized_layers(model).items()}
    walk(state, schedule, 60)
    for transition in schedule.transitions:
        took = transition.step - transition.began + 1
        assert took == pytest.approx(transition.perturbation / 0.01, abs=1)
        if transition.from_bits == 8:
            assert transition.perturbation == first[transition.layer]


@pytest.mark.parametrize("deadline", [0, 1, 2, 7, 10, 40, 120])
@pytest.mark.parametrize("blends", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_every_layer_is_at_its_target_by_the_deadline(deadline: int, blends: bool, fixed: bool) -> None:
    model, state, schedule = network(BitScheduleSettings(0.9, 1e-6, deadline, blends, fixed))
    walk(state, schedule, max(0, deadline - 1))
    assert widths(model) != {3}
    walk(state, schedule, max(1, deadline))
    assert at_target(model)
    assert {t.cause for t in schedule.transitions} == {"fixed" if fixed else "deadline"}


def test_a_jump_waits_as_long_as_a_blend_would_take() -> None:
    (_, blending, blends), (model, jumping, jumps) = network(), network(BitScheduleSettings(0.5, 0.02, 60, False))
    walk(blending, blends, 60)
    walk(jumping, jumps, 3)
    assert all(blend_state(layer) is None for layer in quantized_layers(model).values())
    walk(jumping, jumps, 60)
    told = [
        [(t.step, t.layer, t.to_bits) for t in schedule.transitions if t.from_bits == 8] for schedule in (blends, jumps)
    ]
    assert told[0] == told[1]


def test_nothing_moves_while_transitions_are_held_and_then_the_deadline_is_made_up_for() -> None:
    model, state, schedule = network()
    state.held_until = SETTINGS.deadline + 5
    walk(state, schedule, state.held_until)
    assert schedule.transitions == []
    assert widths(model) == {8}
    walk(state, schedule, state.held_until + 1)
    assert [(t.step, t.to_bits, t.cause) for t in schedule.transitions] == [
        (state.held_until, bits, "deadline") for _ in range(2) for bits in (4, 3)
    ]
    assert at_target(model)


def test_parameters_stay_the_same_objects_through_all_transitions() -> None:
    model, state, schedule = network()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    walk(state, schedule, 41)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("blends", [True, False])
def test_a_schedule_resumed_in_the_middle_of_a_transition_goes_on_as_the_uninterrupted_one(blends: bool) -> None:
    settings = BitScheduleSettings(0.5, 0.02, 60, blends)
    whole, whole_state, whole_schedule = network(settings)
    walk(whole_state, whole_schedule, 60)

    first, first_state, first_schedule = network(settings)
    walk(first_state, first_schedule, 3)
    # a run that goes on with less time would have come to a sooner deadline
    second, second_state, second_schedule = network(replace(settings, deadline=5))
    second.load_state_dict(first.state_dict(), strict=True)
    second_schedule.load_state_dict(json.loads(json.dumps(first_schedule.state_dict())))
    second_state.step = first_state.step
    walk(second_state, second_schedule, 60)
    assert second_schedule.transitions == whole_schedule.transitions
    for one, other in zip(quantized_layers(whole).values(), quantized_layers(second).values(), strict=True):
        assert torch.equal(quantized_weight(one), quantized_weight(other))


def test_the_log_gets_the_pace_the_share_of_a_blend_and_each_layers_perturbation() -> None:
    model, state, schedule = network()
    walk(state, schedule, 3)
    logged = schedule.scalars()
    shares = [blend.share for layer in quantized_layers(model).values() if (blend := blend_state(layer))]
    assert logged["blend_lambda"] == pytest.approx(sum(shares) / len(shares))
    assert 0 < logged["pace"] < SETTINGS.perturbation
    assert {f"layer/{name}/perturbation" for name in quantized_layers(model)} <= set(logged)


def test_at_its_target_width_a_layer_gets_back_where_its_weights_lie_within_their_levels() -> None:
    model, state, schedule = network()
    layers = quantized_layers(model)
    within = {name: 0.3 * level_size(layer) * torch.randn_like(layer.weight).sign() for name, layer in layers.items()}
    moved = replace(schedule, within=within)
    for layer in layers.values():
        move_onto_levels(layer)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    while not at_target(model):
        assert all(
            torch.equal(layer.weight, before[name]) or read_bits(layer)[0] == 3 for name, layer in layers.items()
        )
        walk(state, moved, state.step + 1)
    for name, layer in layers.items():
        wanted, rounded = before[name] + within[name], quantized_weight(layer)
        assert not torch.equal(layer.weight, before[name])
        assert float(((layer.weight - rounded).abs() / level_size(layer)).max()) <= 0.5
        near = (wanted - rounded).abs() < 0.49 * level_size(layer)
        torch.testing.assert_close(layer.weight[near], wanted[near])
