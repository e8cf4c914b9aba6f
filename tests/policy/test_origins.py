"""Errors that a model makes of a policy name the file and line of the key, wherever it was written; and the places are
no part of a policy.

Not here: faults of a file alone (test_policy_loading.py).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from tiny_runs import POLICIES, SCHEDULER
from torch import Tensor, nn

from pqcad_qat.errors import PlanError, PqcadError
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.loading import dump_policy, load_policy
from pqcad_qat.policy.origins import key_location, key_path, located
from pqcad_qat.stages.prepared import planned_shapes, prepare, with_own_model

BASE = """\
name: base
model:
  source: embedded:digits
sampler:
  name: {sampler}
quantization:
  layers:
    - match: "type:Conv2d"
      weights: {{bits: 8}}
      inputs: {{bits: 8}}
    - match:
        - "type:Linear"
        - {pattern}
      weights: {{bits: 8}}
      inputs: {{bits: 8}}
"""


class Labelled(nn.Module):
    """A denoiser that takes labels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = self.conv(x) + labels[:, None, None, None] + t[:, None, None, None]
        return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, sampler: str = "ddim", pattern: str = "time_embedding.*") -> Path:
    path = folder / "base.yaml"
    path.write_text(BASE.format(sampler=sampler, pattern=pattern))
    return path


def told(path: Path, *overrides: str, own: OwnModel | None = None) -> str:
    policy = with_own_model(load_policy(path, overrides), own)
    with pytest.raises(PqcadError) as caught:
        planned_shapes(policy, own)
    with pytest.raises(type(caught.value)) as again:
        prepare(policy, own=own)
    assert str(again.value) == str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_a_rule_that_matches_nothing_is_told_with_its_file_and_line(tmp_path: Path) -> None:
    message = told(written(tmp_path, pattern="conv_inn"))
    assert message.startswith(
        "base.yaml:11: quantization.layers[1].match: got 'conv_inn', which matches no Conv2d or Linear"
    )


def test_a_rule_keeps_the_file_where_it_stands_through_extends(tmp_path: Path) -> None:
    written(tmp_path, pattern="conv_inn")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nname: child\n")
    assert told(child).startswith("base.yaml:11: quantization.layers[1].match")


def test_a_rule_of_the_command_line_names_its_flag(base: Path) -> None:
    message = told(base, "quantization.layers.0.match=conv_inn")
    assert message.startswith("--set quantization.layers.0.match: quantization.layers[0].match: got 'conv_inn'")


def test_a_key_that_does_not_fit_the_model_is_told_with_its_file_and_line(tmp_path: Path) -> None:
    assert told(written(tmp_path, sampler="euler")).startswith("base.yaml:5: sampler.name: got 'euler'")


def test_a_default_that_does_not_fit_has_the_line_of_what_is_there(base: Path) -> None:
    with pytest.raises(PlanError) as caught, located(load_policy(base)):
        raise PlanError(
            "sampler.guidance_scale: got 2; allowed 1\nsampler: got it\nexport.batch_size: got 1; "
            "allowed 2\nno key: of any policy"
        )
    lines = str(caught.value).replace(f"{base.parent}/", "").splitlines()
    assert [line.split(": got")[0] for line in lines] == [
        "base.yaml:4: sampler.guidance_scale",
        "base.yaml:4: sampler",
        "base.yaml:1: export.batch_size",
        "no key: of any policy",
    ]


def test_an_error_is_located_once(base: Path) -> None:
    policy = load_policy(base)
    with pytest.raises(PlanError) as caught, located(policy), located(policy):
        raise PlanError("sampler.name: got x; allowed y")
    assert str(caught.value) == f"{base}:5: sampler.name: got x; allowed y"


def test_places_are_no_part_of_what_a_policy_says(base: Path, tmp_path: Path) -> None:
    policy = load_policy(base)
    other = tmp_path / "other.yaml"
    other.write_text(f"# elsewhere\n{base.read_text()}")
    assert load_policy(other) == policy
    assert hash(load_policy(other)) == hash(policy)
    assert ".yaml" not in dump_policy(policy)
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy
    assert again.origins.places == policy.origins.places


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("conditions: {classes: [12]}", "child.yaml:3: conditions.classes: got 12; allowed 0 to 9"),
        ("conditions: {embeddings: nothing.safetensors}", "child.yaml:3: conditions.embeddings: got "),
        (
            "training: {activation_checkpointing: true}",
            "child.yaml:3: training.activation_checkpointing: got true; allowed false",
        ),
        ("sampler: {guidance_scale: 3.0}", "child.yaml:3: sampler.guidance_scale: got 3; allowed 1, or a condition"),
    ],
)
def test_what_does_not_fit_the_model_is_told_by_plan_as_by_a_run(base: Path, section: str, message: str) -> None:
    own = OwnModel("labelled", Labelled, (1, 8, 8), SCHEDULER, conditions=(ConditionInput("labels", (), "int64", 10),))
    child = base.parent / "child.yaml"
    child.write_text(f"extends: base.yaml\nname: child\n{section}\n")
    rules = "quantization.layers=[{match: '*', weights: {bits: 8}, inputs: {bits: 8}}]"
    assert told(child, rules, own=own).startswith(message)


@pytest.mark.parametrize("location", [("a",), ("quantization", "layers", 12, "weights", "bits"), ("a", 0, 1)])
def test_a_keys_path_leads_back_to_it(location: tuple[str | int, ...]) -> None:
    assert key_location(key_path(location)) == location


def test_every_shipped_policy_knows_where_its_rules_stand() -> None:
    policy = load_policy(POLICIES / "smoke.yaml")
    assert str(policy.origins.place(("quantization", "layers", "first", "match"))).startswith(
        f"{POLICIES / 'w4a8.yaml'}:"
    )
