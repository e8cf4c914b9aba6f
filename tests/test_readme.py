"""The pages for users say what is: the policy reference is the schema, every shipped file is named, examples load."""

from __future__ import annotations

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import get_args

import generated_pages
import pytest
import yaml

from pqcad_qat.arguments import fire_arguments
from pqcad_qat.cli import COMMANDS, main
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.shipped import policy_file
from pqcad_qat.policy.study_cells import load_study
from pqcad_qat.policy.variants import VariantName

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
POLICIES = generated_pages.POLICIES.read_text(encoding="utf-8")
STUDIES = (ROOT / "policies" / "studies" / "README.md").read_text(encoding="utf-8")


def test_the_policy_reference_is_the_schema() -> None:
    assert generated_pages.policies() == POLICIES


def test_the_policy_reference_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["schema", "--markdown"])
    assert capsys.readouterr().out in POLICIES


def test_the_policy_reference_has_every_key_of_a_policy_file() -> None:
    keys = set(re.findall(r"^\| `([A-Za-z0-9_.]+)` \|", POLICIES, flags=re.MULTILINE))
    policy = yaml.safe_load((ROOT / "policies" / "w4a8.yaml").read_text(encoding="utf-8"))
    sections = {name: value for name, value in policy.items() if isinstance(value, dict)}
    targets = sections.pop("targets")
    assert {f"targets.NAME.{key}" for target in targets.values() for key in target} <= keys
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


def test_the_policy_that_is_shown_is_one(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "policies", tmp_path / "policies")
    (tmp_path / "mine.yaml").write_text(README.split("```yaml")[1].split("```")[0])
    assert load_policy(tmp_path / "mine.yaml").name == "mine"


def test_the_variants_that_are_explained_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (`[a-z0-9-]+`(?:, `[a-z0-9-]+`)*) \|", README.split("| variant |")[1], flags=re.MULTILINE)
    explained = [name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row)]
    assert sorted(explained) == sorted(get_args(VariantName))


def test_the_readme_is_read_in_ten_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) <= 250
    assert [line for line in lines if len(line) > 120] == []


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("policies/**/*.md"), *ROOT.glob("pqcad_qat/**/*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
        if not leads_somewhere(page, *link)
    ]
    assert broken == []


def leads_somewhere(page: Path, file: str, anchor: str) -> bool:
    """The file is there, and so is the heading that the anchor is made of."""
    target = (page.parent / file).resolve() if file else page
    if not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return anchor[1:] in [re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_ci_finds_the_test_command() -> None:
    command = README.split("<!-- tests -->")[1].split("```")[1]
    assert "tox" in command


def commands_of(page: Path) -> list[list[str]]:
    """The words behind every `python -m pqcad_qat` of a page, in its code blocks and in its text."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        shlex.split(found.split(" && ")[0], comments=True)
        for found in re.findall(r"python -m pqcad_qat +([^`\n]+)", text)
        if not found.startswith("...")
    ]


def test_every_command_that_a_page_shows_is_one_with_these_flags_and_keys() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("policies/**/*.md"), *ROOT.glob("pqcad_qat/**/*.md")]
    tried = 0
    for page in pages:
        for words in commands_of(page):
            fire_arguments(COMMANDS, words)
            name, overrides = words[0], [after for word, after in pairwise(words) if word == "--set"]
            if name in ("run", "plan", "rehearse", "profile") and words[1].lower() == words[1]:
                file = policy_file(words[1])
                load_policy(file if file.is_absolute() else ROOT / file, overrides)
                tried += 1
    assert tried > 15
