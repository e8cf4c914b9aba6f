"""What is wrong with any cell of a study is told before the first is run: by `sweep` and by its dry run, as `plan` says
it.

Not here: cells that are run (test_sweep.py), faults of the study's file (test_study_cells.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import POLICIES

from pqcad_qat import cli, console
from pqcad_qat.commands import run as pipeline
from pqcad_qat.commands import sweep as study_module
from pqcad_qat.commands.sweep import check_cells, sweep
from pqcad_qat.errors import StudyError
from pqcad_qat.policy.study_cells import load_study

STUDY = f"""\
kind: study
name: checked
policies: [{POLICIES / "smoke.yaml"}]
set: {{model.source: TINY}}
axes:
  rules:
    good: {{}}
    gone: {{quantization.layers.body.match: no_such_layer}}
  sampler:
    own: {{}}
    other: {{sampler.name: euler}}
seeds: [0, 1]
"""
QUIET = Console(quiet=True)


@pytest.fixture
def study(tiny_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(STUDY.replace("TINY", str(tiny_folder)))
    return path


def test_all_faults_of_all_cells_are_told_before_the_first_is_run(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: pytest.fail("a cell was run"))
    with pytest.raises(StudyError) as caught:
        sweep(load_study(study), tmp_path / "out", "python -m pqcad_qat sweep s.yaml", QUIET)
    head, *lines = str(caught.value).replace(f"{study}:", "s.yaml:").splitlines()
    assert head == "got 6 of 8 cells that cannot run; allowed cells that `plan` accepts:"
    assert [line.split(": got")[0] for line in lines] == [
        "smoke-good-other-seed0, smoke-good-other-seed1, smoke-gone-other-seed0 and 1 more: s.yaml:11: sampler.name",
        "smoke-gone-own-seed0, smoke-gone-own-seed1: s.yaml:8: quantization.layers.body.match",
    ]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_what_plan_tells_or_shows_the_cells(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "CONSOLE", Console(width=200))
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", str(study), "--dry-run"])
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == ""
    assert "smoke-gone-own-seed0, smoke-gone-own-seed1: " in printed.err
    cli.main(["sweep", str(study), "--dry-run", "--only", "*-good-own-*"])
    output = capsys.readouterr().out
    assert "smoke-good-own-seed1" in output
    assert "smoke-gone" not in output


def test_cells_that_are_planned_alike_are_planned_once(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[str] = []
    monkeypatch.setattr(study_module, "planned_shapes", lambda policy: planned.append(policy.name))
    budgets = "  budget:\n    short: {progressive.steps: 4}\n    long: {progressive.steps: 8}\nseeds:"
    study.write_text(study.read_text().replace("seeds:", budgets))
    check_cells(load_study(study).cells, QUIET)
    assert len(planned) == 4
