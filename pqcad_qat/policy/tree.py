"""YAML text as a tree that knows where each value was written: reading, merging, setting one value.

Not here: what the values mean (policy/schema.py), and which of them are faults (policy/faults.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.origins import Location, Origins, key_path

Origin = Callable[[int], str]  # line of a text -> what a fault opens with


@dataclass
class Tree:
    """A YAML value, its children and its origin: ``file:line``, or the command line's ``--set key``."""

    value: Any  # of a scalar; None for a mapping or list
    origin: str
    children: dict[str, Tree] | list[Tree] | None = None

    def child(self, step: str | int) -> Tree | None:
        if isinstance(self.children, dict):
            return self.children.get(str(step))
        if isinstance(self.children, list) and isinstance(step, int) and 0 <= step < len(self.children):
            return self.children[step]
        return None

    def plain(self) -> Any:
        """The value without origins: dicts, lists and scalars."""
        if isinstance(self.children, dict):
            return {key: child.plain() for key, child in self.children.items()}
        if isinstance(self.children, list):
            return [child.plain() for child in self.children]
        return self.value

    def origins(self) -> Origins:
        """Where every key stands."""
        return Origins(dict(self._places(())))

    def _places(self, location: Location) -> Iterator[tuple[Location, str]]:
        yield location, self.origin
        below = self.children.items() if isinstance(self.children, dict) else enumerate(self.children or ())
        for step, child in below:
            yield from child._places((*location, step))

    def deepest(self, location: Location) -> tuple[Tree, Location]:
        """The part of the location that is there: its tree, and how far it goes."""
        tree: Tree = self
        found: Location = ()
        for step in location:
            child = tree.child(step)
            if child is None:
                break
            tree, found = child, (*found, step)
        return tree, found


def merge(below: Tree, above: Tree) -> Tree:
    """`above` over `below`: mappings merge key by key, anything else replaces what was there."""
    if not isinstance(below.children, dict) or not isinstance(above.children, dict):
        return above
    merged = dict(below.children)
    for key, child in above.children.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Tree(None, above.origin, merged)


def assign(tree: Tree, steps: Sequence[str], value: Tree) -> Tree:
    """The tree with `value` merged in at the steps; a digit is an index where a list stands. Raises PolicyError for a wrong index."""
    if not steps:
        return merge(tree, value)
    if isinstance(tree.children, list):
        items = list(tree.children)
        if not steps[0].isdigit() or int(steps[0]) >= len(items):
            raise PolicyError(f"{value.origin}: got index {steps[0]}; allowed 0 to {len(items) - 1}")
        items[int(steps[0])] = assign(items[int(steps[0])], steps[1:], value)
        return Tree(None, tree.origin, items)
    children = dict(tree.children or {})
    children[steps[0]] = assign(children.get(steps[0], Tree(None, value.origin)), steps[1:], value)
    return Tree(None, tree.origin if tree.children is not None else value.origin, children)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that 1e-4 is a number, as in YAML 1.2; plain PyYAML reads it as text."""


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back: text such as '1e4' is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")}
EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for _class in (Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def read_text(path: Path) -> str:
    """A policy file's text. Raises PolicyError where there is none to read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PolicyError(f"{path}:{line}: got the byte 0x{error.object[error.start]:02x}; allowed text in UTF-8") from error
    except OSError as error:
        raise PolicyError(f"{path}: got {error.strerror}; allowed a policy file that can be read") from error


def parse(text: str, origin: Origin) -> tuple[Tree | None, list[str]]:
    """The tree of a YAML text (None where the text is empty or broken) and the faults of its form."""
    try:
        builder = _Builder(Loader(text), origin)
        root = builder.loader.get_single_node()
        return (None, []) if root is None else (builder.build(root, (), root), builder.faults)
    except yaml.MarkedYAMLError as error:
        return None, [_syntax_fault(error, origin)]
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        return None, [f"{origin(line)}: got the character {text[error.position]!r}; allowed printable text"]
    except RecursionError:
        return None, [f"{origin(1)}: got a nesting without end; allowed a few levels"]


def _syntax_fault(error: yaml.MarkedYAMLError, origin: Origin) -> str:
    mark = error.problem_mark or error.context_mark
    context = f" {error.context}" if error.context else ""
    hint = " (indent with spaces)" if "\\t" in str(error.problem) else ""
    return f"{origin(mark.line + 1 if mark else 1)}: got {error.problem}{context}; allowed YAML{hint}"


@dataclass
class _Builder:
    """Turns PyYAML's nodes into a Tree and notes the keys that it refuses."""

    loader: Loader
    origin_of: Origin
    faults: list[str] = field(default_factory=list)

    def origin(self, node: yaml.Node) -> str:
        return self.origin_of(node.start_mark.line + 1)

    def build(self, node: yaml.Node, location: Location, written_at: yaml.Node) -> Tree:
        """`written_at` is the node whose line is the value's: its key, in a mapping."""
        if node.tag not in TAGS:
            raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag}", node.start_mark)
        origin = self.origin(written_at)
        if isinstance(node, yaml.MappingNode):
            return Tree(None, origin, self._mapping(node, location))
        if isinstance(node, yaml.SequenceNode):
            return Tree(None, origin, [self.build(item, (*location, index), item) for index, item in enumerate(node.value)])
        return Tree(self._scalar(node), origin)

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Tree]:
        self._refuse_duplicates(node, location)
        self.loader.flatten_mapping(node)  # resolves `<<`
        children = {}
        for key_node, value in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                children[key_node.value] = self.build(value, (*location, key_node.value), key_node)
            else:
                self.faults.append(f"{self.origin(key_node)}: {key_path(location)}: got a list or mapping for a key; allowed text")
        return children

    def _refuse_duplicates(self, node: yaml.MappingNode, location: Location) -> None:
        first: dict[str, yaml.Node] = {}
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and first.setdefault(key, key_node) is not key_node:
                where = f"{self.origin(key_node)}: {key_path((*location, key))}"
                self.faults.append(f"{where}: got the key a second time (first on line {first[key].start_mark.line + 1}); allowed once")

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        except ValueError:  # looks like a date and is none, as 2024-13-45
            return node.value
