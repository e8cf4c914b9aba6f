"""A study's file becomes cells: their names, labels and policies; and every fault of the study and its cells at once.

Not here: running them (test_sweep.py), faults of policies alone (test_policy_loading.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import POLICIES

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.study_cells import Study, load_study

SMOKE, W4A8 = POLICIES / "smoke.yaml", POLICIES / "w4a8.yaml"
GOOD = f"""\
kind: study
name: good
policies: [{SMOKE}]
set:
  evaluation.images: 16
axes:
  schedule:
    momentum: {{}}
    fixed: {{progressive.schedule: fixed, progressive: {{deadline: 0.5}}}}
  budget:
    long: {{progressive.steps: 400}}
seeds: [3, 1]
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> Path:
        path = tmp_path / "s.yaml"
        path.write_text(text)
        return path

    return written


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load_study(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def names(study: Study) -> list[str]:
    return [cell.name for cell in study.cells]


def test_cells_are_the_product_of_policies_levels_and_seeds(write: Write) -> None:
    study = load_study(write(GOOD))
    assert study.name == "good"
    assert names(study) == [
        f"smoke-{schedule}-long-seed{seed}" for schedule in ("momentum", "fixed") for seed in (3, 1)
    ]
    assert study.cells[0].labels == {"policy": "smoke", "schedule": "momentum", "budget": "long"}


def test_a_cell_is_its_policy_with_the_overrides_of_the_study_and_of_its_levels(write: Write) -> None:
    cell = load_study(write(GOOD)).cells[3]
    overrides = [
        "name=smoke-fixed-long",
        "evaluation.images=16",
        "progressive.schedule=fixed",
        "progressive.deadline=0.5",
    ]
    assert cell.policy == load_policy(SMOKE, [*overrides, "progressive.steps=400", "training.seed=1"])


def test_seeds_of_a_cell_differ_in_the_seed_alone(write: Write) -> None:
    one, other = (cell.policy for cell in load_study(write(GOOD)).cells[:2])
    assert one.training.seed == 3
    assert one == other.model_copy(update={"training": other.training.model_copy(update={"seed": 3})})


def test_a_study_without_axes_has_a_cell_a_policy(write: Write) -> None:
    study = load_study(write(f"kind: study\nname: plain\npolicies: [{SMOKE}, {W4A8}]\nset: {{evaluation.images: 8}}\n"))
    assert names(study) == ["smoke-seed0", "w4a8-seed0"]


def test_an_override_is_of_the_study_or_of_every_cell(write: Write) -> None:
    study = load_study(write(GOOD), ["seeds=[7]", "name=other", "progressive.steps=5", "model.source=/some/model"])
    assert (study.name, names(study)) == ("other", ["smoke-momentum-long-seed7", "smoke-fixed-long-seed7"])
    assert {(cell.policy.progressive.steps, cell.policy.model.source) for cell in study.cells} == {(5, "/some/model")}


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        ("evaluation.images: 16", "evaluation.imags: 16", "s.yaml:5: evaluation.imags: got an unknown key"),
        (
            "evaluation.images: 16",
            "quantization.layers.9.keep_float: true",
            "s.yaml:5: quantization.layers.9.match: got nothing; allowed non-empty text",
        ),
        (
            "evaluation.images: 16",
            "training.seed: 1",
            "s.yaml:5: set.training.seed: got a key that the study sets itself; allowed seeds",
        ),
        (
            "evaluation.images: 16",
            "training: {seed: 1}",
            "s.yaml:5: set.training.seed: got a key that the study sets itself",
        ),
        ("steps: 400", "steps: 0", "s.yaml:11: progressive.steps: got 0; allowed auto or a whole number at least 1"),
        ("budget:", "bud get:", "s.yaml:10: axes.bud get: got 'bud get'; allowed a name of letters, digits"),
        ("{progressive.steps: 400}", "[400]", "s.yaml:11: axes.budget.long: got [400]; allowed a mapping"),
        (
            "progressive.steps: 400",
            "progressive.schedule: fixed",
            "s.yaml:11: axes.budget.long.progressive.schedule: got a key of two axes",
        ),
        ("seeds: [3, 1]", "seeds: [3, 3]", "s.yaml:12: seeds: got [3, 3]; allowed each seed once"),
        ("seeds: [3, 1]", "seeds: []", "s.yaml:12: seeds: got []; allowed a list of one or more"),
        (
            "seeds:",
            "sedes:",
            "s.yaml:12: sedes: got an unknown key; allowed kind, name, policies, set, axes, seeds (did "
            "you mean seeds?)",
        ),
        (
            f"[{SMOKE}]",
            "[nothing.yaml]",
            "s.yaml:3: policies[0]: got nothing.yaml; allowed a policy file, relative to this one",
        ),
        (
            f"[{SMOKE}]",
            f"[{SMOKE}, {SMOKE}]",
            "s.yaml:3: policies: got the cell smoke-momentum-long-seed3 twice; allowed policies and levels whose",
        ),
        (
            "kind: study",
            "kind: quantize",
            "s.yaml:1: kind: got quantize, a policy for the command `run`; allowed study",
        ),
    ],
)
def test_a_fault_has_its_line(write: Write, old: str, new: str, report: str) -> None:
    assert old in GOOD
    assert faults(write(GOOD.replace(old, new)))[0].startswith(report)


def test_all_faults_are_reported_at_once(write: Write) -> None:
    text = (
        GOOD.replace("images: 16", "images: 1").replace("steps: 400", "steps: 0").replace("[3, 1]", "[-1]")
        + "more: 1\n"
    )
    found = faults(write(text), "sampler.sped=3")
    assert [fault.split(": got")[0] for fault in found] == [
        "--set sampler.sped: sampler.sped",
        *("s.yaml:5: evaluation.images", "s.yaml:11: progressive.steps", "s.yaml:12: seeds[0]", "s.yaml:13: more"),
    ]


def test_a_fault_of_a_policy_has_the_policys_line(write: Write, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"extends: {SMOKE}\nname: p\nsampler: {{sped: 3}}\n")
    [fault] = faults(write(GOOD.replace(str(SMOKE), "p.yaml")))
    assert fault.startswith("p.yaml:3: sampler.sped: got an unknown key")


def test_cells_of_different_models_may_have_features_of_their_own(write: Write, tmp_path: Path) -> None:
    digits = "model: {source: 'embedded:digits'}\n"
    (tmp_path / "digits.yaml").write_text(f"extends: {SMOKE}\nname: digits\n{digits}")
    study = load_study(write(GOOD.replace(f"[{SMOKE}]", f"[{SMOKE}, digits.yaml]")))
    features = {cell.policy.model.source: cell.policy.features for cell in study.cells}
    assert features == {source: source for source in ("embedded:fashion-mnist", "embedded:digits")}


def test_cells_whose_fids_could_not_stand_in_one_table_are_refused(write: Write) -> None:
    text = GOOD.replace("  budget:\n", "  budget:\n    few: {evaluation.images: 8}\n")
    assert (
        "evaluation.images: got 16, 8 in different cells of embedded:fashion-mnist; allowed one, for "
        "Frechet distances to be compared" in faults(write(text))[0]
    )
