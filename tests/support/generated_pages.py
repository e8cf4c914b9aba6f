"""A program that updates the pages generated from the code: parts of pqcad_qat/README.md and policies/README.md, and
policies/policy.schema.json. Run it as `python tests/support/generated_pages.py`.

Not here: the tests that the pages are up to date (test_architecture.py, test_readme.py).
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from pathlib import Path

from pqcad_qat.commands.schema import schema

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pqcad_qat"
PAGE = PACKAGE / "README.md"
POLICIES = ROOT / "policies" / "README.md"
SCHEMA = ROOT / "policies" / "policy.schema.json"
WIDTH = 118
"""Largest number of characters of a line of a page."""


def summary(file: Path) -> str:
    """First paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def contracts() -> list[dict[str, object]]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[dict[str, object]] = config["tool"]["importlinter"]["contracts"]
    return found


def layers() -> list[str]:
    """Layers of the import contract, highest first."""
    layers = next(contract["layers"] for contract in contracts() if contract["type"] == "layers")
    assert isinstance(layers, list)
    return [name for layer in layers for name in layer.split(" | ")]


def rules() -> str:
    return "\n".join(f"- {contract['name']}." for contract in contracts()) + "\n"


def packages() -> str:
    """List with one line for each package or module at the top, highest first."""
    lines = []
    for layer in layers():
        folder, file = PACKAGE / layer / "__init__.py", PACKAGE / f"{layer}.py"
        name, place = (f"{layer}/", folder) if folder.exists() else (f"{layer}.py", file)
        lines.append(_item(name, place))
    return "\n".join(lines) + "\n"


def files() -> str:
    """List of every file of every package with its summary, packages in the order of the list."""
    text = []
    for layer in layers():
        folder = PACKAGE / layer
        modules = sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")
        if modules:
            text += [f"### {layer}/", ""]
            text += [_item(path.relative_to(folder).as_posix(), path) for path in modules] + [""]
    return "\n".join(text)


def _item(name: str, file: Path) -> str:
    """Item of a list: a name and the file's summary, folded."""
    text = f"- `{name}`: {summary(file)}"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def filled(page: Path, parts: dict[str, str]) -> str:
    """Text of a page, with the content between the markers of each part replaced."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + begin + part + end + rest.split(end)[1]
    return text


def page() -> str:
    return filled(PAGE, {"rules": rules(), "packages": packages(), "files": files()})


def policies() -> str:
    return filled(POLICIES, {"keys": schema(markdown=True)})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    POLICIES.write_text(policies(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
