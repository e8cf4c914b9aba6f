"""Reading YAML text into a tree, with bounds that are enforced while a document and its aliases are expanded.

Not here: the tree (policy/tree.py), or the meaning of its values (policy/schema.py).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pqcad_qat.errors import PolicyError, shortened
from pqcad_qat.policy.origins import Location, key_path
from pqcad_qat.policy.tree import Tree

Origin = Callable[[int], str]  # line number of a text -> the place at the start of a message

BYTES = 1_000_000
"""Largest size of a policy file, in bytes."""

NODES = 50_000
"""Largest number of values and keys of a document, each alias counted at its expanded size. A policy with a rule for
each of 800 layers has 30,000.
"""

DEPTH = 40
"""Largest depth of nested mappings and lists."""

WHOLE_NUMBERS = range(-(2**63), 2**63)
"""Range of whole numbers that a policy may hold: those of 64 bits."""

TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "value")}
"""Tags of YAML's core types, the only ones that a policy may use."""

MERGE, TEXT = "tag:yaml.org,2002:merge", {"tag:yaml.org,2002:str", "tag:yaml.org,2002:value"}
EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
"""Pattern of numbers with an exponent, some of which PyYAML reads as text, such as 1e-4."""

Pairs = list[tuple[yaml.Node, yaml.Node]]


class BoundError(yaml.MarkedYAMLError):
    """A document larger than a policy may be."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with two rules of YAML 1.2 and with bounds: 1e-4 is a number, and a date is text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        check_bounds(self.nodes, self.depth, self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """A dumper whose output Loader reads back unchanged; text such as '1e4' is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def check_bounds(nodes: int, depth: int, mark: yaml.Mark | None) -> None:
    """Raise BoundError where a document has too many values or is nested too deeply."""
    if nodes > NODES:
        raise BoundError(
            None, None, f"a document of more than {NODES:,} values, aliases counted as what they stand for", mark
        )
    if depth > DEPTH:
        raise BoundError(None, None, f"a nesting of more than {DEPTH} levels", mark)


def read_text(path: Path) -> str:
    """Return the text of a policy file. Raises PolicyError where it cannot be read."""
    try:
        # Only regular files are opened: a pipe would block until it has a writer, and a device may have no end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PolicyError(
                f"{path}: got {'a folder' if path.is_dir() else 'no regular file'}; allowed a policy file "
                "that can be read"
            )
        with path.open("rb") as file:
            content = file.read(BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PolicyError(
            f"{shortened(str(path), 300)}: got {reason}; allowed a policy file that can be read"
        ) from error
    if len(content) > BYTES:
        raise PolicyError(f"{path}: got more than {BYTES:,} bytes; allowed a policy file of up to so many")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PolicyError(
            f"{path}:{line}: got the byte 0x{error.object[error.start]:02x}; allowed text in UTF-8"
        ) from error


def parse(text: str, origin: Origin) -> tuple[Tree | None, list[str]]:
    """Return the tree of a YAML text, None where the text is empty or broken, and the faults of its form."""
    try:
        builder = _Builder(Loader(text), origin)
        root = builder.loader.get_single_node()
        return (None, []) if root is None else (builder.build(root, (), root), builder.faults)
    except yaml.MarkedYAMLError as error:
        return None, [_syntax_fault(error, origin)]
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        return None, [f"{origin(line)}: got the character {text[error.position]!r}; allowed printable text"]


def _syntax_fault(error: yaml.MarkedYAMLError, origin: Origin) -> str:
    mark = error.problem_mark or error.context_mark
    context = f" {error.context}" if error.context else ""
    hint = " (indent with spaces)" if "\\t" in str(error.problem) else ""
    allowed = "as much as a policy needs" if isinstance(error, BoundError) else f"YAML{hint}"
    return (
        f"{origin(mark.line + 1 if mark else 1)}: got {shortened(f'{error.problem}{context}', 200)}; allowed {allowed}"
    )


@dataclass
class _Builder:
    """Conversion of PyYAML's nodes into a Tree, with a record of the keys that it refuses."""

    loader: Loader
    origin_of: Origin
    faults: list[str] = field(default_factory=list)
    nodes: int = 0
    pairs: dict[int, Pairs | None] = field(default_factory=dict)

    def origin(self, node: yaml.Node) -> str:
        return self.origin_of(node.start_mark.line + 1)

    def build(self, node: yaml.Node, location: Location, written_at: yaml.Node) -> Tree:
        """Build the tree of a node. `written_at` is the node whose line is the value's place: its key, in a mapping."""
        self.nodes += 1
        check_bounds(self.nodes, len(location), node.start_mark)
        if node.tag not in TAGS:
            raise yaml.constructor.ConstructorError(None, None, f"the tag {shortened(node.tag)}", node.start_mark)
        origin = self.origin(written_at)
        if isinstance(node, yaml.MappingNode):
            self._refuse_duplicates(node, location)
            children = {
                key.value: self.build(value, (*location, key.value), key)
                for key, value in self._resolved(node, location)
            }
            return Tree(None, origin, children)
        if isinstance(node, yaml.SequenceNode):
            return Tree(
                None, origin, [self.build(item, (*location, index), item) for index, item in enumerate(node.value)]
            )
        return Tree(self._scalar(node, location), origin)

    def _resolved(self, node: yaml.MappingNode, location: Location) -> Pairs:
        """Return the pairs of a mapping with each key once: first those merged by `<<`, then the mapping's own, which
        win.

        `pairs` holds None for a mapping while it is being resolved, which reveals one that merges into itself.
        """
        if id(node) in self.pairs:
            known = self.pairs[id(node)]
            if known is None:
                raise yaml.constructor.ConstructorError(
                    None, None, "a mapping that `<<` merges into itself", node.start_mark
                )
            return known
        self.pairs[id(node)] = None
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                mappings = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for mapping in reversed(mappings):  # the first of several mappings wins
                    merged |= {pair[0].value: pair for pair in self._merged(mapping, location)}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.faults.append(
                    f"{self.origin(key)}: {key_path(location)}: got a list or mapping for a key; allowed text"
                )
            elif key.tag != MERGE:
                merged[key.value] = (key, value)
        self.pairs[id(node)] = pairs = list(merged.values())
        return pairs

    def _merged(self, node: yaml.Node, location: Location) -> Pairs:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(
                None, None, f"no mapping to merge by `<<` at {key_path(location)}", node.start_mark
            )
        return self._resolved(node, location)

    def _refuse_duplicates(self, node: yaml.MappingNode, location: Location) -> None:
        first: dict[str, yaml.Node] = {}
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and first.setdefault(key, key_node) is not key_node:
                where = f"{self.origin(key_node)}: {key_path((*location, key))}"
                self.faults.append(
                    f"{where}: got the key a second time (first on line {first[key].start_mark.line + 1}); allowed once"
                )

    def _scalar(self, node: yaml.Node, location: Location) -> Any:
        if node.tag in TEXT:
            return node.value
        try:
            value = self.loader.construct_object(node)
        except (ValueError, KeyError, IndexError) as error:
            if not re.fullmatch(r"[-+]?[\d_]+", node.value):
                got = f"{shortened(node.value)!r} as a value of the tag {node.tag.rpartition(':')[2]}"
                raise yaml.constructor.ConstructorError(None, None, got, node.start_mark) from error
            value = WHOLE_NUMBERS.stop  # more digits than Python converts; out of bounds in any case
        if type(value) is int and value not in WHOLE_NUMBERS:
            where = f"{self.origin(node)}: {key_path(location)}"
            self.faults.append(f"{where}: got {shortened(node.value)}; allowed whole numbers that 64 bits hold")
            return None
        return value
