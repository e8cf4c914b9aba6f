"""Reading policy files into policies, with `extends`, `--set` and all faults at once; and writing them as YAML, JSON
Schema or a difference.

Not here: the YAML tree (policy/tree.py), the wording of faults (policy/faults.py), or the rules of a policy
(policy/schema.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic.json_schema import models_json_schema

from pqcad_qat.errors import PolicyError, abridged, shortened
from pqcad_qat.policy.faults import find_faults
from pqcad_qat.policy.paths import anchor, anchor_override
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.shipped import named_file
from pqcad_qat.policy.study import StudyPolicy
from pqcad_qat.policy.tree import Tree, assign, key_steps, merge
from pqcad_qat.policy.yaml_text import DEPTH, Dumper, parse, read_text

Kind = TypeVar("Kind", Policy, PretrainPolicy)
FILES = 32
"""Largest number of files in a chain of `extends`."""

COMMANDS = {"quantize": "run", "pretrain": "pretrain", "study": "sweep"}  # kind of policy -> the command that runs it


def load_policy(path: Path, overrides: Sequence[str] = ()) -> Policy:
    """Load a quantization policy from a file, with ``key=value`` overrides.

    Raises:
        PolicyError: the policy has faults; the message lists all of them, one per line.
    """
    return _load(Policy, "quantize", path, overrides)


def load_pretrain_policy(path: Path, overrides: Sequence[str] = ()) -> PretrainPolicy:
    """Load a pretraining policy from a file, with ``key=value`` overrides.

    Raises:
        PolicyError: the policy has faults; the message lists all of them, one per line.
    """
    return _load(PretrainPolicy, "pretrain", path, overrides)


def _load(kind: type[Kind], name: str, path: Path, overrides: Sequence[str]) -> Kind:
    faults: list[str] = []
    tree = read_tree(path, (), faults)
    for text in overrides:
        tree = override(tree, text, faults)
    if tree.children is not None or not faults:
        refuse_other_kind(tree, name)
        # A file that `extends` could not read may have held the missing keys, so those are not reported.
        unread = any(": extends: got " in fault for fault in faults)
        faults += [fault for fault in find_faults(kind, tree) if not (unread and ": got nothing; " in fault)]
    raise_all(faults)
    return kind.model_validate(tree.plain()).written(tree.origins())


def raise_all(faults: Sequence[str]) -> None:
    """Raise PolicyError with all faults, sorted by place, if there are any."""
    if faults:
        raise PolicyError(abridged(sorted(dict.fromkeys(faults), key=by_place)))


def read_tree(path: Path, below: tuple[Path, ...], faults: list[str]) -> Tree:
    """Return the tree of a file, merged over the files that it extends.

    Args:
        path: the file.
        below: the files whose `extends` led to this one, for the detection of circles.
        faults: list to which faults are added.

    Raises:
        PolicyError: the file cannot be read.
    """
    tree, form_faults = parse(read_text(path), lambda line: f"{path}:{line}")
    faults += form_faults
    if tree is None:
        if not form_faults:
            faults.append(f"{path}:1: top level: got an empty file; allowed a policy")
        return Tree(None, f"{path}:1")
    anchor(tree, path, faults)
    if not isinstance(tree.children, dict) or "extends" not in tree.children:
        return tree
    extends = tree.children.pop("extends")
    parent = _file_below(extends, "extends", path, faults)
    below = (*below, path.resolve())
    if parent is None:
        return tree
    if parent.resolve() in below:
        faults.append(f"{extends.origin}: extends: got {extends.value}, which leads back to itself; allowed no circle")
        return tree
    if len(below) >= FILES:
        faults.append(f"{extends.origin}: extends: got a chain of more than {FILES} files; allowed up to so many")
        return tree
    return merge(read_tree(parent, below, faults), tree)


def _file_below(named: Tree, key: str, path: Path, faults: list[str]) -> Path | None:
    """Return the policy file that a key of the file `path` names; add a fault and return None where there is none."""
    if isinstance(named.value, str) and os.path.isfile(file := named_file(named.value, path.parent)):
        return file
    faults.append(
        f"{named.origin}: {key}: got {shortened(str(named.plain()))}; allowed a policy file, relative to this one, or "
        "the name of a policy that ships"
    )
    return None


def override(tree: Tree, text: str, faults: list[str]) -> Tree:
    """Return the tree with a ``key=value`` override applied.

    Keys are dotted, with indices as ``layers.0`` or ``layers[0]``. Values are YAML, and mappings are merged.
    """
    return overridden(tree, read_override(text, faults), faults)


@dataclass(frozen=True)
class Override:
    """A parsed ``key=value`` override: the steps of its key, and its value."""

    steps: list[str]
    value: Tree


def read_override(text: str, faults: list[str]) -> Override | None:
    """Parse a ``key=value`` override; add a fault and return None for any other text."""
    key, sign, yaml_text = text.partition("=")
    steps = key_steps(key)
    if not sign or not steps:
        faults.append(f"--set {shortened(text)}: got no key and value; allowed key=value, such as sampler.steps=10")
        return None
    origin = f"--set {shortened(key.strip())}"
    if len(steps) > DEPTH:
        faults.append(f"{origin}: got a key of {len(steps)} steps; allowed the key of a policy")
        return None
    value, form_faults = parse(yaml_text, lambda _: origin)
    faults += form_faults
    if form_faults:
        return None
    value = value or Tree(None, origin)
    anchor_override(steps, value, faults)
    return Override(steps, value)


def overridden(tree: Tree, override: Override | None, faults: list[str]) -> Tree:
    """Return the tree with an override applied; add a fault where the tree has no place for it."""
    try:
        return tree if override is None else assign(tree, override.steps, override.value)
    except PolicyError as error:
        faults.append(str(error))
        return tree


def refuse_other_kind(tree: Tree, name: str) -> None:
    """Raise PolicyError for a policy of another command, in place of a fault for each of its keys."""
    written = tree.child("kind")
    kind = "quantize" if written is None else written.value
    if kind in COMMANDS and kind != name and isinstance(tree.children, dict):
        origin = (written or tree).origin
        raise PolicyError(f"{origin}: kind: got {kind}, a policy for the command `{COMMANDS[kind]}`; allowed {name}")


def by_place(fault: str) -> tuple[str, int]:
    """Return the sort key of a fault: its file and line."""
    place = re.match(r"(.*?):(\d+): ", fault)
    return (place[1], int(place[2])) if place else (fault, 0)


def dump_policy(policy: Policy | PretrainPolicy, whole: bool = True) -> str:
    """Return the policy as YAML, with every key or only with those that differ from their defaults; loading it gives an
    equal policy.
    """
    return str(
        yaml.dump(
            policy.model_dump(mode="json", exclude_defaults=not whole),
            Dumper=Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=120,
        )
    )


def difference(a: Policy | PretrainPolicy, b: Policy | PretrainPolicy) -> list[str]:
    """Return the changes from `a` to `b`, as ``key: was X, now Y``; empty for equal policies."""
    was, now = _flat(a.model_dump(mode="json")), _flat(b.model_dump(mode="json"))
    keys = [key for key in was | now if was.get(key) != now.get(key)]
    return [f"{key}: was {was.get(key, 'nothing')}, now {now.get(key, 'nothing')}" for key in keys]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Map dotted keys to values as text. A list of plain values counts as one value, and nulls are left out."""
    if value is None:
        return {}
    if isinstance(value, dict) and value:
        return {
            k: v
            for key, item in value.items()
            for k, v in _flat(item, f"{prefix}[{key}]" if key.isdecimal() else f"{prefix}.{key}".strip(".")).items()
        }
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {k: v for index, item in enumerate(value) for k, v in _flat(item, f"{prefix}[{index}]").items()}
    return {prefix: yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=1000).removesuffix("...\n").strip()}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of policy files of every kind, for editors.

    Keys are required only where there is no `extends`, since a parent file may give the rest, even of a rule. `kind`
    decides which keys a file has; without it, the file is a policy for `run`. An editor thus reports the faults of one
    kind only.
    """
    kinds = (Policy, PretrainPolicy, StudyPolicy)
    refs, schema = models_json_schema([(kind, "validation") for kind in kinds])
    definitions = schema["$defs"]
    for kind in kinds:
        definition = definitions[kind.__name__]
        definition["properties"] = {
            "extends": {
                "type": "string",
                "description": "policy below this one: a file relative to it, or a name",
            }
        } | definition["properties"]
        definition |= {"if": {"required": ["extends"]}, "else": {"required": definition.pop("required")}}
        for section in definition["properties"].values():
            definitions.get(section.get("$ref", "").rsplit("/", 1)[-1], {}).pop("required", None)
    for name in ("LayerRule", "WeightQuantizer", "InputQuantizer"):
        definitions[name].pop("required", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pqcad_qat policy",
        **_by_kind(*refs.values()),
        "$defs": definitions,
    }


def _by_kind(quantization: Mapping[str, Any], *other_kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema that selects by the `kind` a file names; without a kind it is a policy for `run`."""
    schema = quantization
    for name, kind_schema in zip(list(COMMANDS)[1:], other_kinds, strict=True):
        has_kind = {"properties": {"kind": {"const": name}}, "required": ["kind"]}
        schema = {"if": has_kind, "then": kind_schema, "else": schema}
    return dict(schema)
