"""What a policy may say: defaults, bounds, the rules between keys, and the JSON Schema of it all."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pqcad_qat.policy.layer_rules import LayerRule
from pqcad_qat.policy.pretraining import UNET_KEYS, PretrainPolicy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.sections import Fault
from pqcad_qat.policy.study import StudyPolicy
from pqcad_qat.policy.variants import FP32, PQ, PQCAD_OPENVINO, PTQ

RULE: dict[str, Any] = {"match": "conv_in", "weights": {"bits": 4}, "inputs": {"bits": 8}}
SMALLEST: dict[str, Any] = {"name": "p", "model": {"source": "m"}, "quantization": {"layers": [RULE]}}
PRETRAIN: dict[str, Any] = {"kind": "pretrain", "name": "p", "model": {"class": "UNet2DModel", "sample_size": 32}}


def rule_faults(kind: type[Policy] | type[PretrainPolicy], data: dict[str, Any]) -> list[Fault]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(data)
    return [
        fault for error in caught.value.errors() if error["type"] == "policy_rule" for fault in error["ctx"]["faults"]
    ]


def quantization(*rules: dict[str, Any]) -> dict[str, Any]:
    return SMALLEST | {"quantization": {"layers": list(rules)}}


def test_a_policy_of_required_keys_alone_has_every_default() -> None:
    policy = Policy.model_validate(SMALLEST)
    assert (policy.sampler.steps, policy.distillation.student_steps) == (20, 10)
    assert policy.progressive.ladder == (8,)
    assert policy.evaluation.seed != policy.calibration.seed
    rule = policy.quantization.layers["0"]
    assert rule.match == ("conv_in",)
    assert rule.weights is not None
    assert (rule.weights.granularity, rule.weights.symmetric, rule.weights.scale) == ("per_channel", True, "statistics")
    assert rule.inputs is not None
    assert (rule.inputs.signed, rule.inputs.range) == ("auto", "mse")


def test_a_policy_cannot_be_changed() -> None:
    policy = Policy.model_validate(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        policy.sampler.steps = 10  # type: ignore[misc]


def test_a_policy_survives_json() -> None:
    policy = Policy.model_validate(SMALLEST)
    assert Policy.model_validate_json(policy.model_dump_json()) == policy
    assert Policy.model_validate(policy.model_dump(mode="json")) == policy


@pytest.mark.parametrize(
    ("section", "key", "allowed", "refused"),
    [
        ("sampler", "steps", [10, 1000], [0, 1001, 10.0, "10", True, None]),
        ("sampler", "name", ["ddim"], ["ddpm", 1]),
        ("calibration", "seed", [0, 2**32 - 1], [-1, 2**32]),
        ("progressive", "ladder", [[8], [8, 4, 2]], [[], [9, 4], [8, 1], [4, 8], [8, 8, 4], 8, ["8"]]),
        ("progressive", "momentum", [0.0, 0.99], [1.0, -0.1, float("nan")]),
        ("progressive", "deadline", [0.1, 1.0, 1], [0.0, 1.1]),
        ("progressive", "perturbation", [0.1], [0.0, float("inf")]),
        ("progressive", "transition", ["blend", "jump"], ["fade"]),
        ("progressive", "schedule", ["momentum", "fixed"], ["none"]),
        ("evaluation", "variants", [[FP32], [PTQ, PQCAD_OPENVINO]], [[], ["fp16"], PQ]),
        ("training", "ema", [0.0, 0.999], [1.0]),
        ("training", "precision", ["fp32", "bf16", "fp16"], ["fp64"]),
        ("export", "weights", ["int8", "packed"], ["int4"]),
        ("evaluation", "images", [2], [1]),
    ],
)
def test_bounds(section: str, key: str, allowed: list[object], refused: list[object]) -> None:
    for value in allowed:
        Policy.model_validate(SMALLEST | {section: {key: value}})
    for value in refused:
        with pytest.raises(ValidationError):
            Policy.model_validate(SMALLEST | {section: {key: value}})


@pytest.mark.parametrize("bits", [1, 9, 4.0, "4", True])
@pytest.mark.parametrize("quantizer", ["weights", "inputs"])
def test_widths_are_whole_numbers_from_2_to_8(quantizer: str, bits: object) -> None:
    with pytest.raises(ValidationError):
        LayerRule.model_validate(RULE | {quantizer: {"bits": bits}})


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (
            SMALLEST | {"sampler": {"steps": 20}, "distillation": {"student_steps": 8}},
            ("distillation", "student_steps"),
        ),
        (SMALLEST | {"distillation": {"teacher_weight": 0, "calibration_weight": 0.0}}, ("calibration_weight",)),
        (SMALLEST | {"progressive": {"ladder": [4, 6]}}, ("ladder",)),
        (SMALLEST | {"progressive": {"ladder": [3, 2]}}, ("quantization", "layers", "0", "weights", "bits")),
        (quantization(RULE | {"keep_float": True, "inputs": None}), ("weights",)),
        (quantization({"match": "a", "weights": {"bits": 4}}), ("inputs",)),
        (quantization(RULE | {"inputs": {"bits": 8, "symmetric": False, "signed": True}}), ("signed",)),
        (quantization(RULE, RULE | {"match": ["x", "conv_in"], "weights": {"bits": 3}}), ("layers", "1", "match")),
        (quantization(RULE | {"match": ["x", "role:first"]}), ("match",)),
    ],
)
def test_rules_between_keys_name_the_key_at_fault(data: dict[str, Any], key: tuple[str | int, ...]) -> None:
    assert [fault.keys[0] for fault in rule_faults(Policy, data)] == [key]


def test_a_pattern_may_stand_twice_with_the_same_contents() -> None:
    policy = Policy.model_validate(quantization(RULE, RULE | {"match": ["conv_in", "conv_out"]}))
    assert len(policy.quantization.layers) == 2


@pytest.mark.parametrize(
    "rule",
    [
        {"match": "a", "keep_float": True},
        RULE | {"inputs": {"bits": 8, "symmetric": True, "signed": False}},
        RULE | {"inputs": {"bits": 8, "symmetric": False, "signed": "auto"}},
        RULE | {"inputs": {"bits": 6}, "execution": "float"},
    ],
)
def test_allowed_rules(rule: dict[str, Any]) -> None:
    written = Policy.model_validate(quantization(rule)).quantization.layers["0"].model_dump(exclude_unset=True)
    assert written["match"] in (rule["match"], (rule["match"],))
    assert {key: written[key] for key in rule if key != "match"} == {
        key: value for key, value in rule.items() if key != "match"
    }


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"data": {"source": "folder"}}, ("path",)),
        ({"data": {"size": 16}}, ("model", "sample_size")),
        ({"training": {"steps": 100, "warmup": 100}}, ("warmup",)),
        ({"model": {"class": "UNet2DConditionModel", "sample_size": 32}}, ("model", "class")),
        (
            {"model": {"class": "UNet2DModel", "sample_size": 32, "block_out_channel": [32]}},
            ("model", "block_out_channel"),
        ),
    ],
)
def test_rules_between_keys_of_pretraining(change: dict[str, Any], key: tuple[str, ...]) -> None:
    assert [fault.keys[0] for fault in rule_faults(PretrainPolicy, PRETRAIN | change)] == [key]


def test_the_models_keys_are_those_of_diffusers() -> None:
    """Read from its source: importing diffusers takes far longer than all other tests here."""
    found = importlib.util.find_spec("diffusers")
    assert found is not None
    assert found.origin is not None
    tree = ast.parse((Path(found.origin).parent / "models" / "unets" / "unet_2d.py").read_text())
    [unet] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "UNet2DModel"]
    [init] = [node for node in unet.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert set(UNET_KEYS) == {argument.arg for argument in init.args.args} - {"self"} | {"class"}


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in [("Policy", schema), *schema.get("$defs", {}).items()]:
        for key, field in part["properties"].items():
            yield f"{name}.{key}", field


@pytest.mark.parametrize("kind", [Policy, PretrainPolicy, StudyPolicy])
def test_every_key_is_described(kind: type[Policy] | type[PretrainPolicy] | type[StudyPolicy]) -> None:
    undescribed = [
        name for name, field in fields(kind.model_json_schema()) if "description" not in field and "$ref" not in field
    ]
    assert undescribed == []


def test_a_policy_needs_no_torch() -> None:
    code = "import sys, pqcad_qat.policy.loading; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
