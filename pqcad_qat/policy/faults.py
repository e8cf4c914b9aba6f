"""Messages for all faults of a policy at once: where each was written, the value found, and the values allowed.

Not here: reading files (policy/loading.py), or the rules themselves (policy/schema.py). The wording of allowed values
comes from the bounds in the JSON Schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pqcad_qat.errors import shortened
from pqcad_qat.policy.origins import Location, key_path
from pqcad_qat.policy.sections import Section, known_keys
from pqcad_qat.policy.tree import Tree

Node = dict[str, Any]  # part of a JSON Schema

RULES = ("quantization", "layers")
"""Location of the rules of layers in a quantization policy."""

MANY = 200
"""Number of faults after which the search stops, since nobody reads more."""


@dataclass(frozen=True)
class Finding:
    """A fault before it becomes a message. The first location is the key at fault; the others are the keys it was
    checked against.
    """

    locations: tuple[Location, ...]
    got: str
    allowed: str

    def touches(self, locations: set[Location]) -> bool:
        """Return whether one of its own locations contains, or lies within, one of these."""
        return any(own[: len(near)] == near[: len(own)] for own in self.locations for near in locations)


def find_faults(kind: type[Section], tree: Tree) -> list[str]:
    """Return all faults, as ``file:line: key: got X; allowed Y``.

    pydantic checks the rules between keys only once every single key is valid. So each round of faults is repaired in a
    copy, with values that the schema allows, and the copy is checked again. A later fault that involves a repaired key
    is dropped, since it says nothing about the policy.
    """
    schema = _schema(kind)
    data = tree.plain()
    reported: list[Finding] = []
    repaired: set[Location] = set()
    while error := _validation_error(kind, data):
        findings = list(islice(_findings(error, schema, data), MANY))
        reported += [finding for finding in findings if not finding.touches(repaired)]
        broken = {location for finding in findings for location in finding.locations} - repaired
        if not broken or not isinstance(data, dict) or len(reported) >= MANY:
            break
        for location in sorted(broken, key=len, reverse=True):
            schema.repair(data, location)
        repaired |= broken
    return [_in_words(finding, tree) for finding in reported]


def _validation_error(kind: type[Section], data: object) -> ValidationError | None:
    try:
        kind.model_validate(data)
    except ValidationError as error:
        return error
    return None


def _in_words(finding: Finding, tree: Tree) -> str:
    """Put a finding into words, with the place of the first of its keys that is in the file.

    Where none of them is, the place is that of the mapping in which the key at fault belongs.
    """
    deepest = [(*tree.deepest(location), location) for location in finding.locations]
    origin = next((node.origin for node, reached, location in deepest if reached == location), deepest[0][0].origin)
    return f"{origin}: {key_path(finding.locations[0])}: got {finding.got}; allowed {finding.allowed}"


def _as_written(location: Location, data: Any) -> Location:
    """Return the location with list indices as numbers, where rules of layers carry them as text."""
    written: list[str | int] = []
    for step in location:
        step = int(step) if isinstance(data, list) and str(step).isdecimal() else step
        written.append(step)
        inside = step in data if isinstance(data, dict) else isinstance(data, list) and step in range(len(data))
        data = data[step] if inside else None
    return tuple(written)


def _findings(error: ValidationError, schema: Schema, data: Any) -> Iterator[Finding]:
    seen: set[Location] = set()
    for detail in error.errors(include_url=False):
        if detail["type"] == "policy_rule":
            for fault in detail["ctx"]["faults"]:
                keys = tuple(_as_written((*detail["loc"], *key), data) for key in fault.keys)
                yield Finding(keys, fault.got, fault.allowed)
        elif not _spurious(detail):
            written = _as_written(detail["loc"], data)
            finding = _key_finding(detail, written, schema)
            if detail["type"] == "missing" and written[:2] == RULES and written[3:] == ("match",):
                finding = replace(finding, allowed=f"{finding.allowed}{_other_rules(written[2], data)}")
            if finding.locations[0] not in seen:  # a union reports the same key once per member
                seen.add(finding.locations[0])
                yield finding


def _spurious(detail: ErrorDetails) -> bool:
    """Return whether pydantic calls a list too short only because its items are faulty; the items have faults of their
    own.
    """
    return detail["type"] == "too_short" and len(detail["input"]) > 0


def _other_rules(name: str | int, data: Any) -> str:
    """Return a hint for a rule without patterns, which may be a misspelt name of another rule."""
    rules = data["quantization"]["layers"]
    if not isinstance(rules, dict) or not (names := [known for known in rules if known != name]):
        return ""
    return f", for a new rule; the others are {known_keys(names, str(name))}"


def _key_finding(detail: ErrorDetails, written: Location, schema: Schema) -> Finding:
    node, location = schema.follow(written)
    if detail["type"] == "extra_forbidden":
        return Finding((written,), "an unknown key", known_keys(schema.keys(node), str(written[-1])))
    got = "nothing" if detail["type"] == "missing" else _shown(detail["input"])
    return Finding((location,), got, schema.describe(node))


def _shown(value: object) -> str:
    shown = shortened(json.dumps(value, default=str, ensure_ascii=False))
    return f"{shown} (text, not a number)" if isinstance(value, str) and _reads_as_number(value) else shown


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Schema:
    """A policy's JSON Schema: it finds the part for a location, describes it, and gives a value that it allows."""

    def __init__(self, kind: type[Section]) -> None:
        self.root: Node = kind.model_json_schema()

    def follow(self, location: Location) -> tuple[Node, Location]:
        """Return the part for a location, and the location as far as the schema has it.

        Steps beyond that are pydantic's names for the members of a union.
        """
        node = self.root
        for depth, step in enumerate(location):
            below = self._below(node, step)
            if below is None:
                return node, location[:depth]
            node = below
        return node, location

    def _below(self, node: Node, step: str | int) -> Node | None:
        for member in self._members(node):
            below = (
                member.get("items")
                if isinstance(step, int)
                else member.get("properties", {}).get(step, member.get("additionalProperties"))
            )
            if isinstance(below, dict):  # additionalProperties may also be true or false
                return self._resolve(below)
        return None

    def _members(self, node: Node) -> list[Node]:
        return [self._resolve(member) for member in node.get("anyOf", [node])]

    def _resolve(self, node: Node) -> Node:
        if "$ref" not in node:
            return node
        target: Node = self.root["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return target | {key: value for key, value in node.items() if key != "$ref"}

    def is_section(self, location: Location) -> bool:
        """Return whether a key holds a fixed set of keys and nothing else."""
        return "properties" in self.follow(location)[0]

    def keys(self, node: Node) -> list[str]:
        """Return the keys below a part of the schema, over all members of its union."""
        return [key for member in self._members(node) for key in member.get("properties", {})]

    def describe(self, node: Node) -> str:
        """Return in words which values a part of the schema allows."""
        choices = [choice for member in self._members(node) for choice in self._choices(member)]
        return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))

    def _choices(self, node: Node) -> list[str]:
        if "enum" in node or "const" in node:
            return [str(choice) for choice in node.get("enum", [node.get("const")])]
        return ["true", "false"] if node.get("type") == "boolean" else [self._describe_one(node)]

    def _describe_one(self, node: Node) -> str:
        match node.get("type"):
            case "integer":
                return f"a whole number{_bounds(node)}"
            case "number":
                return f"a number{_bounds(node)}"
            case "string":
                return f"text that matches {node['pattern']}" if "pattern" in node else "non-empty text"
            case "array":
                alike = node.get("minItems") == node.get("maxItems")  # either both are present or neither is
                count = node["minItems"] if alike and "minItems" in node else "one or more"
                return f"a list of {count}, each {self.describe(self._resolve(node['items']))}"
            case "object":
                return (
                    f"a mapping with the keys {', '.join(node['properties'])}" if "properties" in node else "a mapping"
                )
            case kind:
                return str(kind)

    def repair(self, data: Node, location: Location) -> None:
        """Put a value that the schema allows at the location, or remove a key that the schema does not know."""
        holder: Any = data
        for depth, step in enumerate(location[:-1], start=1):
            holder = holder.setdefault(step, {}) if isinstance(holder, dict) else holder[step]
            if not isinstance(holder, dict | list):  # a single pattern stands for a list of one
                return self.repair(data, location[:depth])
        node, known = self.follow(location)
        if known == location:
            holder[location[-1]] = self._example(node, location)
        else:
            holder.pop(location[-1], None)
        return None

    def _example(self, node: Node, location: Location) -> Any:
        """Return a value that a part of the schema allows: its default, or else the simplest of its type."""
        if node.get("default") is not None:
            return deepcopy(node["default"])
        member = self._members(node)[0]
        if "const" in member or "enum" in member:
            return member.get("const") or member["enum"][0]
        match member["type"]:
            case "integer":
                return member.get("minimum", 1)
            case "number":
                return member.get("minimum", member.get("maximum", 1.0))
            case "string":
                return key_path(location)  # the key's path differs from every other example text
            case "array":
                return [self._example(self._resolve(member["items"]), (*location, 0))]
            case "object":
                required = member.get("required", [])
                return {
                    key: self._example(self._resolve(member["properties"][key]), (*location, key)) for key in required
                }
        raise AssertionError(f"no example for {member}")


@cache
def _schema(kind: type[Section]) -> Schema:
    return Schema(kind)


def _bounds(node: Node) -> str:
    """Return the bounds in words, such as " from 2 to 8" or " over 0 and at most 1"; empty where there are none."""
    words = {"minimum": "at least", "exclusiveMinimum": "over", "maximum": "at most", "exclusiveMaximum": "under"}
    bounds = {key: _bound(node[key]) for key in words if key in node}
    if "minimum" in bounds and "maximum" in bounds:
        least, most = bounds["minimum"], bounds["maximum"]
        return f" equal to {least}" if least == most else f" from {least} to {most}"
    return f" {' and '.join(f'{words[key]} {bound}' for key, bound in bounds.items())}" if bounds else ""


def _bound(bound: float) -> str:
    """Return a bound as text: a whole number with all its digits, any other number in short."""
    return f"{bound:.0f}" if bound == int(bound) else f"{bound:g}"
