"""A study that was swept: its cells are runs, share what they can, go on where they were cut off, and end in one table.

Not here: how a study's file becomes cells (test_study_cells.py), what the table says (test_comparison.py).
"""

from __future__ import annotations

import io
import json
import shutil
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dask_cluster import local_cluster
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import POLICIES, QUIET, tiny_overrides, without_page, without_trials

from pqcad_qat import cli, console
from pqcad_qat.commands import run as pipeline
from pqcad_qat.commands import sweep as study_module
from pqcad_qat.commands.sweep import sweep
from pqcad_qat.errors import CheckpointError, InterruptedByUserError, PlanError, StudyError, UsageError
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.study_cells import Study, load_study
from pqcad_qat.policy.variants import FP32, NNCF_INT8, PQ
from pqcad_qat.report.report_files import read_report
from pqcad_qat.stages import baselines, variant_images
from pqcad_qat.stages.samplers import sample_rows

STUDY = POLICIES / "studies" / "smoke.yaml"
CELLS = ("smoke-momentum-seed0", "smoke-momentum-seed1", "smoke-fixed-seed0", "smoke-fixed-seed1")


@dataclass(frozen=True)
class Swept:
    """A study that was swept once.

    Attributes:
        overrides: of the study that ships as a smoke test, for the tiny model.
        folder: of its cells and tables.
        made: how often each piece of work was done.
        output: what was printed.
    """

    overrides: list[str]
    folder: Path
    made: dict[str, int]
    output: str

    @property
    def study(self) -> Study:
        return load_study(STUDY, self.overrides)

    @property
    def arguments(self) -> list[str]:
        return ["sweep", str(STUDY), "--out", str(self.folder), *(f"--set={override}" for override in self.overrides)]


@pytest.fixture(scope="module")
def swept(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two schedules, two seeds, on the tiny model; what the cells share is counted. What stands for NNCF's graph is a
    copy of full precision's, made as NNCF's is.
    """
    root = tmp_path_factory.mktemp("sweep")
    variants = f"evaluation.variants=[{FP32}, {NNCF_INT8}, {PQ}]"
    overrides = tiny_overrides(tiny_folder, "progressive.steps=4", "seeds=[0, 1]", variants, *QUIET)
    made: dict[str, int] = {}
    torch.set_num_threads(1)
    printed = io.StringIO()
    with without_trials(), without_page(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
        for stage, name in ((baselines, "nncf_baseline"), (variant_images, "sample_rows")):
            patch.setattr(stage, name, counting(made, name, getattr(stage, name)))
        sweep(
            load_study(STUDY, overrides),
            root / "tiny",
            "python -m pqcad_qat sweep smoke.yaml",
            Console(file=printed, width=200),
        )
    return Swept(overrides, root / "tiny", made, printed.getvalue())


def counting(made: dict[str, int], work_name: str, work: Any) -> Any:
    def counted(*arguments: Any, **named: Any) -> Any:
        name = getattr(arguments[0], "name", "") if work is sample_rows else work_name
        made[name] = made.get(name, 0) + 1
        return work(*arguments, **named)

    return counted


@pytest.fixture
def copied(swept: Swept, tmp_path: Path) -> Iterator[Swept]:
    """The swept study in a folder of one's own, to damage."""
    shutil.copytree(swept.folder, tmp_path / "tiny", symlinks=True)
    with without_page():
        yield Swept(swept.overrides, tmp_path / "tiny", {}, "")


def again(swept: Swept) -> None:
    sweep(swept.study, swept.folder, "again", Console(quiet=True))


def times(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_each_cell_is_a_run_of_its_own(swept: Swept) -> None:
    for cell in swept.study.cells:
        path = swept.folder / cell.name
        assert load_policy(path / "policy.yaml") == cell.policy
        assert [row.name for row in read_report(path).variants] == [FP32, NNCF_INT8, PQ]
    assert {path.name for path in swept.folder.iterdir()} == {
        *CELLS,
        ".calibration",
        ".shared",
        "study.html",
        "study.json",
        "study.md",
    }


def test_what_training_does_not_touch_is_made_once(swept: Swept) -> None:
    assert swept.made == {FP32: 1, "nncf_baseline": 1, NNCF_INT8: 1, PQ: 4}
    assert len([*(swept.folder / ".calibration").glob("[!.]*")]) == 1


def test_the_way_down_is_that_of_the_level(swept: Swept) -> None:
    causes = {name: {move.cause for move in read_report(swept.folder / name).bit_schedule} for name in CELLS}
    assert causes[CELLS[2]] == causes[CELLS[3]] == {"fixed"}
    assert "fixed" not in causes[CELLS[0]] | causes[CELLS[1]]


def test_the_table_has_a_row_a_combination_with_the_spread_over_seeds(swept: Swept) -> None:
    document = json.loads((swept.folder / "study.json").read_text())
    rows = {(row["labels"]["schedule"], row["variant"]): row for row in document["parts"][0]["rows"]}
    assert list(rows) == [("all", FP32), ("all", NNCF_INT8), ("momentum", PQ), ("fixed", PQ)]
    reports = [read_report(swept.folder / name) for name in CELLS[:2]]
    distances = [
        row.fid_real for report in reports for row in report.variants if row.name == PQ and row.fid_real is not None
    ]
    found = rows["momentum", PQ]["figures"]["fid_real"]
    assert (found["mean"], found["count"]) == (pytest.approx(statistics.mean(distances)), 2)
    assert found["deviation"] == pytest.approx(statistics.stdev(distances))
    assert (swept.folder / "study.md").read_text().startswith("From `python -m pqcad_qat sweep smoke.yaml`:")


def test_finished_cells_are_not_run_again(swept: Swept, copied: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: pytest.fail("run again"))
    again(copied)
    assert (
        json.loads((copied.folder / "study.json").read_text())["parts"]
        == json.loads((swept.folder / "study.json").read_text())["parts"]
    )


def test_a_cell_that_was_cut_off_goes_on(copied: Swept) -> None:
    cell = copied.folder / CELLS[1]
    for left in ("report.html", "report.json", "stages/evaluation.json", f"stages/samples-{PQ}.json"):
        (cell / left).unlink()
    before = times(copied.folder)
    again(copied)
    changed = {path for path, time in times(copied.folder).items() if before.get(path) != time}
    written = {"report.csv", "report.html", "report.json", "samples.png", "plan.json", "samples/pq.safetensors"}
    stages = {f"{folder}/{name}.json" for folder in ("recipes", "stages") for name in ("evaluation", f"samples-{PQ}")}
    assert changed == {*(f"{CELLS[1]}/{path}" for path in written | stages), "study.html", "study.json", "study.md"}


def test_a_changed_study_is_refused_before_anything_is_run(copied: Swept) -> None:
    before = times(copied.folder)
    with pytest.raises(CheckpointError) as caught:
        sweep(
            load_study(STUDY, [*copied.overrides, "progressive.steps=5"]), copied.folder, "again", Console(quiet=True)
        )
    assert str(caught.value).count("progressive.steps: was 4, now 5") == len(CELLS)
    assert "--out DIR starts it anew" in str(caught.value)
    assert times(copied.folder) == before


@pytest.mark.parametrize("fault", [PlanError("no such layer"), RuntimeError("no memory")])
def test_a_cell_that_fails_does_not_lose_the_others(
    copied: Swept, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    for name in (CELLS[0], CELLS[2]):
        (copied.folder / name / "report.html").unlink()
    run = pipeline.run

    def failing(policy: Any, path: Path, *arguments: Any, **named: Any) -> Path:
        if path.name == CELLS[0]:
            raise fault
        return run(policy, path, *arguments, **named)

    monkeypatch.setattr(pipeline, "run", failing)
    with pytest.raises(
        StudyError, match=rf"1 of 4 cells failed; the same command tries them again:\n  - {CELLS[0]}: .*{fault}"
    ):
        again(copied)
    [part] = json.loads((copied.folder / "study.json").read_text())["parts"]
    rows = part["rows"]
    assert [row["seeds"] for row in rows if row["variant"] == PQ] == [[1], [0, 1]]
    assert (copied.folder / "errors" / f"{CELLS[0]}.txt").exists() == isinstance(fault, RuntimeError)


def test_a_study_says_which_cell_it_is_at(swept: Swept) -> None:
    for place, name in enumerate(CELLS, start=1):
        assert f"study tiny: cell {place} of 4: {name}" in swept.output


def test_only_the_cells_asked_for_are_run_and_the_table_has_all_that_are_finished(copied: Swept) -> None:
    for name in (CELLS[0], CELLS[3]):
        (copied.folder / name / "report.html").unlink()
    sweep(copied.study, copied.folder, "again", Console(quiet=True), only="*-seed1")
    assert [(copied.folder / name / "report.html").exists() for name in CELLS] == [False, True, True, True]
    [part] = json.loads((copied.folder / "study.json").read_text())["parts"]
    rows = part["rows"]
    assert {row["labels"]["schedule"]: row["seeds"] for row in rows if row["variant"] == PQ} == {
        "momentum": [1],
        "fixed": [0, 1],
    }
    with pytest.raises(
        StudyError, match=r"--only: got 'w9\*', which matches none of the 4 cells; .* smoke-momentum-seed0"
    ):
        sweep(copied.study, copied.folder, "again", Console(quiet=True), only="w9*")


@pytest.mark.long
@pytest.mark.parametrize("where", ["jobs", "cluster"])
def test_cells_that_run_beside_each_other_are_those_that_run_in_turn(where: str, swept: Swept, tmp_path: Path) -> None:
    """One seed makes as many cells as there are processes. They are compared by their models, not by their images."""
    few = (f"evaluation.variants=[{FP32}, {PQ}]", "evaluation.images=2", "evaluation.features=none", "seeds=[0]")
    study, printed = load_study(STUDY, [*swept.overrides, *few]), io.StringIO()
    with local_cluster(workers=2) if where == "cluster" else nullcontext() as cluster:
        how = {"jobs": 2} if cluster is None else {"scheduler": cluster.scheduler_address}
        sweep(study, tmp_path, "beside", Console(file=printed, width=200), **how)
    assert [cell.name for cell in study.cells] == [CELLS[0], CELLS[2]]
    for cell in study.cells:
        ours, theirs = (
            load_file(folder / cell.name / "models" / "pq.safetensors") for folder in (tmp_path, swept.folder)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert cell.name in printed.getvalue()
        assert "pq: step 4 of 4" in (tmp_path / "consoles" / f"{cell.name}.txt").read_text()
    assert len([*(tmp_path / ".calibration").glob("[!.]*")]) == 1


def test_cells_that_time_models_do_not_run_beside_others(copied: Swept) -> None:
    (copied.folder / CELLS[0] / "report.html").unlink()
    with pytest.raises(StudyError, match=f"--jobs: got 2, but 1 cells time models.*{CELLS[0]}"):
        sweep(copied.study, copied.folder, "again", Console(quiet=True), jobs=2)
    with pytest.raises(StudyError, match=r"--scheduler: got tcp://10\.0\.0\.1:8786, but 1 cells time models"):
        sweep(copied.study, copied.folder, "again", Console(quiet=True), scheduler="tcp://10.0.0.1:8786")
    with pytest.raises(UsageError, match="--jobs: got a number beside --scheduler"):
        sweep(copied.study, copied.folder, "again", Console(quiet=True), scheduler="tcp://10.0.0.1:8786", jobs=2)


def test_ctrl_c_ends_a_study_and_not_only_its_cell(
    copied: Swept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise InterruptedByUserError("interrupted at step 3 of 4")

    for name in CELLS[:2]:
        (copied.folder / name / "report.html").unlink()
    monkeypatch.setattr(study_module.pipeline, "run", stop)
    with pytest.raises(SystemExit) as end:
        cli.main(copied.arguments)
    assert end.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


# ---- the command line
# ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_every_cell_and_runs_nothing(
    copied: Swept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "CONSOLE", Console(width=200))
    (copied.folder / CELLS[0] / "report.html").unlink()
    shutil.rmtree(copied.folder / CELLS[1])
    before = times(copied.folder)
    cli.main([*copied.arguments, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    states = {name: next(line.split()[-2] for line in lines if name in line) for name in CELLS}
    assert states == dict(zip(CELLS, ("begun", "new", "finished", "finished"), strict=True))
    assert times(copied.folder) == before


def test_a_sweep_that_fails_ends_with_code_2(
    copied: Swept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PlanError("no such layer")

    (copied.folder / CELLS[3] / "report.html").unlink()
    monkeypatch.setattr(study_module.pipeline, "run", fail)
    with pytest.raises(SystemExit) as end:
        cli.main(copied.arguments)
    assert end.value.code == 2
    assert f"{CELLS[3]}: no such layer" in capsys.readouterr().err


def test_cells_compare_by_hand_too(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "CONSOLE", Console(width=200))
    cli.main(["compare", *(str(swept.folder / name) for name in CELLS), "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert output.count("smoke-momentum ") == output.count("smoke-fixed ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.html", "comparison.json", "comparison.md"]
