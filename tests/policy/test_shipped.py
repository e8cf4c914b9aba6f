"""Policies by name: a path wins, copies mean what they were copied from, and an installed package has them all.

Not here: what the policies that ship say (test_shipped_policies.py).
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from tiny_runs import POLICIES, REPOSITORY

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.loading import COMMANDS, load_policy, load_pretrain_policy
from pqcad_qat.policy.shipped import FOLDER, copy_policy, policy_file, shipped_policies, shipped_policy
from pqcad_qat.policy.study_cells import load_study

LOADERS = {"quantize": load_policy, "pretrain": load_pretrain_policy, "study": load_study}


def test_a_name_is_taken_for_the_policy_that_ships_and_a_path_that_is_there_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert policy_file("w4a8") == FOLDER / "w4a8.yaml"
    assert policy_file("smoke", "study") == FOLDER / "studies" / "smoke.yaml"
    (tmp_path / "w4a8").write_text("name: mine\n")
    assert policy_file("w4a8") == Path("w4a8")
    assert policy_file("no-such.yaml") == Path("no-such.yaml")


@pytest.mark.parametrize(("name", "kind"), [("w4a9", "quantize"), ("pretrain-digits", "quantize"), ("w4a8", "study")])
def test_a_name_that_nothing_of_the_kind_has_is_refused_with_those_that_ship(name: str, kind: str) -> None:
    with pytest.raises(PolicyError, match=f"{name}: got no file and no policy of that name; allowed a policy file, or"):
        policy_file(name, kind)  # type: ignore[arg-type]


def test_all_that_ship_are_listed_with_what_they_are_for() -> None:
    listed = shipped_policies()
    assert {policy.file for policy in listed} == {
        path.resolve() for path in POLICIES.rglob("*.yaml") if "examples" not in path.parts
    }
    assert all(policy.kind in COMMANDS and policy.summary.endswith(".") for policy in listed)


@pytest.mark.parametrize("policy", shipped_policies(), ids=lambda policy: f"{policy.kind}-{policy.name}")
def test_a_copy_elsewhere_means_the_same_but_for_its_name(policy, tmp_path: Path) -> None:
    load = LOADERS[policy.kind]
    file, *beside = copy_policy(policy, tmp_path / "mine.yaml")
    original, copy = load(policy.file), load(file)
    assert copy.name == "mine"
    assert {path.name for path in beside} <= {"prompts.txt"}
    if policy.kind == "study":
        assert len(copy.cells) == len(original.cells)
        return
    for key in ("quantization", "progressive", "distillation", "training", "data"):
        assert getattr(copy, key, None) == getattr(original, key, None)
    if beside:
        assert copy.conditions.prompts == str(tmp_path / "prompts.txt")


def test_a_copy_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(PolicyError, match=r"--copy: got .*prompts\.txt, which is there; allowed a new file"):
        copy_policy(shipped_policy("w4a8-sd15"), tmp_path / "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_policy_of_ones_own_stands_on_one_that_ships_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: w4a8\nname: mine\n")
    assert load_policy(tmp_path / "mine.yaml").quantization == load_policy(FOLDER / "w4a8.yaml").quantization
    (tmp_path / "mine.yaml").write_text("extends: w4a9\nname: mine\n")
    with pytest.raises(
        PolicyError, match="extends: got w4a9; allowed a policy file, relative to this one, or the name"
    ):
        load_policy(tmp_path / "mine.yaml")


def test_the_wheel_has_every_room_and_the_policies() -> None:
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {
        ".".join(file.parent.relative_to(REPOSITORY).parts) for file in REPOSITORY.glob("pqcad_qat/**/__init__.py")
    }
    assert set(build["packages"]) == {*rooms, "pqcad_qat.policies"}
    assert build["package-dir"] == {"pqcad_qat.policies": "policies"}
    patterns = build["package-data"]["pqcad_qat.policies"]
    shipped = {path for pattern in patterns for path in POLICIES.glob(pattern)}
    assert shipped == {path for path in POLICIES.rglob("*.*") if path.suffix not in (".md", ".safetensors", ".pyc")}
