"""The pages for users say what is: the policy reference is the schema, every shipped file is named, examples load."""

from __future__ import annotations

import re
from pathlib import Path

import architecture_page
import pytest
import yaml

from pqcad_qat.cli import main
from pqcad_qat.policy.study_cells import load_study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
POLICIES = architecture_page.POLICIES.read_text(encoding="utf-8")
STUDIES = (ROOT / "policies" / "studies" / "README.md").read_text(encoding="utf-8")


def test_the_policy_reference_is_the_schema() -> None:
    assert architecture_page.policies() == POLICIES


def test_the_policy_reference_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["schema", "--markdown"])
    assert capsys.readouterr().out in POLICIES


def test_the_policy_reference_has_every_key_of_a_policy_file() -> None:
    keys = set(re.findall(r"^\| `([A-Za-z0-9_.]+)` \|", POLICIES, flags=re.MULTILINE))
    policy = yaml.safe_load((ROOT / "policies" / "w4a8.yaml").read_text(encoding="utf-8"))
    sections = {name: value for name, value in policy.items() if isinstance(value, dict)}
    assert {f"{name}.{key}" for name, section in sections.items() for key in section} <= keys


def test_every_shipped_policy_is_named() -> None:
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "policies").rglob("*.yaml")}
    assert shipped == set(re.findall(r"`(policies/[a-z0-9/-]+\.yaml)`", POLICIES + STUDIES))


def test_the_study_that_is_shown_is_one(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "bits.yaml").write_text(STUDIES.split("```yaml")[1].split("```")[0])
    for name in ("w4a8.yaml", "w2a8.yaml"):
        (tmp_path / name).write_text((ROOT / "policies" / name).read_text())
    assert len(load_study(tmp_path / "studies" / "bits.yaml").cells) == 2 * 2 * 2 * 3


def test_ci_finds_the_test_command() -> None:
    command = README.split("<!-- tests -->")[1].split("```")[1]
    assert "tox" in command
