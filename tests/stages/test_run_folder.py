"""The folder of a run: stages that are done once, one process at a time, and what a changed policy does again.

Not here: what the stages do (test_run.py).
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import POLICIES, environment

from pqcad_qat.errors import CheckpointError, PqcadError
from pqcad_qat.machine.files import write_file
from pqcad_qat.policy.loading import dump_policy, load_policy, load_pretrain_policy
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FIXED_BIT, PQ
from pqcad_qat.stages.open_run import open_run
from pqcad_qat.stages.recipe import Recipe, Recipes
from pqcad_qat.stages.run_folder import SUPERSEDED, RunFolder, StageRecord


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(POLICIES / "smoke.yaml")


@pytest.fixture
def path(policy: Policy, tmp_path: Path) -> Path:
    """A run that was begun and left."""
    with open_run(tmp_path / "run", policy, resume=False):
        pass
    return tmp_path / "run"


def enter(path: Path, policy: Policy | PretrainPolicy, resume: bool) -> RunFolder:
    with open_run(path, policy, resume) as folder:
        return folder


def content(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(path.rglob("*")) if file.is_file()
    }


def test_a_new_run_keeps_its_policy_as_resolved(path: Path, policy: Policy) -> None:
    assert load_policy(path / "policy.yaml") == policy


def test_an_existing_run_is_refused_without_resume_and_left_untouched(path: Path, policy: Policy) -> None:
    before = content(path)
    with pytest.raises(
        CheckpointError,
        match=r"got a folder that holds a run already; allowed --resume, which goes on with it, or --out DIR, which",
    ):
        enter(path, policy, resume=False)
    assert content(path) == before


RECIPES = {
    "calibration": Recipe({"sampler.steps": 10}),
    PQ: Recipe(
        {"training.learning_rate": 0.1},
        ("calibration",),
        {"torch": "1"},
        trained=("models/pq.safetensors", "logs/pq.jsonl", "checkpoints/pq"),
    ),
    "export": Recipe({"export.batch_size": 1}, (PQ,)),
    "evaluation": Recipe({"evaluation.features": None}, (PQ,)),
}


def changed(stage: str, **values: object) -> dict[str, Recipe]:
    return {**RECIPES, stage: replace(RECIPES[stage], values=values)}


@pytest.fixture
def half(policy: Policy, tmp_path: Path) -> Path:
    """A run that was left after its export; two stages have laid down files."""
    with open_run(tmp_path / "half", policy, resume=False, recipes=RECIPES) as folder:
        for name in ("calibration", PQ, "export"):
            with folder.stage(name) as stage:
                stage.done()
    for file in ("models/pq.safetensors", "logs/pq.jsonl", "openvino/manifest.json"):
        (tmp_path / "half" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "half" / file).write_text(file)
    return tmp_path / "half"


def resumed(path: Path, policy: Policy, recipes: Recipes) -> tuple[RunFolder, str]:
    printed = io.StringIO()
    with open_run(path, policy, True, recipes, console=Console(file=printed, width=200)) as folder:
        return folder, printed.getvalue()


def done(folder: RunFolder) -> set[str]:
    return {stage for stage in folder.recipes if folder.finished(stage)}


def test_a_run_that_goes_on_says_what_it_keeps_and_what_is_to_do(half: Path, policy: Policy) -> None:
    folder, told = resumed(half, policy, RECIPES)
    assert told.splitlines() == [f"{half}: going on", "  kept: calibration, pq, export", "  to do: evaluation"]
    assert done(folder) == {"calibration", PQ, "export"}


def test_a_stage_whose_recipe_changed_is_done_again_with_all_that_read_it_and_the_rest_stays(
    half: Path, policy: Policy
) -> None:
    other = load_policy(POLICIES / "smoke.yaml", ["training.learning_rate=0.01"])
    folder, told = resumed(half, other, changed(PQ, **{"training.learning_rate": 0.01}))
    assert told.splitlines() == [
        f"{half}: going on, under another policy:",
        "  - training.learning_rate: was 1.0e-05, now 0.01",
        "  kept: calibration",
        "  again: pq (training.learning_rate 0.1 -> 0.01), export (after pq)",
        "  to do: evaluation",
        f"  pq: what was trained is in {half}/superseded/pq-1, and may be deleted",
    ]
    assert done(folder) == {"calibration"}
    assert load_policy(half / "policy.yaml") == other


def test_what_was_trained_is_moved_aside_whole_and_what_was_not_stays_until_it_is_replaced(
    half: Path, policy: Policy
) -> None:
    for rate in (0.2, 0.3):
        resumed(half, policy, changed(PQ, **{"training.learning_rate": rate}))
        (half / "models" / "pq.safetensors").write_text(str(rate))
        with (
            open_run(half, policy, True, changed(PQ, **{"training.learning_rate": rate})) as folder,
            folder.stage(PQ) as stage,
        ):
            assert stage.new
            stage.done()
    aside = half / "superseded"
    assert [path.name for path in sorted(aside.iterdir())] == ["pq-1", "pq-2"]
    assert (aside / "pq-1" / "models" / "pq.safetensors").read_text() == "models/pq.safetensors"
    assert (aside / "pq-1" / "logs" / "pq.jsonl").exists()
    assert (aside / "pq-1" / "stages" / "pq.json").exists()
    assert (aside / "pq-2" / "models" / "pq.safetensors").read_text() == "0.2"
    assert (half / "models" / "pq.safetensors").read_text() == "0.3"
    assert (half / "openvino" / "manifest.json").exists()


def test_checkpoints_of_a_stage_that_was_begun_by_another_recipe_are_not_gone_on_from(
    policy: Policy, tmp_path: Path
) -> None:
    with open_run(tmp_path / "run", policy, False, RECIPES) as folder, folder.stage(PQ):
        (tmp_path / "run" / "checkpoints" / PQ).mkdir(parents=True)  # and killed before it is done
    _, told = resumed(tmp_path / "run", policy, RECIPES)
    assert "  kept: pq (begun)" in told.splitlines()
    assert (tmp_path / "run" / "checkpoints" / PQ).exists()
    _, told = resumed(tmp_path / "run", policy, changed(PQ, **{"training.learning_rate": 0.2}))
    assert "again: pq (training.learning_rate 0.1 -> 0.2)" in told
    assert not (tmp_path / "run" / "checkpoints" / PQ).exists()
    assert (tmp_path / "run" / "superseded" / "pq-1" / "checkpoints" / PQ).exists()


def test_a_stage_that_is_done_leaves_no_checkpoints(policy: Policy, tmp_path: Path) -> None:
    """Neither one that has just ended, nor one whose process was killed before it deleted them."""
    checkpoint = tmp_path / "run" / "checkpoints" / PQ / "step_000009"
    with open_run(tmp_path / "run", policy, False, RECIPES) as folder, folder.stage(PQ) as stage:
        checkpoint.mkdir(parents=True)
        stage.done()
    assert not (tmp_path / "run" / "checkpoints").exists()
    checkpoint.mkdir(parents=True)
    resumed(tmp_path / "run", policy, RECIPES)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_libraries_of_another_version_are_no_reason_to_do_a_stage_again(half: Path, policy: Policy) -> None:
    folder, told = resumed(half, policy, {**RECIPES, PQ: replace(RECIPES[PQ], circumstances={"torch": "2"})})
    assert "again" not in told
    assert done(folder) == {"calibration", PQ, "export"}


def test_a_stage_that_the_policy_has_left_out_meanwhile_is_compared_when_it_comes_back(
    half: Path, policy: Policy
) -> None:
    without = {name: recipe for name, recipe in RECIPES.items() if name != "export"}
    folder, told = resumed(half, policy, without)
    assert "again" not in told
    assert set(folder.seconds()) == {"calibration", PQ}
    _, told = resumed(half, policy, RECIPES)
    assert "  kept: calibration, pq, export" in told.splitlines()
    resumed(half, policy, {name: recipe for name, recipe in changed(PQ, rate=1).items() if name != "export"})
    _, told = resumed(half, policy, changed(PQ, rate=1))
    assert "again: export (after pq)" in told


def test_whoever_is_killed_while_a_stage_is_set_aside_sets_it_aside_the_next_time(
    half: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[Path] = []
    rename = Path.rename

    def dying(path: Path, to: Path) -> Path:
        if len(moves) == 2 and SUPERSEDED in to.parts:
            raise KeyboardInterrupt
        moves.append(to) if SUPERSEDED in to.parts else None
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        resumed(half, policy, changed(PQ, rate=1))
    monkeypatch.undo()
    folder, told = resumed(half, policy, changed(PQ, rate=1))
    assert "again: pq" in told
    assert done(folder) == {"calibration"}
    aside = sorted(
        path.relative_to(half / SUPERSEDED).as_posix() for path in (half / SUPERSEDED).rglob("*") if path.is_file()
    )
    assert aside == [
        "pq-1/models/pq.safetensors",
        "pq-1/stages/pq.json",
        "pq-2/logs/pq.jsonl",
        "pq-2/recipes/pq.json",
    ]


def test_a_run_of_a_version_without_recipes_goes_on_under_its_own_policy_and_no_other(
    half: Path, policy: Policy
) -> None:
    shutil.rmtree(half / "recipes")
    other = load_policy(POLICIES / "smoke.yaml", ["training.learning_rate=0.01", "progressive.steps=17"])
    before = content(half)
    with pytest.raises(CheckpointError) as caught:
        resumed(half, other, RECIPES)
    assert "progressive.steps: was 16, now 17" in str(caught.value)
    assert "training.learning_rate: was 1.0e-05, now 0.01" in str(caught.value)
    assert content(half) == before
    folder, told = resumed(half, policy, RECIPES)
    assert "  kept: calibration, pq, export" in told.splitlines()
    assert done(folder) == {"calibration", PQ, "export"}


def test_a_policy_that_an_older_version_wrote_with_its_features_is_the_same_policy(half: Path, policy: Policy) -> None:
    shutil.rmtree(half / "recipes")
    (half / "policy.yaml").write_text(
        dump_policy(load_policy(POLICIES / "smoke.yaml", ["evaluation.features=embedded:fashion-mnist"]))
    )
    folder, _ = resumed(half, policy, RECIPES)
    assert done(folder) == {"calibration", PQ, "export"}


def test_what_was_told_of_a_stage_that_is_done_again_is_forgotten(half: Path, policy: Policy) -> None:
    told = ["pq: step 3: diverged", "pqcad: step 1: diverged", "runs/a/checkpoints/pq/step_000003: damaged"]
    (half / "warnings.json").write_text(json.dumps(told))
    resumed(half, policy, changed(PQ, rate=1))
    assert json.loads((half / "warnings.json").read_text()) == ["pqcad: step 1: diverged"]


def test_a_run_of_another_kind_is_refused(path: Path) -> None:
    with pytest.raises(PqcadError, match="kind: got quantize"):
        enter(path, load_pretrain_policy(POLICIES / "pretrain-fashion-mnist.yaml"), resume=True)


def test_a_folder_with_something_else_in_it_is_refused_and_left_untouched(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"got a folder that is not empty and not a run"):
        enter(tmp_path, policy, resume=False)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(CheckpointError, match="run: "):
        enter(tmp_path / "run", policy, resume=False)


def test_an_empty_folder_becomes_a_run(policy: Policy, tmp_path: Path) -> None:
    enter(tmp_path, policy, resume=False)
    assert (tmp_path / "policy.yaml").is_file()


def test_a_run_that_was_killed_before_its_policy_was_written_begins_with_resume_too(
    policy: Policy, tmp_path: Path
) -> None:
    (tmp_path / ".policy.yaml.123").write_text("name: sm")  # the draft that the killed process left
    enter(tmp_path, policy, resume=True)
    assert load_policy(tmp_path / "policy.yaml") == policy


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_process_works_on_is_refused(path: Path, policy: Policy, resume: bool) -> None:
    refusal = "a run that another process is running" if resume else "holds a run already"
    with held_elsewhere(path), pytest.raises(CheckpointError, match=refusal):
        enter(path, policy, resume)
    enter(path, policy, resume=True)  # free again once the process has ended


def held_elsewhere(path: Path) -> subprocess.Popen[str]:
    """A process that holds the run open until its standard input is closed (which leaving the block does)."""
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from pqcad_qat.policy.loading import load_policy\nfrom pqcad_qat.stages.open_run import open_run\n"
        "path = Path(sys.argv[1])\n"
        "with open_run(path, load_policy(path / 'policy.yaml'), resume=True): print('open', flush=True); "
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], env=environment(), text=True, **pipes)
    assert process.stdout.readline() == "open\n"
    return process  # type: ignore[no-any-return]


def test_a_killed_process_leaves_no_lock(path: Path, policy: Policy) -> None:
    with held_elsewhere(path) as process:
        process.kill()
        process.wait()
        with open_run(path, policy, resume=True) as folder:
            assert folder.path == path


def test_drafts_of_a_killed_process_are_dropped_and_nothing_else(path: Path, policy: Policy) -> None:
    drafts = [
        path / "checkpoints" / PQ / ".step_000050.4242",
        path / ".openvino-x7_k2",
        path / f".openvino-{FIXED_BIT}-x7_k2",
        path / "stages" / ".pq.json.17",
    ]
    for draft in drafts[:3]:
        draft.mkdir(parents=True)
        (draft / "half.bin").write_bytes(b"half")
    drafts[3].parent.mkdir(exist_ok=True)
    drafts[3].write_text("{")
    mine = path / ".gitignore"
    mine.write_text("*")
    enter(path, policy, resume=True)
    assert not any(draft.exists() for draft in drafts)
    assert mine.exists()


@dataclass(frozen=True)
class Noted(StageRecord):
    """What the stages of this file note."""

    losses: tuple[float, ...]


def test_a_record_that_does_not_fit_its_type_is_an_error_that_names_the_file_and_the_key(path: Path) -> None:
    folder = RunFolder(path)
    folder.finish(PQ, 1.0, StageRecord())
    with pytest.raises(CheckpointError, match=r"stages/pq\.json: got a damaged file: losses: Field required"):
        folder.read(PQ, Noted)
    assert folder.read("export", Noted) is None


def test_a_stage_is_done_only_once_it_says_so(path: Path, policy: Policy) -> None:
    with open_run(path, policy, resume=True) as folder:
        with folder.stage(PQ) as stage:
            assert stage.new
        assert not folder.finished(PQ)
        with folder.stage(PQ) as stage:
            stage.done(Noted((1.0, 2.0)))
    with open_run(path, policy, resume=True) as folder, folder.stage(PQ) as stage:
        assert not stage.new
        assert folder.read(PQ, Noted) == Noted((1.0, 2.0))


def test_a_stage_that_fails_is_not_done_even_if_it_said_so(path: Path) -> None:
    folder = RunFolder(path)

    def fail() -> None:
        with folder.stage(PQ) as stage:
            stage.done()
            raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        fail()
    assert not folder.finished(PQ)


def test_reading_a_finished_stage_back_does_not_write_its_marker_again(path: Path) -> None:
    folder = RunFolder(path)
    folder.finish(PQ, 1.0, StageRecord())
    before = content(path)
    with folder.stage(PQ):
        pass
    assert content(path) == before


def test_seconds_are_in_the_order_in_which_stages_ended(path: Path) -> None:
    folder = RunFolder(path)
    for number, name in enumerate((PQ, "export", "baselines")):
        folder.finish(name, float(number), StageRecord())
        time.sleep(0.01)
    assert folder.seconds() == {PQ: 0.0, "export": 1.0, "baselines": 2.0}
    assert list(folder.seconds()) == [PQ, "export", "baselines"]


def test_a_damaged_marker_is_an_error_that_names_the_file(path: Path) -> None:
    folder = RunFolder(path)
    folder.finish(PQ, 1.0, StageRecord())
    marker = path / "stages" / "pq.json"
    marker.write_text(marker.read_text()[:5])
    with pytest.raises(CheckpointError, match=r"stages/pq\.json: got a damaged file"):
        folder.finished(PQ)
    with pytest.raises(CheckpointError, match=r"stages/pq\.json: got a damaged file"):
        folder.seconds()


def test_numbers_that_json_does_not_know_are_never_written(path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RunFolder(path).finish(PQ, 1.0, Noted((float("nan"),)))
    assert not RunFolder(path).finished(PQ)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "file.txt", "one")
    write_file(tmp_path / "deep" / "file.txt", "two")
    assert (tmp_path / "deep" / "file.txt").read_text() == "two"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_a_place_that_cannot_be_written_is_named(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file/run: got a folder that cannot be written"):
        enter(tmp_path / "file" / "run", policy, resume=False)
