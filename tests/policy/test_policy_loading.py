"""A policy file becomes a Policy, or one report of all its faults with file, line and key; extends, overrides, and the
way back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.loading import difference, dump_policy, json_schema, load_policy, load_pretrain_policy
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.schema import Policy

POLICIES = Path(__file__).parents[2] / "policies"
SHIPPED = sorted(path.name for path in POLICIES.glob("*.yaml"))
GOOD = """\
name: good
model: {source: embedded:fashion-mnist}
sampler:
  steps: 20
quantization:
  layers:
    - match: conv_in
      weights: {bits: 8}
      inputs: {bits: 8}
    - match: ["type:Conv2d"]
      weights: {bits: 4}
      inputs: {bits: 8}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str | bytes, name: str = "p.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def faults(path: Path, *overrides: str, load: Callable[..., object] = load_policy) -> list[str]:
    """The lines of the report, with file names instead of paths."""
    with pytest.raises(PolicyError) as caught:
        load(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def load_shipped(name: str) -> Policy | PretrainPolicy:
    return load_pretrain_policy(POLICIES / name) if name.startswith("pretrain") else load_policy(POLICIES / name)


# --- faults of keys: one change to the good policy, one line in the report
# ---------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        (
            "  steps: 20",
            "  stepz: 20",
            "p.yaml:4: sampler.stepz: got an unknown key; allowed name, steps, float_steps, guidance_scale (did you "
            "mean steps?)",
        ),
        (
            "  steps: 20",
            "  colour: 20",
            "p.yaml:4: sampler.colour: got an unknown key; allowed name, steps, float_steps, guidance_scale",
        ),
        ("  steps: 20", "  steps: 2000", "p.yaml:4: sampler.steps: got 2000; allowed a whole number from 1 to 1000"),
        (
            "  steps: 20",
            '  steps: "20"',
            'p.yaml:4: sampler.steps: got "20" (text, not a number); allowed a whole number from 1 to 1000',
        ),
        ("  steps: 20", "  steps: 20.0", "p.yaml:4: sampler.steps: got 20.0; allowed a whole number from 1 to 1000"),
        ("  steps: 20", "  steps: yes", "p.yaml:4: sampler.steps: got true; allowed a whole number from 1 to 1000"),
        ("  steps: 20", "  steps:", "p.yaml:4: sampler.steps: got null; allowed a whole number from 1 to 1000"),
        (
            "  steps: 20",
            "  steps: 2024-13-45",
            'p.yaml:4: sampler.steps: got "2024-13-45"; allowed a whole number from 1 to 1000',
        ),
        (
            "  steps: 20",
            "  guidance_scale: 0.5",
            "p.yaml:4: sampler.guidance_scale: got 0.5; allowed a number at least 1",
        ),
        ("  steps: 20", "  name: ddpm", 'p.yaml:4: sampler.name: got "ddpm"; allowed ddim, euler or null'),
        (
            "sampler:\n  steps: 20",
            "sampler: 20",
            "p.yaml:3: sampler: got 20; allowed a mapping with the keys name, steps, float_steps, guidance_scale",
        ),
        ("{source: embedded:fashion-mnist}", "{}", "p.yaml:2: model.source: got nothing; allowed non-empty text"),
        (
            "name: good",
            "name: a/b",
            'p.yaml:1: name: got "a/b"; allowed text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$',
        ),
        (
            "{bits: 4}",
            "{bits: 9}",
            "p.yaml:11: quantization.layers[1].weights.bits: got 9; allowed a whole number from 2 to 8",
        ),
        (
            "{bits: 4}",
            "{}",
            "p.yaml:11: quantization.layers[1].weights.bits: got nothing; allowed a whole number from 2 to 8",
        ),
        ('["type:Conv2d"]', "[3]", "p.yaml:10: quantization.layers[1].match[0]: got 3; allowed non-empty text"),
        ('["type:Conv2d"]', '""', 'p.yaml:10: quantization.layers[1].match[0]: got ""; allowed non-empty text'),
        (
            '["type:Conv2d"]',
            "[]",
            "p.yaml:10: quantization.layers[1].match: got []; allowed non-empty text or a list of one or "
            "more, each non-empty text",
        ),
        (
            "{bits: 4}",
            "{bits: 4, scales: learned}",
            "p.yaml:11: quantization.layers[1].weights.scales: got an unknown key; "
            "allowed bits, granularity, symmetric, scale, range (did you mean scale?)",
        ),
        (
            "{bits: 4}",
            "{bits: 4, granularity: per_row}",
            'p.yaml:11: quantization.layers[1].weights.granularity: got "per_row"; allowed per_channel or per_tensor',
        ),
        (
            "weights: {bits: 4}\n      inputs: {bits: 8}",
            "weights: {bits: 4}\n      inputs:\n        bits: 8\n        signed: perhaps",
            'p.yaml:14: quantization.layers[1].inputs.signed: got "perhaps"; allowed true, false or auto',
        ),
        (
            "  steps: 20",
            "  steps: 20\nprogressive:\n  ladder:\n    - 8\n    - 9",
            "p.yaml:8: progressive.ladder[1]: got 9; allowed a whole number from 2 to 8",
        ),
        (
            "  steps: 20",
            "  steps: 20\nprogressive: {deadline: 0}",
            "p.yaml:5: progressive.deadline: got 0; allowed a number over 0 and at most 1",
        ),
        (
            "  steps: 20",
            "  steps: 20\nprogressive: {perturbation: .nan}",
            "p.yaml:5: progressive.perturbation: got NaN; allowed a number over 0",
        ),
        (
            "  steps: 20",
            "  steps: 20\n  steps: 10",
            "p.yaml:5: sampler.steps: got the key a second time (first on line 4); allowed once",
        ),
        (
            "  steps: 20",
            "  steps: 20\n  ? [1, 2]\n  : 3",
            "p.yaml:5: sampler: got a list or mapping for a key; allowed text",
        ),
    ],
)
def test_a_fault_of_a_key_has_its_line(write: Write, old: str, new: str, report: str) -> None:
    assert faults(write(GOOD.replace(old, new))) == [report]


@pytest.mark.parametrize(
    ("added", "report"),
    [
        (
            "distillation:\n  student_steps: 8",
            "p.yaml:14: distillation.student_steps: got 8; allowed a divisor of sampler.steps (20)",
        ),
        (
            "progressive:\n  ladder: [6, 8]",
            "p.yaml:14: progressive.ladder: got [6, 8]; allowed widths in strictly descending order",
        ),
        (
            "progressive:\n  ladder: [6, 4]",
            "p.yaml:8: quantization.layers[0].weights.bits: got 8; allowed at most 6, the first width of "
            "progressive.ladder",
        ),
        (
            "distillation:\n  teacher_weight: 0\n  calibration_weight: 0",
            "p.yaml:15: distillation.calibration_weight: got 0; allowed a number over 0, as teacher_weight is 0 too",
        ),
        (
            "    - match: type:Linear\n      keep_float: true\n      weights: {bits: 4}",
            "p.yaml:15: quantization.layers[2].weights: got a quantizer; allowed none, as keep_float is true",
        ),
        (
            "    - match: type:Linear\n      weights: {bits: 4}",
            "p.yaml:13: quantization.layers[2].inputs: got nothing; "
            "allowed a quantizer such as {bits: 8}, or keep_float: true for the rule",
        ),
        (
            "    - match: type:Linear\n      weights: {bits: 4}\n      inputs:\n        bits: 8\n        "
            "symmetric: false\n        signed: true",
            "p.yaml:18: quantization.layers[2].inputs.signed: got true; allowed auto, as symmetric is false",
        ),
        (
            "    -\n      match: [conv_out, conv_in]\n      weights: {bits: 3}\n      inputs: {bits: 8}",
            "p.yaml:14: quantization.layers[2].match: got 'conv_in'; allowed a pattern once; rule [0] "
            "has it already, with other contents",
        ),
    ],
)
def test_a_broken_rule_between_keys_has_its_line(write: Write, added: str, report: str) -> None:
    assert faults(write(GOOD + added)) == [report]


def test_a_rule_broken_by_a_default_has_the_line_of_the_key_that_is_there(write: Write) -> None:
    report = "p.yaml:4: distillation.student_steps: got 10; allowed a divisor of sampler.steps (15)"
    assert faults(write(GOOD.replace("steps: 20", "steps: 15"))) == [report]


def test_all_faults_are_reported_at_once_in_the_order_of_lines(write: Write) -> None:
    """Typos, types, bounds, repeated keys and rules between keys, also between sections that have other faults."""
    text = (
        GOOD.replace("name: good", "nam: good")
        .replace("steps: 20", "steps: 20\n  stepz: 1")
        .replace("{bits: 4}", "{bits: 40}")
        + "distillation: {student_steps: 8, steps: none}\n"
        + "training:\n  learning_rate: fast\n  seed: 1\n  seed: 2\n"
        + "progressive: {ladder: [4, 6, 8], momentum: 2}\n"
    )
    assert [line.split(": got")[0] for line in faults(write(text))] == [
        "p.yaml:1: name",
        "p.yaml:1: nam",
        "p.yaml:5: sampler.stepz",
        "p.yaml:12: quantization.layers[1].weights.bits",
        "p.yaml:14: distillation.steps",
        "p.yaml:14: distillation.student_steps",
        "p.yaml:16: training.learning_rate",
        "p.yaml:18: training.seed",
        "p.yaml:19: progressive.momentum",
        "p.yaml:19: progressive.ladder",
    ]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every mapping or list in a value with each of its keys or indices."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []:
        yield value, key
        yield from places(value[key])


def report_of(path: Path) -> str:
    try:
        load_policy(path)
    except PolicyError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("junk", ["", None, {"a": [1]}])
def test_nonsense_in_any_place_is_a_report_or_a_policy_and_no_crash(write: Write, junk: object) -> None:
    data = yaml.safe_load(dump_policy(load_policy(write(GOOD))))
    for holder, key in list(places(data)):
        kept, holder[key] = holder[key], junk
        report = report_of(write(yaml.safe_dump(data)))
        assert all(re.match(r".*p\.yaml:\d+: \S+( \S+)?: got .*; allowed .", line) for line in report.splitlines()), (
            report
        )
        holder[key] = kept


# --- faults of the file
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("", "p.yaml:1: top level: got an empty file; allowed a policy"),
        ("# only a comment\n", "p.yaml:1: top level: got an empty file; allowed a policy"),
        ("- a\n- b\n", 'p.yaml:1: top level: got ["a", "b"]; allowed a mapping with the keys kind, name, model'),
        ("name: a\nmodel: [1, 2\n", "p.yaml:3: got expected ',' or ']'"),
        ("name: a\nmodel:\n\tsource: x\n", "p.yaml:3: got found character '\\t' that cannot start any token"),
        ("name: a\nmodel: b: c\n", "p.yaml:2: got mapping values are not allowed here"),
        (
            "name: a\n---\nname: b\n",
            "p.yaml:2: got but found another document expected a single document in the stream",
        ),
        ("name: a\nmodel: *nobody\n", "p.yaml:2: got found undefined alias 'nobody'"),
        (
            "name: a\nmodel: !!python/object:os.system {a: b}\n",
            "p.yaml:2: got the tag tag:yaml.org,2002:python/object:os.system",
        ),
        ("name: a\nmodel: &m [*m]\n", "p.yaml:2: got a nesting of more than 40 levels"),
        ("name: a\nmodel: \x07\n", "p.yaml:2: got the character '\\x07'; allowed printable text"),
        (b"name: a\nmodel: \xe4\n", "p.yaml:2: got the byte 0xe4; allowed text in UTF-8"),
    ],
)
def test_a_file_that_is_no_policy(write: Write, text: str | bytes, start: str) -> None:
    [fault] = faults(write(text))
    assert fault.startswith(start)


def test_a_tab_is_told_apart_from_other_broken_yaml(write: Write) -> None:
    [fault] = faults(write("model:\n\tsource: x\n"))
    assert fault.endswith("allowed YAML (indent with spaces)")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert faults(tmp_path / "no.yaml") == [
        "no.yaml: got No such file or directory; allowed a policy file that can be read"
    ]
    (tmp_path / "folder").mkdir()
    assert faults(tmp_path / "folder") == ["folder: got a folder; allowed a policy file that can be read"]


def test_a_policy_of_the_other_kind_has_one_fault() -> None:
    pretrain, quantize = POLICIES / "pretrain-fashion-mnist.yaml", POLICIES / "w4a8.yaml"
    [fault] = faults(pretrain)
    assert fault.endswith("kind: got pretrain, a policy for the command `pretrain`; allowed quantize")
    [fault] = faults(quantize, load=load_pretrain_policy)
    assert fault.endswith("kind: got quantize, a policy for the command `run`; allowed pretrain")


# --- YAML
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# ----------------------------------------------------------------------------------------------------------------------


NUMBERS = [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.0e-4", 1e-4), (".5e-3", 5e-4), ("1", 1.0), ("0.0001", 1e-4)]


@pytest.mark.parametrize(("written", "value"), NUMBERS)
def test_every_spelling_of_a_number_is_a_number(write: Write, written: str, value: float) -> None:
    policy = load_policy(write(GOOD + f"training: {{learning_rate: {written}}}"))
    assert policy.training.learning_rate == value


def test_a_quoted_number_is_text(write: Write) -> None:
    [fault] = faults(write(GOOD + 'training: {learning_rate: "1e-4"}'))
    assert 'got "1e-4" (text, not a number)' in fault


def test_anchors_and_merge_keys_work(write: Write) -> None:
    text = GOOD.replace("inputs: {bits: 8}\n    -", "inputs: &eight {bits: 8, symmetric: false}\n    -")
    text = text.replace(
        "weights: {bits: 4}\n      inputs: {bits: 8}", "weights: {bits: 4}\n      inputs: {<<: *eight, range: mse}"
    )
    inputs = load_policy(write(text)).quantization.layers["1"].inputs
    assert inputs is not None
    assert (inputs.bits, inputs.symmetric, inputs.range) == (8, False, "mse")


def test_a_byte_order_mark_is_no_fault(write: Write) -> None:
    assert load_policy(write(b"\xef\xbb\xbf" + GOOD.encode())).name == "good"


# --- extends ----------------------------------------------------------------------------------------------------------


def test_extends_merges_mappings_and_replaces_lists(write: Write) -> None:
    write(GOOD + "training: {seed: 3, ema: 0.9}\nprogressive: {ladder: [8, 6, 4]}\n", "base.yaml")
    child = write("extends: base.yaml\nname: child\ntraining: {seed: 4}\nprogressive: {ladder: [8, 4]}\n")
    policy = load_policy(child)
    assert (policy.name, policy.training.seed, policy.training.ema, policy.progressive.ladder) == (
        "child",
        4,
        0.9,
        (8, 4),
    )
    assert len(policy.quantization.layers) == 2


def test_extends_is_relative_to_the_file_and_goes_on(write: Write, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(GOOD, "base.yaml")
    write("extends: ../base.yaml\nsampler: {steps: 40}\n", "deep/middle.yaml")
    assert load_policy(write("extends: deep/middle.yaml\nname: top\n")).sampler.steps == 40


def test_faults_name_the_file_that_has_them(write: Write) -> None:
    write(GOOD.replace("steps: 20", "stepz: 20"), "base.yaml")
    found = faults(write("extends: base.yaml\nname: child\ntraining:\n  sede: 4\n"))
    assert [line.split(": got")[0] for line in found] == ["base.yaml:4: sampler.stepz", "p.yaml:4: training.sede"]


def test_a_rule_between_two_files_has_the_line_of_the_key_at_fault(write: Write) -> None:
    write(GOOD, "base.yaml")
    child = write("extends: base.yaml\ndistillation:\n  student_steps: 8\n")
    assert faults(child) == ["p.yaml:3: distillation.student_steps: got 8; allowed a divisor of sampler.steps (20)"]


def test_a_circle_of_extends(write: Write) -> None:
    write("name: b\nextends: p.yaml\n" + GOOD.removeprefix("name: good\n"), "b.yaml")
    report = faults(write("extends: b.yaml\n"))
    assert report == ["b.yaml:2: extends: got p.yaml, which leads back to itself; allowed no circle"]


@pytest.mark.parametrize(("value", "got"), [("no.yaml", "no.yaml"), ("[a.yaml]", "['a.yaml']"), ("3", "3"), (".", ".")])
def test_extends_of_no_file(write: Write, value: str, got: str) -> None:
    [fault] = faults(write(GOOD + f"extends: {value}\n"))
    allowed = "a policy file, relative to this one, or the name of a policy that ships"
    assert fault == f"p.yaml:13: extends: got {got}; allowed {allowed}"


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("sampler.steps=40", lambda p: p.sampler.steps, 40),
        ("quantization.layers.1.weights.bits=3", lambda p: p.quantization.layers["1"].weights.bits, 3),
        ("quantization.layers[1].weights.bits=3", lambda p: p.quantization.layers["1"].weights.bits, 3),
        ("progressive.ladder=[8, 2]", lambda p: p.progressive.ladder, (8, 2)),
        ("training.learning_rate=1e-5", lambda p: p.training.learning_rate, 1e-5),
        ("training={seed: 7}", lambda p: p.training.seed, 7),
        ("model.source=a=b", lambda p: p.model.source, "a=b"),
        ("quantization.split_shortcuts=false", lambda p: p.quantization.split_shortcuts, False),
    ],
)
def test_an_override_sets_one_value(write: Write, override: str, read: Callable[[Policy], Any], value: object) -> None:
    assert read(load_policy(write(GOOD), [override])) == value


def test_overrides_apply_in_order_and_merge_mappings(write: Write) -> None:
    policy = load_policy(write(GOOD), ["training={seed: 7, ema: 0.5}", "training={seed: 8}"])
    assert (policy.training.seed, policy.training.ema) == (8, 0.5)


@pytest.mark.parametrize(
    ("override", "report"),
    [
        (
            "sampler.stepz=4",
            "--set sampler.stepz: sampler.stepz: got an unknown key; allowed name, steps, "
            "float_steps, guidance_scale (did you mean steps?)",
        ),
        ("sampler.steps=0", "--set sampler.steps: sampler.steps: got 0; allowed a whole number from 1 to 1000"),
        (
            "sampler.steps.x=0",
            '--set sampler.steps.x: sampler.steps: got {"x": 0}; allowed a whole number from 1 to 1000',
        ),
        (
            "quantization.layers.2.keep_float=true",
            "--set quantization.layers.2.keep_float: got index 2; allowed 0 to 1",
        ),
        (
            "quantization.layers.first.keep_float=true",
            "--set quantization.layers.first.keep_float: got index first; allowed 0 to 1",
        ),
        ("sampler.steps", "--set sampler.steps: got no key and value; allowed key=value, such as sampler.steps=10"),
        ("=3", "--set =3: got no key and value; allowed key=value, such as sampler.steps=10"),
        (
            "quantization.layers.0.weights.bits=1",
            "--set quantization.layers.0.weights.bits: quantization.layers[0].weights.bits: got 1; "
            "allowed a whole number from 2 to 8",
        ),
        (
            "distillation.student_steps=3",
            "--set distillation.student_steps: distillation.student_steps: got 3; allowed a divisor of "
            "sampler.steps (20)",
        ),
    ],
)
def test_a_fault_of_an_override_names_it(write: Write, override: str, report: str) -> None:
    assert faults(write(GOOD), override) == [report]


def test_an_override_of_broken_yaml(write: Write) -> None:
    [fault] = faults(write(GOOD), "progressive.ladder=[8")
    assert fault.startswith("--set progressive.ladder: got expected ',' or ']'")


def test_an_override_can_mend_a_fault_of_the_file(write: Write) -> None:
    assert load_policy(write(GOOD.replace("steps: 20", "steps: 0")), ["sampler.steps=30"]).sampler.steps == 30


# --- back to text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("whole", [True, False])
def test_shipped_policies_load_and_come_back_from_their_dump(write: Write, name: str, whole: bool) -> None:
    policy = load_shipped(name)
    copy = write(dump_policy(policy, whole))
    assert policy == (load_pretrain_policy(copy) if isinstance(policy, PretrainPolicy) else load_policy(copy))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policies_open_with_their_purpose_and_command_and_are_named_after_their_file(name: str) -> None:
    comment = [line for line in (POLICIES / name).read_text().splitlines()[:10] if line.startswith("#")]
    assert len(comment[0]) > 30
    command = "pretrain" if name.startswith("pretrain") else "run"
    assert f"#     python -m pqcad_qat {command} policies/{name}" in [
        line.removesuffix(" --model FOLDER") for line in comment
    ]
    assert load_shipped(name).name == name.removesuffix(".yaml").removeprefix("pretrain-")


def test_the_policies_that_ship() -> None:
    widths = [
        "mixed",
        "w2a8",
        "w3a8",
        "w4a4",
        "w4a6",
        "w4a8",
        "w4a8-digits",
        "w4a8-digits-classes",
        "w4a8-dit",
        "w4a8-noto-emoji",
        "w4a8-ptq",
        "w4a8-sd15",
        "w6a6",
        "w8a8",
        "w8a8-dit-xl-2",
        "w8a8-flux",
        "w8a8-pixart",
        "w8a8-ptq",
        "w8a8-qat",
        "w8a8-sd15",
        "w8a8-sd3",
        "w8a8-sdxl",
    ]
    models = ["pretrain-digits", "pretrain-digits-classes", "pretrain-fashion-mnist", "pretrain-noto-emoji"]
    assert sorted(f"{name}.yaml" for name in [*widths, *models, "smoke"]) == SHIPPED


@pytest.mark.parametrize("text", ["1e4", "yes", "null", "größe #1: [x]", "2024-11-02", "a\nb", "~"])
def test_awkward_text_comes_back_from_its_dump(write: Write, text: str) -> None:
    policy = load_policy(write(GOOD), ["training.learning_rate=1.25e-7", "progressive.perturbation=1"])
    rules = {"0": policy.quantization.layers["0"].model_copy(update={"match": (text,)})}
    policy = policy.model_copy(update={"quantization": policy.quantization.model_copy(update={"layers": rules})})
    assert load_policy(write(dump_policy(policy), "copy.yaml")) == policy


def test_difference_names_each_changed_key_with_both_values(write: Write) -> None:
    before = load_policy(write(GOOD))
    keep_float = "quantization.layers.1={inputs: null, weights: null, keep_float: true}"
    after = load_policy(write(GOOD), ["sampler.steps=40", "progressive.ladder=[8, 2]", keep_float])
    found = difference(before, after)
    assert found[0] == "sampler.steps: was 20, now 40"
    assert found[-1] == "progressive.ladder: was [8], now [8, 2]"
    assert "quantization.layers[1].weights.bits: was 4, now nothing" in found
    assert "quantization.layers[1].keep_float: was false, now true" in found
    assert difference(before, before) == []


# --- the JSON Schema --------------------------------------------------------------------------------------------------


def unknown_keys(value: object, node: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    """The keys of a value that the schema does not list, by a walk of our own."""
    if "$ref" in node:
        node = parts[node["$ref"].rsplit("/", 1)[1]]
    kind = "array" if isinstance(value, list) else "object"
    members = [parts[m["$ref"].rsplit("/", 1)[1]] if "$ref" in m else m for m in node.get("anyOf", [])]
    node = next((member for member in members if member.get("type") == kind), node)
    if isinstance(value, list):
        return [key for item in value for key in unknown_keys(item, node.get("items", {}), parts)]
    if isinstance(value, dict) and isinstance(node.get("additionalProperties"), dict):
        return [key for item in value.values() for key in unknown_keys(item, node["additionalProperties"], parts)]
    if not isinstance(value, dict) or "properties" not in node:
        return []
    below = [key for name, item in value.items() for key in unknown_keys(item, node["properties"].get(name, {}), parts)]
    return below + [name for name in value if name not in node["properties"]]


def test_rules_by_name_merge_one_by_one_and_null_drops_one(write: Write, tmp_path: Path) -> None:
    """As the policies that ship: a child changes one key of one rule, adds a rule behind the others, drops another."""
    named = """
quantization:
  layers:
    first: {match: conv_in, keep_float: true}
    ends: {match: conv_out, weights: {bits: 7}, inputs: {bits: 8}}
    body: {match: ["type:Conv2d"], weights: {bits: 4, scale: learned}, inputs: {bits: 8}}
"""
    write(GOOD.split("quantization:")[0] + named)
    child = tmp_path / "child.yaml"
    more = "ends: null, rest: {match: 'type:Linear', keep_float: true}"
    child.write_text(
        f"extends: p.yaml\nname: child\nquantization: {{layers: {{body: {{weights: {{bits: 2}}}}, {more}}}}}\n"
    )
    layers = load_policy(child, ["quantization.layers.body.inputs.bits=6"]).quantization.layers
    assert list(layers) == ["first", "body", "rest"]
    body = layers["body"]
    assert body.weights is not None
    assert body.inputs is not None
    assert (body.match, body.weights.bits, body.weights.scale, body.inputs.bits) == (("type:Conv2d",), 2, "learned", 6)


@pytest.mark.parametrize(
    ("rules", "report"),
    [
        (
            "{body: {match: a, weights: {bits: 9}, inputs: {bits: 8}}}",
            "quantization.layers.body.weights.bits: got 9; allowed a whole",
        ),
        ("{body: {keep_float: true}}", "quantization.layers.body.match: got nothing; allowed non-empty text"),
        ("{body: {match: a, keep_flaot: true}}", "quantization.layers.body.keep_flaot: got an unknown key"),
        (
            "{a b: {match: a, keep_float: true}}",
            "quantization.layers.a b: got a rule named 'a b'; allowed a name of at most 60",
        ),
        (
            "{a: {match: x, keep_float: true}, b: {match: x, weights: {bits: 4}, inputs: {bits: 8}}}",
            "quantization.layers.b.match: got 'x'; allowed a pattern once; rule a has it already",
        ),
        (
            "{body: {match: a, keep_float: true}, bdoy: {keep_float: true}}",
            "quantization.layers.bdoy.match: got nothing; allowed non-empty text or a list of one or more, each "
            "non-empty text, for a new rule; the others are body (did you mean body?)",
        ),
        ("{}", "quantization.layers: got {}; allowed a list of one or more"),
        ("{body: null}", "quantization.layers: got {}; allowed a list of one or more"),
        ("[]", "quantization.layers: got []; allowed a list of one or more"),
    ],
)
def test_a_fault_of_a_rule_names_the_rule(rules: str, report: str, write: Write) -> None:
    found = faults(write(GOOD.split("quantization:")[0] + f"quantization: {{layers: {rules}}}\n"))
    assert any(report in fault for fault in found), found


@pytest.mark.parametrize("name", SHIPPED)
def test_the_json_schema_has_the_keys_of_every_policy_and_no_others(name: str) -> None:
    policy, parts = load_shipped(name), json_schema()["$defs"]
    root = parts[type(policy).__name__]
    dumped = policy.model_dump(mode="json")
    assert unknown_keys(dumped, root, parts) == []
    assert dumped.keys() | {"extends"} == root["properties"].keys()
    assert unknown_keys({"quantization": {"layers": [{"weight": 3}]}, "x": 1}, parts["Policy"], parts) == [
        "weight",
        "x",
    ]


def test_the_json_schema_requires_keys_only_without_extends() -> None:
    parts = json_schema()["$defs"]
    assert parts["Policy"]["if"] == {"required": ["extends"]}
    assert parts["Policy"]["else"] == {"required": ["name", "model", "quantization"]}
    assert "required" not in parts["ModelPolicy"]
    for part in ("LayerRule", "WeightQuantizer", "InputQuantizer"):  # of a rule, a policy below may give the rest
        assert "required" not in parts[part]
