"""What is wrong with any cell of a study is told before the first is run: by `sweep` and by its dry run, as `plan` says
it.

Not here: cells that are run (test_sweep.py), faults of the study's file (test_study_cells.py).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import POLICIES

from pqcad_qat import cli, console
from pqcad_qat.commands import run as pipeline
from pqcad_qat.commands import sweep as study_module
from pqcad_qat.commands.sweep import check_cells, sweep
from pqcad_qat.errors import StudyError, UsageError
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.study_cells import load_study
from pqcad_qat.policy.variants import FP32

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
    monkeypatch.setattr(study_module, "planned_shapes", lambda policy, _own: planned.append(policy.name))
    budgets = "  budget:\n    short: {progressive.steps: 4}\n    long: {progressive.steps: 8}\nseeds:"
    study.write_text(study.read_text().replace("seeds:", budgets))
    check_cells(load_study(study).cells, QUIET)
    assert len(planned) == 4


# ---- a module of the user's own
# ----------------------------------------------------------------------------------------------------------------------

OWN = """
from pqcad_qat.models.own_model import OwnModel
from tiny_runs import SCHEDULER, tiny_unet


def mine():
    return OwnModel("mine", lambda: tiny_unet(), (1, 32, 32), SCHEDULER)
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(OWN)
    return f"{tmp_path / 'nets.py'}:mine"


def own_study(tmp_path: Path, *models: str) -> Path:
    """A study of several models, of cells that train nothing."""
    cells = "".join(f"    m{place}: {{model.source: '{source}'}}\n" for place, source in enumerate(models))
    path = tmp_path / "own.yaml"
    path.write_text(
        f"kind: study\nname: own\npolicies: [{POLICIES / 'smoke.yaml'}]\n"
        f"set: {{evaluation.variants: [{FP32}], evaluation.features: null}}\naxes:\n  model:\n{cells}"
    )
    return path


@pytest.mark.parametrize("jobs", [1, 2])
def test_cells_that_name_a_module_get_it_and_others_do_not(
    jobs: int, module: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, str | None] = {}

    def ran(policy: Policy, path: Path, *_: object, model: OwnModel | None, **__: object) -> None:
        given[policy.model.source] = None if model is None else model.source
        raise StudyError("enough")

    def at_once(_pool: object, work: Callable[..., object], *arguments: object, **named: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_result(work(*arguments, **named))
        return future

    monkeypatch.setattr(pipeline, "run", ran)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor.submit", at_once)
    study = load_study(own_study(tmp_path, "module:mine", str(tiny_folder)))
    with pytest.raises(StudyError, match="2 of 2 cells failed"):
        sweep(study, tmp_path / "out", "command", QUIET, jobs=jobs, module=module)
    assert given == {"module:mine": "module:mine", str(tiny_folder): None}


def test_a_module_that_no_cell_names_and_a_cell_without_its_module_are_refused(
    module: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--module: got module:mine, which no cell names; allowed .*tiny"):
        sweep(load_study(own_study(tmp_path, str(tiny_folder))), tmp_path / "out", "c", QUIET, module=module)
    with pytest.raises(StudyError, match=r"model\.source: got 'module:mine', .*; allowed with --module FILE"):
        sweep(load_study(own_study(tmp_path, "module:mine")), tmp_path / "out", "command", QUIET)
