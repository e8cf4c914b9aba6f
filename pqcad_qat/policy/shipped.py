"""The policies that ship with the package: found by name, listed, and copied as the start of a user's own.

Not here: reading a policy (policy/loading.py). In an installed package they lie inside it; in a clone, beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pqcad_qat.errors import PolicyError, shortened
from pqcad_qat.machine.files import write_file
from pqcad_qat.policy.sections import known_keys

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDER = _PACKAGE / "policies" if (_PACKAGE / "policies").is_dir() else _PACKAGE.parent / "policies"
"""Folder of the shipped policies."""

PAPER, STUDIES = FOLDER / "paper", FOLDER / "studies"
"""Folders in it: the paper's protocols, and studies. What ships is taken by its name, whichever folder it is in."""

SCHEMA = "policy.schema.json"
"""File name of the policies' JSON Schema, which lies beside them. A policy's second line points editors to it."""

MODELINE = "# yaml-language-server: $schema="
"""Start of the comment line that points editors to the JSON Schema."""

Kind = Literal["quantize", "pretrain", "study"]


@dataclass(frozen=True)
class ShippedPolicy:
    """A policy that ships with the package.

    Attributes:
        name: name by which a command takes it.
        kind: kind of policy, from its key `kind`.
        file: path of its file.
        summary: first sentence of the comment at its top.
    """

    name: str
    kind: Kind
    file: Path
    summary: str


def shipped_policies() -> tuple[ShippedPolicy, ...]:
    """Return all shipped policies, by kind and name."""
    policies = [*_in_folder(FOLDER), *_in_folder(PAPER), *_in_folder(STUDIES)]
    kinds = get_args(Kind)
    return tuple(sorted(policies, key=lambda policy: (kinds.index(policy.kind), policy.name)))


def _in_folder(folder: Path) -> Iterator[ShippedPolicy]:
    for file in sorted(folder.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        yield ShippedPolicy(file.stem, _kind(text), file, _summary(text))


def _kind(text: str) -> Kind:
    match re.search(r"^kind: (\w+)", text, re.MULTILINE):
        case re.Match() as said if said[1] == "pretrain":
            return "pretrain"
        case re.Match() as said if said[1] == "study":
            return "study"
        case _:
            return "quantize"


def _summary(text: str) -> str:
    lines = [line[2:] for line in text.splitlines() if not line.startswith(MODELINE)]
    paragraph = " ".join(lines[: next((n for n, line in enumerate(lines) if not line), len(lines))])
    sentence = re.match(r".*?[.](?=\s|$)", paragraph)
    return sentence[0] if sentence else paragraph


def named_file(text: str, folder: Path) -> Path:
    """Return the file that a text names in a file of `folder`.

    It is the file at that path, or else the shipped policy of that name, or else the path even though no file exists
    there.
    """
    path = folder / os.path.expanduser(text)
    if not _is_name(text) or os.path.lexists(path):
        return path
    return next((file for file in (FOLDER / f"{text}.yaml", PAPER / f"{text}.yaml") if file.is_file()), path)


def policy_file(text: str, kind: Kind = "quantize") -> Path:
    """Return the file that a command's argument names: a path, or the name of a shipped policy of that kind.

    Raises:
        PolicyError: neither a file nor a shipped policy has this name.
    """
    if not _is_name(text) or os.path.lexists(text):
        return Path(text)
    names = {policy.name: policy.file for policy in shipped_policies() if policy.kind == kind}
    if text not in names:
        raise PolicyError(
            f"{shortened(text)}: got no file and no policy of that name; allowed a policy file, or one that ships: "
            f"{known_keys(list(names), text)}"
        )
    return names[text]


def _is_name(text: str) -> bool:
    """Return whether a text can be a name rather than a path."""
    return re.fullmatch(r"[\w-]{1,64}", text) is not None


def shipped_policy(name: str) -> ShippedPolicy:
    """Return the shipped policy of this name. A study is also found as `studies/NAME`, since a policy may share its
    name.

    Raises:
        PolicyError: there is none.
    """
    by_name = {f"studies/{policy.name}": policy for policy in shipped_policies() if policy.kind == "study"}
    for policy in shipped_policies():
        by_name.setdefault(policy.name, policy)
    if name not in by_name:
        raise PolicyError(f"{shortened(name)}: got no policy that ships; allowed {known_keys(list(by_name), name)}")
    return by_name[name]


def copy_policy(policy: ShippedPolicy, to: Path) -> tuple[Path, ...]:
    """Write a copy of a shipped policy for the user to change; return the files that were written.

    The copy takes its name from its file and refers to shipped policies by name. A file of prompts is copied beside it.

    Raises:
        PolicyError: one of the files already exists.
    """
    text = policy.file.read_text(encoding="utf-8")
    beside = {
        to.parent / name: (policy.file.parent / name).read_text(encoding="utf-8")
        for name in re.findall(r"^ +prompts: ([\w.-]+)", text, re.MULTILINE)
        if (policy.file.parent / name).is_file()
    }
    files = {to: _own_text(text, policy, to), **beside}
    for file in files:
        if os.path.lexists(file):
            raise PolicyError(f"--copy: got {shortened(str(file), 300)}, which is there; allowed a new file")
    for file, content in files.items():
        write_file(file, content)
    return tuple(files)


def _own_text(text: str, policy: ShippedPolicy, to: Path) -> str:
    """Return the text of a shipped policy adapted to its new place: its paths, its name, and the policies that it
    refers to.
    """
    text = re.sub(rf"^{re.escape(MODELINE)}.*$", f"{MODELINE}{FOLDER / SCHEMA}", text, flags=re.MULTILINE)
    text = text.replace(f"policies/{policy.file.relative_to(FOLDER)}", str(to))
    named = r"^(?:extends|policies): .*$|^ +- .*\.yaml$"
    text = re.sub(named, lambda line: _as_names(line[0]), text, flags=re.MULTILINE)
    text = re.sub(r"^( +source: )\.\./", r"\1", text, flags=re.MULTILINE)
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", to.stem):
        text = re.sub(r"^name: .*$", f"name: {to.stem}", text, count=1, flags=re.MULTILINE)
    return text


def _as_names(line: str) -> str:
    return re.sub(r"(?:\.\./)?(?:paper/)?([\w-]+)\.yaml", r"\1", line)
