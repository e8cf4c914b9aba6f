"""The callback of progressive quantization on a small quantized network.

Not here: the decision that it applies (test_transition_decision.py).
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from small_networks import Timeless, timeless
from torch import nn

from pqcad_qat.policy.layer_rules import InputQuantizer, LayerRule, WeightQuantizer, numbered
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import blend_state, quantized_weight, read_bits
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.callback import StepReport, TrainState
from pqcad_qat.training.trainer import LoopSettings, new_state
from pqcad_qat.training.transition_decision import (
    BitScheduleSettings,
    rungs,
)


def test_the_rungs_of_a_plan_are_all_widths_that_layers_go_down_to() -> None:
    _, _, schedule = network()
    assert rungs(schedule.plan) == (4, 3)


def network() -> tuple[nn.Module, TrainState, MomentumBitSchedule]:
    torch.manual_seed(0)
    model = Timeless(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3))
    rule = LayerRule(
        match="type:Conv2d", weights=WeightQuantizer(bits=3, scale="learned"), inputs=InputQuantizer(bits=8)
    )
    example = timeless(torch.randn(2, 1, 8, 8))
    plan = plan_layers(model, numbered([rule]), [8, 4], example)
    quantize_model(model, plan)
    calibrate_ranges(model, [example])
    settings = BitScheduleSettings(
        momentum=0.5, plateau=0.01, perturbation=0.5, layers_per_transition=0.5, deadline=40, rungs=(4, 3)
    )
    state = new_state(model, LoopSettings(steps=60, learning_rate=1e-3, ema=0.9), Accelerator(cpu=True))
    return model, state, MomentumBitSchedule(quantized_layers(model), plan, settings)


def walk(state: TrainState, schedule: MomentumBitSchedule, upto: int, loss: float = 1.0) -> None:
    while state.step < upto:
        schedule.before_step(state)
        state.step += 1
        schedule.after_step(state, StepReport(loss, {}, 0.0, 0.0, 8))


def test_every_layer_walks_its_ladder_and_is_at_its_target_at_the_deadline() -> None:
    model, state, schedule = network()
    walk(state, schedule, 41)
    for quantized in quantized_layers(model).values():
        assert read_bits(quantized)[0] == 3
        assert blend_state(quantized) is None
    assert {(t.from_bits, t.to_bits) for t in schedule.transitions} == {(8, 4), (4, 3)}
    assert all(t.cause == "plateau" for t in schedule.transitions)
    assert state.ema_since > 0


@pytest.mark.parametrize("deadline", [1, 2, 7, 10, 40, 120, 1000])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95, 0.999])
def test_however_long_the_blend_every_layer_is_at_its_target_by_the_deadline(deadline: int, momentum: float) -> None:
    settings = BitScheduleSettings(momentum, 0.01, 0.3, 0.5, deadline, (4, 3))
    assert settings.blend_steps <= max(1, deadline // 4)
    assert settings.last_call >= 0
    model, state, _ = network()
    plan = [quantized.plan for quantized in quantized_layers(model).values()]
    schedule = MomentumBitSchedule(quantized_layers(model), plan, settings)
    while state.step <= deadline:
        walk(state, schedule, state.step + 1, loss=1.2 ** min(state.step, 99))
    assert {read_bits(quantized)[0] for quantized in quantized_layers(model).values()} == {3}
    assert all(blend_state(quantized) is None for quantized in quantized_layers(model).values())


def test_a_loss_that_keeps_falling_is_called_by_the_deadline() -> None:
    model, state, schedule = network()
    while state.step < 41:
        walk(state, schedule, state.step + 1, loss=0.8**state.step)
    assert [(t.from_bits, t.to_bits, t.cause) for t in schedule.transitions] == [(8, 3, "deadline")] * 2
    assert {read_bits(quantized)[0] for quantized in quantized_layers(model).values()} == {3}


def test_nothing_begins_while_transitions_are_held_and_then_the_deadline_is_made_up_for() -> None:
    model, state, schedule = network()
    state.held_until = 45
    walk(state, schedule, 45)
    assert schedule.transitions == []
    walk(state, schedule, 45 + schedule.settings.blend_steps + 1)
    assert [(t.step, t.from_bits, t.to_bits, t.cause) for t in schedule.transitions] == [(45, 8, 3, "deadline")] * 2
    assert {read_bits(quantized)[0] for quantized in quantized_layers(model).values()} == {3}


def test_parameters_stay_the_same_objects_through_all_transitions() -> None:
    model, state, schedule = network()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    walk(state, schedule, 41)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_a_schedule_resumed_in_the_middle_of_a_blend_goes_on_as_the_uninterrupted_one() -> None:
    whole, whole_state, whole_schedule = network()
    walk(whole_state, whole_schedule, 41)

    first, first_state, first_schedule = network()
    while not any(blend_state(quantized) for quantized in quantized_layers(first).values()):
        walk(first_state, first_schedule, first_state.step + 1)
    second, second_state, second_schedule = network()
    second.load_state_dict(first.state_dict(), strict=True)
    second_schedule.load_state_dict(first_schedule.state_dict())
    second_state.step = first_state.step
    walk(second_state, second_schedule, 41)
    assert second_schedule.transitions == whole_schedule.transitions
    for one, other in zip(quantized_layers(whole).values(), quantized_layers(second).values(), strict=True):
        assert torch.equal(quantized_weight(one), quantized_weight(other))


def test_the_log_gets_the_momenta_the_share_of_a_blend_and_each_layers_perturbation() -> None:
    model, state, schedule = network()
    while not any(blend_state(layer) for layer in quantized_layers(model).values()):
        walk(state, schedule, state.step + 1)
    walk(state, schedule, state.step + 2)
    found = schedule.scalars()
    shares = [blend.share for layer in quantized_layers(model).values() if (blend := blend_state(layer))]
    assert found["blend_lambda"] == sum(shares) / len(shares) > 0
    assert {f"layer/{name}/perturbation" for name in quantized_layers(model)} <= set(found)
