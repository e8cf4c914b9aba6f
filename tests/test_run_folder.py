"""The folder of a run: stages that are done once, one process at a time, and runs that may not be resumed.

Not here: what the stages do (test_pipeline.py).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import POLICIES, environment

from pqcad_qat.errors import CheckpointError, PqcadError
from pqcad_qat.policy.loading import load_policy, load_pretrain_policy
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.run_folder import RunFolder, open_run, write_atomically


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
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_new_run_keeps_its_policy_as_resolved(path: Path, policy: Policy) -> None:
    assert load_policy(path / "policy.yaml") == policy


def test_an_existing_run_is_refused_without_resume_and_left_untouched(path: Path, policy: Policy) -> None:
    before = content(path)
    with pytest.raises(CheckpointError, match=r"holds a run already; --resume goes on with it, --out DIR starts another"):
        enter(path, policy, resume=False)
    assert content(path) == before


def test_a_changed_policy_is_refused_with_every_difference(path: Path) -> None:
    changed = load_policy(POLICIES / "smoke.yaml", ["training.learning_rate=0.01", "progressive.steps=17"])
    before = content(path)
    with pytest.raises(CheckpointError) as caught:
        enter(path, changed, resume=True)
    assert "progressive.steps: was 16, now 17" in str(caught.value)
    assert "training.learning_rate: was 1.0e-04, now 0.01" in str(caught.value).replace("0.0001", "1.0e-04")
    assert content(path) == before


def test_a_run_of_another_kind_is_refused(path: Path) -> None:
    with pytest.raises(PqcadError, match="kind: got quantize"):
        enter(path, load_pretrain_policy(POLICIES / "pretrain-fashion-mnist.yaml"), resume=True)


def test_a_folder_with_something_else_in_it_is_refused_and_left_untouched(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty and not a run"):
        enter(tmp_path, policy, resume=False)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(CheckpointError, match="run: "):
        enter(tmp_path / "run", policy, resume=False)


def test_an_empty_folder_becomes_a_run(policy: Policy, tmp_path: Path) -> None:
    enter(tmp_path, policy, resume=False)
    assert (tmp_path / "policy.yaml").is_file()


def test_a_run_that_was_killed_before_its_policy_was_written_begins_with_resume_too(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / ".policy.yaml.123").write_text("name: sm")  # the draft that the killed process left
    enter(tmp_path, policy, resume=True)
    assert load_policy(tmp_path / "policy.yaml") == policy


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_process_works_on_is_refused(path: Path, policy: Policy, resume: bool) -> None:
    refusal = "another process is running this run" if resume else "holds a run already"
    with held_elsewhere(path), pytest.raises(CheckpointError, match=refusal):
        enter(path, policy, resume)
    enter(path, policy, resume=True)  # free again once the process has ended


def held_elsewhere(path: Path) -> subprocess.Popen[str]:
    """A process that holds the run open until its standard input is closed (which leaving the block does)."""
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from pqcad_qat.policy.loading import load_policy\nfrom pqcad_qat.run_folder import open_run\n"
        "path = Path(sys.argv[1])\n"
        "with open_run(path, load_policy(path / 'policy.yaml'), resume=True): print('open', flush=True); sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], env=environment(), text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "open\n"
    return process  # type: ignore[no-any-return]


def test_a_killed_process_leaves_no_lock(path: Path, policy: Policy) -> None:
    with held_elsewhere(path) as process:
        process.kill()
        process.wait()
        with open_run(path, policy, resume=True) as folder:
            assert folder.path == path


def test_drafts_of_a_killed_process_are_dropped_and_nothing_else(path: Path, policy: Policy) -> None:
    drafts = [path / "checkpoints" / "pq" / ".step_000050.4242", path / ".openvino-x7_k2", path / "stages" / ".pq.json.17"]
    for draft in drafts[:2]:
        draft.mkdir(parents=True)
        (draft / "half.bin").write_bytes(b"half")
    drafts[2].parent.mkdir(exist_ok=True)
    drafts[2].write_text("{")
    mine = path / ".gitignore"
    mine.write_text("*")
    enter(path, policy, resume=True)
    assert not any(draft.exists() for draft in drafts)
    assert mine.exists()


def test_a_stage_is_done_only_once_it_says_so(path: Path, policy: Policy) -> None:
    with open_run(path, policy, resume=True) as folder:
        with folder.stage("pq") as stage:
            assert stage.new
        assert folder.finished("pq") is None
        with folder.stage("pq") as stage:
            stage.done(transitions=[1, 2])
    with open_run(path, policy, resume=True) as folder, folder.stage("pq") as stage:
        assert not stage.new
        found = folder.finished("pq")
    assert found is not None
    assert found["transitions"] == [1, 2]


def test_a_stage_that_fails_is_not_done_even_if_it_said_so(path: Path) -> None:
    folder = RunFolder(path)

    def fail() -> None:
        with folder.stage("pq") as stage:
            stage.done()
            raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        fail()
    assert folder.finished("pq") is None


def test_reading_a_finished_stage_back_does_not_write_its_marker_again(path: Path) -> None:
    folder = RunFolder(path)
    folder.finish("pq", 1.0, {})
    before = content(path)
    with folder.stage("pq"):
        pass
    assert content(path) == before


def test_seconds_are_in_the_order_in_which_stages_ended(path: Path) -> None:
    folder = RunFolder(path)
    for number, name in enumerate(("pq", "export", "baselines")):
        folder.finish(name, float(number), {})
        time.sleep(0.01)
    assert folder.seconds() == {"pq": 0.0, "export": 1.0, "baselines": 2.0}
    assert list(folder.seconds()) == ["pq", "export", "baselines"]


def test_a_damaged_marker_is_an_error_that_names_the_file(path: Path) -> None:
    folder = RunFolder(path)
    folder.finish("pq", 1.0, {})
    marker = path / "stages" / "pq.json"
    marker.write_text(marker.read_text()[:5])
    with pytest.raises(CheckpointError, match=r"stages/pq\.json: damaged"):
        folder.finished("pq")
    with pytest.raises(CheckpointError, match=r"stages/pq\.json: damaged"):
        folder.seconds()


def test_numbers_that_json_does_not_know_are_never_written(path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RunFolder(path).finish("pq", 1.0, {"loss": float("nan")})
    assert RunFolder(path).finished("pq") is None


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "file.txt", "one")
    write_atomically(tmp_path / "deep" / "file.txt", "two")
    assert (tmp_path / "deep" / "file.txt").read_text() == "two"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_a_place_that_cannot_be_written_is_named(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file/run: cannot be written"):
        enter(tmp_path / "file" / "run", policy, resume=False)
