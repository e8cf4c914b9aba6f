"""What a policy's document may be at most, and that anything more is one short fault with its place, at once.

Not here: random damage (test_fuzz_policies.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import bounded

from pqcad_qat.errors import PolicyError, abridged, shortened
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.study_cells import load_study
from pqcad_qat.policy.yaml_text import BYTES

RULES = "quantization: {layers: [{match: '*', weights: {bits: 8}, inputs: {bits: 8}}]}\n"
GOOD = "name: good\nmodel: {source: 'embedded:digits'}\n" + RULES


def nine(first: str, level: str) -> str:
    """Nine levels of nine: a thousand bytes that stand for 400 million values."""
    return first + "".join(level.format(n, ", ".join([f"*a{n - 1}"] * 9)) for n in range(1, 10))


LISTS = nine("a0: &a0 [x, x, x, x, x, x, x, x, x]\n", "a{0}: &a{0} [{1}]\n")
MAPPINGS = nine("a0: &a0 {x: 1}\n", "a{0}: &a{0} {{k: [{1}]}}\n")
MERGES = nine("a0: &a0 {name: x}\n", "a{0}: &a{0} {{<<: [{1}]}}\n")


def faults(
    content: str | bytes, tmp_path: Path, *overrides: str, load: Callable[..., object] = load_policy
) -> list[str]:
    path = tmp_path / "p.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with bounded(), pytest.raises(PolicyError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert len(message) < 4096
    return message.replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize("bomb", [LISTS, MAPPINGS], ids=["lists", "mappings"])
def test_aliases_count_as_what_they_stand_for(tmp_path: Path, bomb: str) -> None:
    [fault] = faults(bomb, tmp_path)
    assert re.match(
        r"p\.yaml:\d+: got a document of more than 50,000 values, aliases counted as what they stand for; allowed",
        fault,
    )


def test_what_merge_keys_bring_is_each_key_once(tmp_path: Path) -> None:
    found = faults(MERGES + GOOD, tmp_path)
    assert [fault.split(": got")[0] for fault in found] == [f"p.yaml:{n + 1}: a{n}" for n in range(10)]


def test_of_several_merged_mappings_the_first_has_its_way_and_the_mappings_own_keys_over_all(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    first, second = "{steps: 30, guidance_scale: 2.0}", "{steps: 40, name: ddim}"
    path.write_text(GOOD + f"calibration: &a {{}}\nsampler: {{<<: [{first}, {second}], guidance_scale: 3.0}}\n")
    sampler = load_policy(path).sampler
    assert (sampler.steps, sampler.guidance_scale, sampler.name) == (30, 3.0, "ddim")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("model: &m {<<: *m}\n", "p.yaml:1: got a mapping that `<<` merges into itself"),
        ("model: {<<: 3}\n", "p.yaml:1: got no mapping to merge by `<<` at model"),
        ("model: " + "[" * 5000, "p.yaml:1: got a nesting of more than 40 levels"),
        ("model: " + "{a: " * 5000, "p.yaml:1: got a nesting of more than 40 levels"),
        ("name: !!int abc\n", "p.yaml:1: got 'abc' as a value of the tag int"),
        ("name: !!bool maybe\n", "p.yaml:1: got 'maybe' as a value of the tag bool"),
        ("name: !!binary aGk=\n", "p.yaml:1: got the tag tag:yaml.org,2002:binary"),
        ("name: !!set {a, b}\n", "p.yaml:1: got the tag tag:yaml.org,2002:set"),
        ("name: \x00\n", "p.yaml:1: got the character '\\x00'"),
        (GOOD.encode("utf-16"), "p.yaml:1: got the byte 0xff; allowed text in UTF-8"),
        (b"# " + b"x" * 1_000_000, "p.yaml: got more than 1,000,000 bytes"),
        ("x: [" + "1, " * 50_001 + "]", "p.yaml:1: got a document of more than 50,000 values"),
    ],
)
def test_a_document_that_no_policy_can_be_has_one_fault(tmp_path: Path, text: str | bytes, fault: str) -> None:
    [found] = faults(text, tmp_path)
    assert found.startswith(fault)


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 4000, str(2**63), "1" + ":59" * 40])
def test_a_number_beyond_64_bits_is_a_fault_of_its_key(tmp_path: Path, number: str) -> None:
    fault = faults(GOOD + f"training:\n  seed: {number}\n", tmp_path)[0]
    assert fault == f"p.yaml:5: training.seed: got {shortened(number)}; allowed whole numbers that 64 bits hold"


@pytest.mark.parametrize("number", ["1e999", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_a_fault_of_its_key(tmp_path: Path, number: str) -> None:
    [fault] = faults(GOOD + f"progressive:\n  perturbation: {number}\n", tmp_path)
    assert fault.startswith("p.yaml:5: progressive.perturbation: got ")


def test_a_date_is_text(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(GOOD.replace("good", "2024-11-02"))
    assert load_policy(tmp_path / "p.yaml").name == "2024-11-02"


def test_windows_line_ends_are_lines(tmp_path: Path) -> None:
    [fault] = faults((GOOD + "sampler: {stepz: 1}\n").replace("\n", "\r\n"), tmp_path)
    assert fault.startswith("p.yaml:4: sampler.stepz: got an unknown key")


def test_a_policy_file_may_have_a_million_bytes_and_not_one_more(tmp_path: Path) -> None:
    largest = GOOD + "#" * (BYTES - len(GOOD))
    path = tmp_path / "largest.yaml"
    path.write_text(largest)
    assert load_policy(path).name == "good"
    [fault] = faults(largest + "#", tmp_path)
    assert fault == "p.yaml: got more than 1,000,000 bytes; allowed a policy file of up to so many"


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with bounded(2), pytest.raises(PolicyError, match="got no regular file; allowed a policy file"):
            load_policy(path)


@pytest.mark.parametrize("name", ["a" * 300, "loop", '"a\\0b"', ".", "pipe", "[a]", "~nobody/x", "/"])
def test_extends_of_what_is_no_file_is_a_fault_of_its_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    [fault] = faults(f"name: p\nextends: {name}\n", tmp_path)  # what it would bring is not called missing
    assert fault.startswith("p.yaml:2: extends: got ")
    assert fault.endswith("; allowed a policy file, relative to this one, or the name of a policy that ships")
    assert len(fault) < 200


@pytest.mark.parametrize("files", [32, 33])
def test_a_chain_has_32_files_and_not_one_more(tmp_path: Path, files: int) -> None:
    for number in range(1, files):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\nname: n{number}\n")
    (tmp_path / f"{files}.yaml").write_text(GOOD)
    (tmp_path / "1.yaml").rename(tmp_path / "first.yaml")
    path = tmp_path / "first.yaml"
    if files == 32:
        assert load_policy(path).name == "n1"
        return
    with pytest.raises(PolicyError, match="extends: got a chain of more than 32 files"):
        load_policy(path)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (f"sampler={LISTS}", "--set sampler: got a document of more than 50,000 values"),
        (".".join("a" * 500) + "=1", "--set a.a.a"),
        ("x" * 5000 + "=1", "--set " + "x" * 57),
        ("quantization.layers[" + "9" * 5000 + "]=1", "--set quantization.layers[9999"),
        ("training.seed=" + "9" * 5000, "--set training.seed: "),
    ],
)
def test_an_override_has_the_same_bounds(tmp_path: Path, override: str, fault: str) -> None:
    assert faults(GOOD, tmp_path, override)[0].startswith(fault)


def test_a_study_has_so_many_cells_at_most(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    axes = "".join(f"  x{axis}: {{{', '.join(f'l{level}: {{}}' for level in range(10))}}}\n" for axis in range(9))
    [fault] = faults(f"kind: study\nname: s\npolicies: [good.yaml]\naxes:\n{axes}", tmp_path, load=load_study)
    assert fault == "p.yaml:1: axes: got 1,000,000,000 cells; allowed up to 1,000"


def test_thousands_of_faults_are_told_as_the_first_and_a_number(tmp_path: Path) -> None:
    found = faults(GOOD + "".join(f"key{number}: 1\n" for number in range(5000)), tmp_path)
    assert len(found) > 10
    assert found[0].startswith("p.yaml:4: key0: got an unknown key")
    assert found[-1].startswith("and ")


def test_a_message_is_cut_by_whole_lines() -> None:
    assert abridged(["a", "b"]) == "a\nb"
    lines = abridged([f"{number}: {'x' * 100}" for number in range(100)]).splitlines()
    assert all(len(line) > 100 for line in lines[:-1])
    assert lines[-1] == f"and {100 - len(lines) + 1} more"


def test_what_was_got_is_one_line_that_can_be_printed() -> None:
    assert shortened("a\nb\x1b[31m\x00\ud800") == "a\\nb\\x1b[31m\\x00\\ud800"
    assert shortened("x" * 61) == "x" * 57 + "..."
    assert len(shortened("\x00" * 100)) == 60
