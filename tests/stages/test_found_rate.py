"""The learning rate that a stage finds: the trials are those of the stage, leave it as it was, and are made once.

Not here: which rates are tried (tests/training/test_rate_search.py).
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_stage import Matching, batches, network
from tiny_runs import POLICIES, QUIET, tiny_overrides, without_images

from pqcad_qat.commands import run as pipeline
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import FIXED_BIT, PQ, PQ_DISTILLED, PQCAD
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.stages import found_rate, training_task
from pqcad_qat.stages.found_rate import RateTrials, rate_trials
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_records import TrainingRecord
from pqcad_qat.stages.training_task import ON_THE_WAY, hurry
from pqcad_qat.training.bit_schedule import MomentumBitSchedule
from pqcad_qat.training.held_out import HeldOutLoss
from pqcad_qat.training.rate_search import FEWEST_STEPS, RATES, TRIAL_STEPS, best
from pqcad_qat.training.stage_end import StageEnd
from pqcad_qat.training.stopping_rule import Budget
from pqcad_qat.training.transition_decision import BitScheduleSettings

SMOKE = POLICIES / "smoke.yaml"


def tried(model: torch.nn.Module, file: Path, stage_s: float | None = None) -> RateTrials:
    return rate_trials(
        load_policy(SMOKE).training,
        Console(quiet=True),
        model,
        Matching(quantized_layers(model)),
        stage=PQ,
        batches=batches,
        held_out=batches(10**6),
        file=file,
        stage_s=stage_s,
    )


def test_the_model_stays_as_it_was_and_what_was_tried_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, file = network(), tmp_path / "rates.json"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tried(model, file)
    trials = found.trials
    assert len(trials) >= 3
    assert found.step_s > 0
    assert all(trial.held_out is not None and math.isfinite(trial.held_out) for trial in trials)
    assert len({trial.held_out for trial in trials}) == len(trials)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(found_rate, "searched", None)
    assert tried(model, file) == found


def test_trials_are_short_where_the_clock_allows_few_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    steps = [tried(network(), tmp_path / f"{index}.json", stage_s).steps for index, stage_s in enumerate((1e-6, 1e6))]
    assert steps == [FEWEST_STEPS, TRIAL_STEPS]


def test_a_rate_that_breaks_a_model_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate far too high among the tried ones ends at a loss above the start's."""
    torch.manual_seed(0)
    monkeypatch.setattr("pqcad_qat.training.rate_search.RATES", (1e-4, 30.0))
    monkeypatch.setattr("pqcad_qat.training.rate_search.FIRST", 1)
    low, high = sorted(tried(network(), tmp_path / "rates.json").trials, key=lambda trial: trial.rate)
    assert low.held_out is not None
    assert high.held_out is None or high.held_out > low.held_out
    assert best((low, high)) == 1e-4


@pytest.mark.parametrize(
    ("seconds", "spent", "deadline"), [(None, 0, 100), (10_000, 0, 100), (200, 40, round(ON_THE_WAY * 80)), (10, 20, 1)]
)
def test_layers_move_faster_where_the_clock_allows_few_steps(seconds: float | None, spent: int, deadline: int) -> None:
    settings = BitScheduleSettings(momentum=0.9, perturbation=0.005, deadline=100)
    schedule = MomentumBitSchedule(layers={}, plan=(), settings=settings)
    held_out = HeldOutLoss({}, (), Budget(2_000, seconds))
    held_out.spend(spent)
    hurry(schedule, held_out, step_s=2.0)
    assert schedule.settings.deadline == deadline


def ended(path: Path, stage: str) -> StageEnd:
    record = RunFolder(path).read(stage, TrainingRecord)
    assert record is not None
    assert record.end is not None
    return record.end


@pytest.mark.long
@pytest.mark.slow
def test_the_stages_of_a_run_train_at_the_rate_that_they_found(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials are shorter than they are in use."""
    torch.set_num_threads(1)
    monkeypatch.setattr("pqcad_qat.training.rate_search.TRIAL_STEPS", 4)
    timed: list[float] = []
    monkeypatch.setattr(training_task, "hurry", lambda _schedule, _held_out, step_s: timed.append(step_s))
    overrides = (
        "training.learning_rate=auto",
        "progressive.steps=4",
        "distillation.steps=4",
        "evaluation.features=none",
        *QUIET,
        f"evaluation.variants=[{FIXED_BIT}, {PQ}, {PQ_DISTILLED}, {PQCAD}]",
    )
    printed = io.StringIO()
    policy = load_policy(SMOKE, tiny_overrides(tiny_folder, *overrides))
    with without_images():
        pipeline.run(policy, tmp_path, "command", Console(file=printed, width=500))
    pq, distilled = (ended(tmp_path, stage) for stage in (PQ, PQ_DISTILLED))
    for earlier, later in ((pq, FIXED_BIT), (distilled, PQCAD)):
        assert ended(tmp_path, later).learning_rate == earlier.learning_rate
        assert ended(tmp_path, later).rate_trials == ()
    assert len(timed) == 1  # the stage whose layers move
    assert timed[0] > 0
    for stage, end in ((PQ, pq), (PQ_DISTILLED, distilled)):
        assert end.learning_rate == best(end.rate_trials)
        assert end.learning_rate in RATES
        rows = (tmp_path / "logs" / f"{stage}.jsonl").read_text().splitlines()
        assert json.loads(rows[0])["learning_rate"] == pytest.approx(end.learning_rate)
        assert f"{stage} ended" in printed.getvalue()
    assert printed.getvalue().count("Its learning rate is ") == 2
