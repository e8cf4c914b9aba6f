"""pqcad_qat/README.md says what is: its rooms, its rules and its files are the code's own."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

import generated_pages

from pqcad_qat.commands.schema import schema


def test_the_architecture_page_is_what_the_code_says() -> None:
    assert generated_pages.PAGE.read_text(encoding="utf-8") == generated_pages.page()


def test_editors_read_the_schema_that_the_command_prints() -> None:
    assert generated_pages.SCHEMA.read_text(encoding="utf-8") == schema()


def test_every_module_says_what_it_holds() -> None:
    silent = [path for path in generated_pages.PACKAGE.rglob("*.py") if not generated_pages.summary(path)]
    assert silent == []


def test_no_file_and_no_package_outgrows_the_others() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in generated_pages.PACKAGE.rglob("*.py")}
    assert {str(path): count for path, count in lines.items() if count > 350} == {}
    packages = Counter[str]()
    for path, count in lines.items():
        packages[path.relative_to(generated_pages.PACKAGE).parts[0]] += count
    assert {name: count for name, count in packages.items() if count > 0.14 * sum(lines.values())} == {}


def test_the_table_of_where_to_look_names_what_is_there() -> None:
    section = generated_pages.PAGE.read_text(encoding="utf-8").split("## Where to look\n")[1].split("\n## ")[0]
    file, named = "", 0
    for word in re.findall(r"`([^`]+)`", section):
        if "/" in word or word.endswith(".py"):
            file = word
            assert (generated_pages.PACKAGE / file).exists(), file
        elif not word.startswith("--"):
            tree = ast.parse((generated_pages.PACKAGE / file).read_text(encoding="utf-8"))
            assert word in _defined(tree), f"{file}: {word}"
            named += 1
    assert named > 15


def _defined(tree: ast.Module) -> set[str]:
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = (target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets)
    return names | {target.id for target in targets if isinstance(target, ast.Name)}


VALUE_FAULTS = {"PolicyError", "PlanError", "ModelError", "CheckpointError", "ExportError", "UsageError", "StudyError"}
"""Exceptions that say what a user gave: they have the form ``WHERE: got X; allowed Y``."""

NOTHING_TO_ALLOW = {"sweep.sweep"}
"""Functions whose messages tell what happened, where no other value would have been right."""


def test_messages_say_where_what_was_got_and_what_is_allowed() -> None:
    faults = [
        f"{path.relative_to(generated_pages.PACKAGE)}:{line}: {text}"
        for path in sorted(generated_pages.PACKAGE.rglob("*.py"))
        for function, line, text in _messages(ast.parse(path.read_text(encoding="utf-8")))
        if f"{path.stem}.{function}" not in NOTHING_TO_ALLOW and not ("got " in text and "allowed" in text)
    ]
    assert faults == []


def _messages(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Yields (function, line, literal text) of every raised fault of a value; messages made elsewhere have no text."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if getattr(node.exc.func, "id", "") not in VALUE_FAULTS:
                    continue
                strings = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
                text = "".join(value for value in strings if isinstance(value, str))
                if len(re.findall(r"[a-z]{2,}", text)) > 2:  # else the text is another error's, with a key before it
                    yield function.name, node.lineno, text
