"""Every path of a policy is relative to the file in which it stands, wherever the command runs; of the command line, to
the working folder.

Not here: what is done with the files (test_conditions.py, test_feature_network.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import POLICIES

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.loading import dump_policy, load_policy, load_pretrain_policy
from pqcad_qat.policy.study_cells import load_study

RULES = "quantization: {layers: [{match: '*', weights: {bits: 8}, inputs: {bits: 8}}]}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of policies, with what they name beside them; the command runs in another, which is empty."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = tmp_path / "policies"
    (there / "my_ddpm").mkdir(parents=True)
    (there / "prompts.txt").write_text("a cat\n")
    (there / "base.yaml").write_text(
        "name: base\nmodel: {source: my_ddpm}\nconditions: {prompts: prompts.txt}\nevaluation: "
        "{features: ../features}\n" + RULES
    )
    (tmp_path / "features").mkdir()
    return there


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(PolicyError) as caught:
        load_policy(path, overrides)
    return str(caught.value)


def test_paths_are_those_of_the_policys_folder_from_every_working_folder(folder: Path) -> None:
    policy = load_policy(folder / "base.yaml")
    assert policy.model.source == str(folder / "my_ddpm")
    assert policy.conditions.prompts == str(folder / "prompts.txt")
    assert policy.evaluation.features == str(folder.parent / "features")
    with inside(folder):
        assert load_policy(Path("base.yaml")) == policy
    with inside(folder.parent):
        assert load_policy(Path("policies/base.yaml")) == policy


def test_a_path_is_relative_to_the_file_in_which_its_key_stands(folder: Path) -> None:
    (folder / "deep").mkdir()
    child = folder / "deep" / "child.yaml"
    child.write_text("extends: ../base.yaml\nname: child\nconditions: {prompts: null, embeddings: text.safetensors}\n")
    policy = load_policy(child)
    assert policy.model.source == str(folder / "my_ddpm")
    assert policy.conditions.embeddings == str(folder / "deep" / "text.safetensors")


def test_what_a_run_keeps_of_its_policy_is_the_same_from_anywhere(folder: Path, tmp_path: Path) -> None:
    policy = load_policy(folder / "base.yaml")
    run = tmp_path / "runs" / "base"
    run.mkdir(parents=True)
    (run / "policy.yaml").write_text(dump_policy(policy))
    with inside(tmp_path / "third"):
        assert load_policy(run / "policy.yaml") == policy


def test_a_path_of_the_command_line_is_the_working_folders(folder: Path) -> None:
    (Path.cwd() / "mine").mkdir()
    policy = load_policy(folder / "base.yaml", ["model.source=mine", "conditions={prompts: words.txt}"])
    assert policy.model.source == str(Path.cwd() / "mine")
    assert policy.conditions.prompts == "words.txt"  # not there: told as it was typed


@pytest.mark.parametrize(
    "word",
    ["embedded:digits", "module:mine", "stabilityai/stable-diffusion-3.5-medium", "sdxl-base-1.0", "my_other_ddpm"],
)
def test_names_that_are_no_paths_stay(folder: Path, word: str) -> None:
    (folder / "p.yaml").write_text(f"extends: base.yaml\nmodel: {{source: '{word}'}}\nevaluation: {{features: none}}\n")
    policy = load_policy(folder / "p.yaml")
    assert (policy.model.source, policy.evaluation.features) == (word, "none")


@pytest.mark.parametrize("path", ["./my_other", "../runs/digits/model", "runs/digits/model"])
def test_a_model_that_can_be_no_hub_id_is_a_path_although_nothing_is_there(folder: Path, path: str) -> None:
    (folder / "p.yaml").write_text(f"extends: base.yaml\nmodel: {{source: {path}}}\n")
    assert load_policy(folder / "p.yaml").model.source == os.path.normpath(folder / path)


def test_a_folder_beside_the_policy_wins_over_a_hub_id(folder: Path) -> None:
    (folder / "owner" / "name").mkdir(parents=True)
    (folder / "p.yaml").write_text("extends: base.yaml\nmodel: {source: owner/name}\n")
    assert load_policy(folder / "p.yaml").model.source == str(folder / "owner" / "name")


def test_the_users_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "p.yaml").write_text("extends: base.yaml\nmodel: {source: ~/my_ddpm}\n")
    assert load_policy(folder / "p.yaml").model.source == str(folder / "my_ddpm")


@pytest.mark.parametrize(
    ("key", "line"), [("model: {source: here}", "model.source"), ("conditions: {prompts: here}", "conditions.prompts")]
)
def test_a_path_that_is_there_from_the_working_folder_alone_is_refused_with_where_it_was_looked_for(
    folder: Path, key: str, line: str
) -> None:
    (Path.cwd() / "here").mkdir()
    (folder / "p.yaml").write_text(f"extends: base.yaml\n{key}\n")
    message = fault(folder / "p.yaml")
    assert message.startswith(
        f"{folder / 'p.yaml'}:2: {line}: got 'here'; allowed a path from the folder of p.yaml, such as "
    )
    assert "such as ../elsewhere/here" in message
    assert f"{folder / 'here'} is not there" in message


def test_a_path_that_no_file_system_takes_is_a_fault_of_its_key(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    for text, why in (
        ("a" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
        ('"a\\0b"', "with a character that no path has"),
    ):
        for key in ("model: {source: %s}", "conditions: {prompts: %s}", "evaluation: {features: %s}"):
            (folder / "p.yaml").write_text(f"extends: base.yaml\n{key % text}\n")
            message = fault(folder / "p.yaml")
            assert message.startswith(f"{folder / 'p.yaml'}:2: ")
            assert why in message
            assert len(message) < 400 + len(str(folder))
        assert why in fault(folder / "base.yaml", f"model.source={text.replace('loop', str(folder / 'loop'))}")


def test_the_paths_of_a_study_are_relative_to_the_study(folder: Path) -> None:
    studies = folder / "studies"
    (studies / "other").mkdir(parents=True)
    (studies / "s.yaml").write_text(
        "kind: study\nname: s\npolicies: [../base.yaml]\nset: {conditions.prompts: ../prompts.txt}\n"
        "axes: {model: {one: {model.source: ../my_ddpm}, two: {model: {source: other}}}}\n"
    )
    study = load_study(studies / "s.yaml")
    assert [cell.policy.model.source for cell in study.cells] == [str(folder / "my_ddpm"), str(studies / "other")]
    assert {cell.policy.conditions.prompts for cell in study.cells} == {str(folder / "prompts.txt")}
    (folder / "above.yaml").write_text("extends: studies/s.yaml\nname: above\n")
    assert [cell.policy.model.source for cell in load_study(folder / "above.yaml").cells] == [
        cell.policy.model.source for cell in study.cells
    ]


def test_the_data_of_a_pretraining_policy_lie_relative_to_it(folder: Path) -> None:
    (folder / "pictures").mkdir()
    (folder / "p.yaml").write_text(
        f"extends: {POLICIES / 'pretrain-digits.yaml'}\ndata: {{source: folder, path: pictures}}\n"
    )
    assert load_pretrain_policy(folder / "p.yaml").data.path == str(folder / "pictures")
