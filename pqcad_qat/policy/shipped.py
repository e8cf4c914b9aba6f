"""The policies that ship with the package: found by name, listed, and copied to start one's own.

Not here: reading a policy (policy/loading.py). Of an installed package they lie inside it, of a clone beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pqcad_qat.errors import PolicyError, shortened
from pqcad_qat.machine.files import write_file
from pqcad_qat.policy.schema import known_keys

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDER = _PACKAGE / "policies" if (_PACKAGE / "policies").is_dir() else _PACKAGE.parent / "policies"
SCHEMA = "policy.schema.json"
"""The JSON Schema of policies, beside them; their second line tells editors of it."""

MODELINE = "# yaml-language-server: $schema="

Kind = Literal["quantize", "pretrain", "study"]


@dataclass(frozen=True)
class ShippedPolicy:
    """One policy that ships.

    Attributes:
        name: what a command takes it by.
        kind: as its key `kind` says.
        file: where it lies.
        summary: its first sentence.
    """

    name: str
    kind: Kind
    file: Path
    summary: str


def shipped_policies() -> tuple[ShippedPolicy, ...]:
    """All of them, by kind and name."""
    found = [*_in_folder(FOLDER), *_in_folder(FOLDER / "studies")]
    return tuple(sorted(found, key=lambda policy: (("quantize", "pretrain", "study").index(policy.kind), policy.name)))


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
    return found[0] if (found := re.match(r".*?[.](?=\s|$)", paragraph)) else paragraph


def named_file(text: str, folder: Path) -> Path:
    """What a text names beside a file of `folder`: the file of that path, else the policy of that name that ships, else
    the path where no file is.
    """
    path = folder / os.path.expanduser(text)
    ships = FOLDER / f"{text}.yaml"
    return ships if _is_name(text) and not os.path.lexists(path) and ships.is_file() else path


def policy_file(text: str, kind: Kind = "quantize") -> Path:
    """The file that a command's argument names: a path, or the name of a policy of that kind that ships.

    Raises:
        PolicyError: a name that nothing has.
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
    """A word that can be a name rather than a path."""
    return re.fullmatch(r"[\w-]{1,64}", text) is not None


def shipped_policy(name: str) -> ShippedPolicy:
    """The policy of a name; a study is also found by `studies/NAME`, for a policy may have its name too.

    Raises:
        PolicyError: there is none.
    """
    found = {f"studies/{policy.name}": policy for policy in shipped_policies() if policy.kind == "study"}
    for policy in shipped_policies():
        found.setdefault(policy.name, policy)
    if name not in found:
        raise PolicyError(f"{shortened(name)}: got no policy that ships; allowed {known_keys(list(found), name)}")
    return found[name]


def copy_policy(policy: ShippedPolicy, to: Path) -> tuple[Path, ...]:
    """Write a policy of one's own that says what one that ships says; returns the files that were written.

    It takes its name from its file, stands on policies that ship by their names, and a file of prompts lies beside it.

    Raises:
        PolicyError: a file that is there already.
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
    """The text of a policy that ships as it reads elsewhere."""
    text = re.sub(rf"^{re.escape(MODELINE)}.*$", f"{MODELINE}{FOLDER / SCHEMA}", text, flags=re.MULTILINE)
    text = text.replace(f"policies/{policy.file.relative_to(FOLDER)}", str(to))
    text = re.sub(r"^(?:extends|policies): .*$", lambda line: _as_names(line[0]), text, flags=re.MULTILINE)
    text = re.sub(r"^( +source: )\.\./", r"\1", text, flags=re.MULTILINE)
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", to.stem):
        text = re.sub(r"^name: .*$", f"name: {to.stem}", text, count=1, flags=re.MULTILINE)
    return text


def _as_names(line: str) -> str:
    return re.sub(r"(?:\.\./)?([\w-]+)\.yaml", r"\1", line)
