"""What the stages that train are built with, the states that they hold out, and what they keep.

Not here: training itself (tests/training), or what these stages leave (test_run.py).
"""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import POLICIES, QUIET, SCHEDULER, FinishedRun, tiny_overrides, without_images, without_page
from torch import nn

from pqcad_qat.commands import run as pipeline
from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.errors import InterruptedByUserError
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.training_sections import TrainingPolicy
from pqcad_qat.policy.variants import FIXED_BIT, FP32, PQ, PQCAD, PTQ
from pqcad_qat.report.report_files import read_record
from pqcad_qat.sampling.trajectory import noise_schedule
from pqcad_qat.stages.prepared import prepare
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_records import TrainingRecord
from pqcad_qat.stages.train import _shown, distilled_states, matched_states, teach, whole_batch
from pqcad_qat.stages.trained_files import WEIGHTS
from pqcad_qat.training import stopping_rule
from pqcad_qat.training.distillation import DistillationSet
from pqcad_qat.training.stage_end import StageEnd

SMOKE = POLICIES / "smoke.yaml"


def test_a_step_learns_from_the_accumulated_batches_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingPolicy(batch_size=4, gradient_accumulation=3)
    assert whole_batch(training) == 12
    monkeypatch.setattr("pqcad_qat.stages.train.process_count", lambda: 2)
    assert whole_batch(training) == 24


def numbered(trajectories: int, steps: int) -> CalibrationSet:
    """A set whose every state and prediction is the number of its trajectory."""
    rows = torch.arange(trajectories, dtype=torch.float32).reshape(-1, 1, 1, 1, 1)
    states = rows.expand(trajectories, steps + 1, 1, 2, 2)
    return CalibrationSet(states, states[:, 1:], tuple(range(steps, 0, -1)), {"label": torch.arange(trajectories)})


@pytest.mark.parametrize("distilled", [False, True])
def test_a_trajectory_that_is_held_out_is_in_no_training_batch(distilled: bool) -> None:
    calibration = numbered(16, 4)
    policy = load_policy(SMOKE)
    if distilled:
        flat = calibration.states[:, 1:]
        targets = DistillationSet(flat, flat, flat, torch.tensor(calibration.timesteps), torch.ones(4))
        batches, held_out, trained = distilled_states(policy, targets, calibration)
    else:
        batches, held_out, trained = matched_states(policy, calibration, ())
    for batch, rows in [(held_out, {14, 15}), (trained, set(range(14)))]:
        assert set(batch["x_t"][:, 0, 0, 0].int().tolist()) == rows
        assert set(batch["condition.label"].tolist()) == rows
        assert set(batch["t"].tolist()) == {1, 2, 3, 4}
    seen = {int(row) for step in range(60) for row in batches(step)["x_t"][:, 0, 0, 0]}
    assert seen == set(range(14))
    assert {int(row) for step in range(60) for row in batches(step)["condition.label"]} == seen


def test_pq_and_its_control_are_given_the_model_of_ptq(tiny_run: FinishedRun) -> None:
    ends = [RunFolder(tiny_run.path).read_always(name, TrainingRecord).end for name in (PQ, FIXED_BIT)]
    losses = [end.held_out["start"] for end in ends if end is not None]
    assert len(losses) == 2
    assert losses[0] == losses[1] is not None


def test_a_checkpoint_of_a_run_that_shows_images_fits_one_that_does_not(tiny_folder: Path, tmp_path: Path) -> None:
    """The callbacks that have a place in it are the same."""
    names = []
    for every in (0, 4):
        policy = load_policy(SMOKE, tiny_overrides(tiny_folder, f"training.samples_every={every}"))
        prepared = prepare(policy)
        callbacks = _shown(policy, prepared, RunFolder(tmp_path), prepared.split, name=PQ)
        names.append([callback.name for callback in callbacks])
    assert names[0] == names[1]


def test_the_teacher_is_guided_as_its_images_are(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its targets are what the student learns from, so they are those of the sampler's guidance."""
    scales: list[float] = []

    def recorded(*_: object, guidance_scale: float, **__: object) -> None:
        scales.append(guidance_scale)
        raise InterruptedByUserError("enough")

    stand_ins = {"distillation_set": recorded, "step_costs": lambda *_, **__: ()}
    for name, stand_in in {**stand_ins, "on_accelerator": nullcontext, "frozen_weights": nullcontext}.items():
        monkeypatch.setattr(f"pqcad_qat.stages.train.{name}", stand_in)
    models: Any = SimpleNamespace(of=lambda _stage: nn.Identity())
    prepared: Any = SimpleNamespace(schedule=noise_schedule(SCHEDULER))
    for scale in (1.0, 2.5):
        policy = load_policy(SMOKE, tiny_overrides(tiny_folder, f"sampler.guidance_scale={scale}"))
        with pytest.raises(InterruptedByUserError):
            teach(policy, prepared, RunFolder(tmp_path), Console(quiet=True), calibration=models, models=models)
    assert scales == [1.0, 2.5]


def ended(path: Path, stage: str) -> StageEnd:
    record = RunFolder(path).read(stage, TrainingRecord)
    assert record is not None
    assert record.end is not None
    return record.end


def run(model: Path, path: Path, *overrides: str) -> str:
    torch.set_num_threads(1)
    printed = io.StringIO()
    few = ("evaluation.features=none", "evaluation.images=2", *QUIET)
    policy = load_policy(SMOKE, tiny_overrides(model, *few, *overrides))
    pipeline.run(policy, path, "command", Console(file=printed, width=300))
    return printed.getvalue()


@pytest.mark.long
def test_a_stage_that_training_makes_worse_returns_what_it_was_given(tiny_folder: Path, tmp_path: Path) -> None:
    harmful = ("training.learning_rate=0.002", "progressive.steps=5")
    with without_page():
        printed = run(tiny_folder, tmp_path, *harmful, f"evaluation.variants=[{FP32}, {PTQ}, {FIXED_BIT}, {PQ}]")
    for stage in (FIXED_BIT, PQ):
        end = ended(tmp_path, stage)
        assert end.kept == "start", stage
        assert f"{stage} ended after 5 steps" in printed
    weights = {name: load_file(tmp_path / "models" / f"{name}.safetensors") for name in (FIXED_BIT, PQ)}
    for name, value in weights[PQ].items():
        assert torch.equal(weights[FIXED_BIT][name], value), name
    images = {name: load_file(tmp_path / "samples" / f"{name}.safetensors")["images"] for name in (PTQ, FIXED_BIT, PQ)}
    assert torch.equal(images[FIXED_BIT], images[PTQ])
    assert torch.equal(images[PQ], images[PTQ])


@pytest.mark.long
def test_stages_that_find_their_steps_end_and_the_control_takes_as_many(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate may decay in half as many steps as in use, so that fewer are enough for a stage that holds it before."""
    monkeypatch.setattr(stopping_rule, "SHORTEST_DECAY", stopping_rule.SHORTEST_DECAY // 2)
    auto = ("progressive.steps=auto", "distillation.steps=auto", "training.max_steps=20", "training.learning_rate=1e-3")
    run(tiny_folder, tmp_path, *auto, f"evaluation.variants=[{FP32}, {FIXED_BIT}, {PQ}, {PQCAD}]")
    pq, control, student = (ended(tmp_path, stage) for stage in (PQ, FIXED_BIT, PQCAD))
    assert (pq.steps, pq.cause, student.steps, student.cause) == (20, "max_steps", 20, "max_steps")
    assert (control.steps, control.decay_from, control.cause) == (pq.steps, pq.decay_from, "steps")
    assert pq.decay_from == 10
    rates = [
        [json.loads(row)["learning_rate"] for row in (tmp_path / "logs" / f"{stage}.jsonl").read_text().splitlines()]
        for stage in (PQ, FIXED_BIT)
    ]
    assert rates[0] == rates[1]
    report, curves = read_record(tmp_path)
    assert report.training == {PQ: pq, FIXED_BIT: control, PQCAD: student}
    held_out = [series for series in curves.losses if series.name == "held_out"]
    assert [series.steps for series in held_out] == [(0, 10, 20)] * 3
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "pq ended after 20 steps, because training.max_steps allows no more" in page


@pytest.mark.long
def test_a_run_of_low_rank_keeps_weights_that_differ_from_those_it_began_with_by_that_rank(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one stage keeps its last weights and one the best on the way. Training of a low rank begins with weights on
    their levels, on which those of `ptq` stay here.
    """
    monkeypatch.setattr("pqcad_qat.stages.post_train.move_within_levels", lambda *_: None)
    small = (f"evaluation.variants=[{PQCAD}]", "progressive.steps=30", "distillation.steps=20", *QUIET)
    trained = ("training.trainable=low_rank", "training.rank=2", "training.learning_rate=0.0003", "training.ema=0")
    policy = load_policy(SMOKE, tiny_overrides(tiny_folder, *small, *trained))
    with without_images():
        pipeline.run(policy, tmp_path / "run", "command", Console(quiet=True))
    given, taught, student = (load_file(tmp_path / "run" / WEIGHTS.format(name)) for name in (PTQ, PQ, PQCAD))
    assert given.keys() == taught.keys() == student.keys()
    layers = [layer.name for layer in prepare(policy).plan]
    for before, after in ((given, taught), (taught, student)):
        moved = [(after[f"{name}.weight"] - before[f"{name}.weight"]).flatten(1).double() for name in layers]
        ranks = {int(torch.linalg.matrix_rank(change, rtol=1e-3)) for change in moved}
        assert ranks <= {0, 1, 2}
        assert 2 in ranks
    moved = {key for key in given if not key.startswith(tuple(layers)) and not torch.equal(given[key], taught[key])}
    assert any(key.endswith("norm1.weight") for key in moved)


def test_where_no_width_changes_the_control_is_pq_itself_and_what_it_would_have_been_trained_to(
    tiny_folder: Path, tmp_path: Path
) -> None:
    wide = ("quantization.layers.body.weights.bits=7", "progressive.ladder=[7]", "training.learning_rate=1e-3")
    printed = io.StringIO()
    for name, variants in (("both", f"[{PQ},{FIXED_BIT}]"), ("control", f"[{FIXED_BIT}]")):
        overrides = tiny_overrides(tiny_folder, *QUIET, *wide, f"evaluation.variants={variants}")
        with without_images():
            pipeline.run(load_policy(SMOKE, overrides), tmp_path / name, "command", Console(file=printed))
    assert f"{FIXED_BIT}: the model of {PQ}" in printed.getvalue()
    taken, trained, alone = (
        load_file(tmp_path / run / WEIGHTS.format(stage))
        for run, stage in (("both", FIXED_BIT), ("both", PQ), ("control", FIXED_BIT))
    )
    assert taken.keys() == trained.keys() == alone.keys()
    assert [name for name, value in taken.items() if not torch.equal(value, trained[name])] == []
    assert [name for name, value in taken.items() if not torch.equal(value, alone[name])] == []
    ends = [RunFolder(tmp_path / run).read_always(FIXED_BIT, TrainingRecord).end for run in ("both", "control")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].training_s == 0 < ends[1].training_s
    assert ends[0].held_out == ends[1].held_out
