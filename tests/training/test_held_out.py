"""Held-out states: which they are, that measuring changes nothing, when they end a stage, and which weights they keep.

Not here: the rule of the end alone (test_stopping_rule.py), and whole runs (tests/stages).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from small_stage import Matching, batches, full_precision, images, network
from torch import Tensor, nn

from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.quantization.layer_state import QuantizedLayer, blend_state, read_bits
from pqcad_qat.quantization.trained_part import changing_state
from pqcad_qat.training import held_out as held_out_module
from pqcad_qat.training import stopping_rule
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.callback import StepReport, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.held_out import (
    STATES,
    WORSE,
    Choice,
    HeldOutLoss,
    ImageFigures,
    best_weights,
    divided,
    fixed_states,
    measured,
    nearest,
)
from pqcad_qat.training.metrics_log import read_metrics
from pqcad_qat.training.rate_search import TRIAL_STEPS
from pqcad_qat.training.stage_end import Kept
from pqcad_qat.training.stopping_rule import EVERY, SHORTEST_DECAY, Budget
from pqcad_qat.training.trainer import LoopSettings, new_state
from pqcad_qat.training.training_stage import StageSettings, train_stage
from pqcad_qat.training.transition_decision import BitScheduleSettings

CAP = 300
BUDGET = Budget(CAP)


@pytest.fixture(autouse=True)
def early_plateau(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network improves for long; let its stages end nevertheless."""
    monkeypatch.setattr(stopping_rule, "PLATEAU", 0.2)


class KilledError(Exception):
    """Stands for a process that ends in the middle of a step."""


@pytest.mark.parametrize("trajectories", [2, 3, 8, 15, 16, 128])
def test_the_last_eighth_is_held_out_and_nothing_is_in_both_parts(trajectories: int) -> None:
    trained, held_out = divided(trajectories)
    rows = list(range(trajectories))
    assert rows[trained] + rows[held_out] == rows
    assert len(rows[held_out]) == max(1, trajectories // 8)


@pytest.mark.parametrize(("trajectories", "steps"), [(1, 1), (1, 20), (3, 4), (16, 20), (2, 10)])
def test_fixed_states_are_all_different_and_spread_over_trajectories_and_times(trajectories: int, steps: int) -> None:
    rows, columns = fixed_states(trajectories, steps)
    assert len(rows) == min(STATES, trajectories * steps)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows)
    for found, count in ((rows, trajectories), (columns, steps)):
        uses = torch.bincount(found, minlength=count)
        assert int(uses.max() - uses.min()) <= 1


def held_out_loss(
    layers: Mapping[str, QuantizedLayer],
    loss: Matching,
    budget: Budget,
    automatic: bool,
    best_file: Path | None = None,
) -> HeldOutLoss:
    def settled() -> bool:
        return all(read_bits(layer)[0] == 4 and blend_state(layer) is None for layer in layers.values())

    fixed = {name: value[:6] for name, value in batches(10**6).items()}
    return HeldOutLoss(fixed, [loss], budget, automatic, settled, best_file)


def stage(
    folder: Path, until: int = -1, budget: Budget = BUDGET, *, spent: float = 0.0
) -> tuple[TrainState, HeldOutLoss]:
    """An automatic stage of progressive quantization that dies before step `until`."""
    model = network()
    layers = quantized_layers(model)

    def die(step: int, _layers: object) -> None:
        if step == until:
            raise KilledError

    loss = Matching(layers, die)
    schedule = MomentumBitSchedule(
        layers, [layer.plan for layer in layers.values()], BitScheduleSettings(0.5, 0.002, 20)
    )
    measures = held_out_loss(layers, loss, budget, automatic=True, best_file=folder / "best.safetensors")
    measures.spend(spent)
    loop = LoopSettings(budget.steps, learning_rate=1e-3, warmup=20, shape="open", ema=0.9)
    checkpoints = CheckpointFolder(folder / "checkpoints", every=4)
    settings = StageSettings("toy", loop, "fp32", checkpoints, folder / "logs", "rollback")
    state = train_stage(model, [schedule, loss, measures], batches, settings, console=Console(quiet=True))
    return state, measures


def test_a_stage_ends_by_itself_once_its_layers_are_at_their_targets_and_logs_the_held_out_loss(tmp_path: Path) -> None:
    state, measures = stage(tmp_path)
    assert state.ending is not None
    assert state.ending.cause == "plateau"
    assert state.step == state.ending.last < CAP
    assert measures.settled()
    rows = read_metrics(tmp_path / "logs" / "toy.jsonl")
    assert [row["step"] for row in rows if "held_out" in row] == [*range(EVERY, state.step + 1, EVERY)] + (
        [state.step] if state.step % EVERY else []
    )
    rates = [row["learning_rate"] for row in rows]
    assert rates[:20] == sorted(rates[:20])
    steps = range(20, state.ending.decay_from)
    assert rates[20 : state.ending.decay_from] == pytest.approx(
        [1e-3 * (TRIAL_STEPS / (step + 1)) ** 0.5 for step in steps]
    )
    decay = rates[state.ending.decay_from :]
    assert decay == sorted(decay, reverse=True)
    assert decay[-1] < 0.02 * 1e-3


@pytest.mark.parametrize(
    "phase", ["walk", "decay", *(pytest.param(phase, marks=pytest.mark.long) for phase in ("warm-up", "hold", "end"))]
)
def test_a_stage_that_is_killed_in_any_phase_and_resumed_has_the_same_bits(phase: str, tmp_path: Path) -> None:
    whole, _ = stage(tmp_path / "whole")
    assert whole.ending is not None
    start, last = whole.ending.decay_from, whole.ending.last
    until = {"warm-up": 6, "walk": 15, "hold": start - 1, "decay": start + 7, "end": last - 1}[phase]
    with pytest.raises(KilledError):
        stage(tmp_path / "cut", until)
    resumed, _ = stage(tmp_path / "cut")
    assert resumed.ending == whole.ending
    assert whole.ema is not None
    assert resumed.ema is not None
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert all(torch.equal(resumed.ema[name], value) for name, value in whole.ema.items())
    best = [(tmp_path / way / "best.safetensors").read_bytes() for way in ("whole", "cut")]
    assert best[0] == best[1]
    logs = [(tmp_path / way / "logs" / "toy.jsonl").read_text() for way in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_stage_keeps_to_its_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = stage(tmp_path / "steps", budget=Budget(45))
    assert state.ending is not None
    assert (state.step, state.ending.cause) == (45, "max_steps")
    clock = iter(range(10**6))
    monkeypatch.setattr(held_out_module, "monotonic", lambda: float(next(clock)))
    state, _ = stage(tmp_path / "seconds", budget=Budget(CAP, seconds=0.5))
    assert state.ending is not None
    assert (state.ending.cause, state.step < CAP) == ("minutes", True)


def test_trials_before_a_stage_cost_it_their_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for spent in (0.0, 500.0):
        clock = iter(range(10**6))
        monkeypatch.setattr(held_out_module, "monotonic", lambda clock=clock: float(next(clock)))
        state, _ = stage(tmp_path / str(spent), budget=Budget(CAP, seconds=30.0 + spent), spent=spent)
        assert state.ending is not None
        assert state.ending.cause == "minutes"
        steps.append(state.step)
    assert steps[0] == steps[1] > SHORTEST_DECAY


def test_the_time_of_a_stage_goes_on_where_a_checkpoint_left_it() -> None:
    measures = held_out_loss({}, Matching({}), Budget(CAP), automatic=True)
    measures.load_state_dict({**measures.state_dict(), "seconds": 100.0})
    assert measures.seconds == 100.0
    measures.load_state_dict({**measures.state_dict(), "seconds": 3.0})  # an earlier checkpoint: the time is spent
    assert measures.seconds == 100.0
    saved = {**measures.state_dict(), "seconds": 130.0, "before": 40.0}
    again = held_out_loss({}, Matching({}), Budget(CAP), automatic=True)
    again.spend(1.0)  # what was tried is read back
    again.load_state_dict(saved)
    assert (again.seconds, again.state_dict()["before"]) == (130.0, 40.0)


def prepared(ema: float = 0.9) -> tuple[TrainState, Matching]:
    model = network()
    state = new_state(model, LoopSettings(10, learning_rate=1e-3, ema=ema), Accelerator(cpu=True))
    return state, Matching(quantized_layers(model))


def test_measuring_changes_neither_weights_nor_modes_nor_random_numbers() -> None:
    state, loss = prepared()
    state.model.train()
    next(state.model.children()).eval()
    batch = batches(0)
    before, modes, dice = (
        changing_state(state.model, ()),
        [m.training for m in state.model.modules()],
        torch.get_rng_state(),
    )
    value = measured(state, batch, [loss])
    assert value == measured(state, batch, [loss])
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert [module.training for module in state.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), dice)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    with torch.no_grad():
        assert value == pytest.approx(float(loss.loss_terms(state, batch)["squared"]), rel=1e-5)


def test_many_states_are_measured_as_their_mean() -> None:
    state, loss = prepared()
    parts = [batches(seed) for seed in range(5)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values = [measured(state, part, [loss]) for part in parts]
    assert measured(state, whole, [loss]) == pytest.approx(sum(values) / len(values), rel=1e-5)


def shifted(weights: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: value + by if name.endswith(".bias") else value for name, value in weights.items()}


def best(
    state: TrainState, start: dict[str, Tensor], loss: Matching, on_the_way: Mapping[str, Tensor] | None = None
) -> Choice:
    def figures(model: nn.Module) -> ImageFigures:
        with torch.no_grad():
            error = float((model(images(7)) - full_precision(images(7))).square().mean())
        return ImageFigures(-error, error)

    return best_weights(state, start, [loss], held_out=batches(1), trained=batches(2), figures=figures, best=on_the_way)


def test_the_best_weights_of_a_stage_outlive_a_loss_that_rises_late(tmp_path: Path) -> None:
    state, loss = prepared(ema=0.0)
    measures = HeldOutLoss(batches(1), [loss], Budget(CAP), best_file=tmp_path / "best.safetensors")
    assert measures.best is None
    good = changing_state(state.model, ())
    for step, by in ((EVERY, 3.0), (2 * EVERY, 0.0), (3 * EVERY, 5.0)):
        state.model.load_state_dict(shifted(good, by))
        state.step = step
        measures.after_step(state, StepReport(0.0, {}, 0.0, 0.0, 1))
    assert measures.best is not None
    assert all(torch.equal(value, good[name]) for name, value in measures.best.items())
    assert best(state, shifted(good, 4.0), loss, measures.best).kept == "best"
    assert all(torch.equal(value, good[name]) for name, value in state.model.state_dict().items())


def test_no_best_weights_are_kept_while_widths_change(tmp_path: Path) -> None:
    state, loss = prepared()
    measures = HeldOutLoss(batches(1), [loss], Budget(CAP), settled=lambda: False, best_file=tmp_path / "best")
    state.step = EVERY
    measures.after_step(state, StepReport(0.0, {}, 0.0, 0.0, 1))
    assert measures.best is None


@pytest.mark.parametrize("wanted", ["average", "last", "start"])
def test_the_weights_with_the_best_held_out_images_are_kept(wanted: str) -> None:
    state, loss = prepared()
    good = changing_state(state.model, ())
    shifts = {kind: 0.0 if kind == wanted else 3.0 for kind in ("average", "last", "start")}
    assert state.ema is not None
    state.ema = {**state.ema, **{n: v for n, v in shifted(good, shifts["average"]).items() if n in state.ema}}
    state.model.load_state_dict(shifted(good, shifts["last"]))
    start = shifted(good, shifts["start"])
    choice = best(state, start, loss)
    assert choice.kept == wanted
    assert choice.held_out[wanted] == min(choice.held_out.values())
    assert set(choice.images) == set(choice.trained) == {"average", "last", "start"}
    assert all(torch.equal(value, good[name]) for name, value in state.model.state_dict().items())


def test_equal_weights_are_called_the_average_and_what_is_not_finite_is_never_kept() -> None:
    state, loss = prepared()
    start = changing_state(state.model, ())
    assert best(state, start, loss).kept == "average"
    assert state.ema is not None
    state.ema = {name: value * float("nan") for name, value in state.ema.items()}
    choice = best(state, start, loss)
    assert choice.kept == "last"
    assert choice.images["average"] is None


@pytest.mark.parametrize(
    ("average", "last", "start", "kept"),
    [
        ((31.0, 1.0), (30.0, 1.0), (20.0, 1.0), "average"),
        ((31.0, WORSE + 0.01), (30.0, WORSE), (20.0, 1.0), "last"),
        ((31.0, 2.0), (30.0, 2.0), (20.0, 1.0), "start"),
        ((31.0, 2.0), (30.0, math.nan), (20.0, 2.0), "average"),
        ((31.0, math.nan), None, (math.nan, math.nan), "average"),
        (None, (12.0, 3.0), None, "last"),
        (None, None, None, "average"),
    ],
)
def test_images_are_chosen_one_by_one_unless_as_a_set_they_have_moved_away(
    average: tuple[float, float] | None,
    last: tuple[float, float] | None,
    start: tuple[float, float] | None,
    kept: Kept,
) -> None:
    found: dict[Kept, tuple[float, float] | None] = {"average": average, "last": last, "start": start}
    assert nearest({kind: None if pair is None else ImageFigures(*pair) for kind, pair in found.items()}) == kept
