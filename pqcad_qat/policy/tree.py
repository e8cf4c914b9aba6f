"""A policy's values as a tree that knows where each was written, with merging and the setting of one value.

Not here: reading (policy/yaml_text.py), the meaning of values (policy/schema.py), or checks (policy/faults.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pqcad_qat.errors import PolicyError, shortened
from pqcad_qat.policy.origins import Location, Origins


@dataclass
class Tree:
    """A YAML value with its children.

    Attributes:
        value: value of a scalar; None for a mapping or list.
        origin: where it was written: ``file:line``, or the command line's ``--set key``.
        children: values of a mapping by key, or items of a list; None for a scalar.
    """

    value: Any
    origin: str
    children: dict[str, Tree] | list[Tree] | None = None

    def child(self, step: str | int) -> Tree | None:
        """Return the child at a key or list index; None where there is none."""
        if isinstance(self.children, dict):
            return self.children.get(str(step))
        if isinstance(self.children, list) and isinstance(step, int) and 0 <= step < len(self.children):
            return self.children[step]
        return None

    def plain(self) -> Any:
        """Return the value without origins: dictionaries, lists and scalars."""
        if isinstance(self.children, dict):
            return {key: child.plain() for key, child in self.children.items()}
        if isinstance(self.children, list):
            return [child.plain() for child in self.children]
        return self.value

    @property
    def size(self) -> int:
        """Number of values in this tree, itself included."""
        below = self.children.values() if isinstance(self.children, dict) else self.children or ()
        return 1 + sum(child.size for child in below)

    def origins(self) -> Origins:
        """Return where every key was written."""
        return Origins(dict(self._places(())))

    def _places(self, location: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        yield location, self.origin
        below = self.children.items() if isinstance(self.children, dict) else enumerate(self.children or ())
        for step, child in below:
            yield from child._places((*location, str(step)))

    def deepest(self, location: Location) -> tuple[Tree, Location]:
        """Return the deepest existing tree on the way to a location, and the part of the location that leads to it."""
        tree: Tree = self
        reached: Location = ()
        for step in location:
            child = tree.child(step)
            if child is None:
                break
            tree, reached = child, (*reached, step)
        return tree, reached


def key_steps(key: str) -> list[str]:
    """Split a key into steps; ``layers[0].weights.bits`` has four."""
    return [step for step in re.split(r"[.\[\]]+", key.strip()) if step]


def merge(below: Tree, above: Tree) -> Tree:
    """Merge `above` over `below`: mappings merge key by key, and any other value replaces the one below."""
    if not isinstance(below.children, dict) or not isinstance(above.children, dict):
        return above
    merged = dict(below.children)
    for key, child in above.children.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Tree(None, above.origin, merged)


def assign(tree: Tree, steps: Sequence[str], value: Tree) -> Tree:
    """Return the tree with `value` merged in at the steps; a digit is an index where there is a list.

    Raises:
        PolicyError: a step is no index of its list.
    """
    if not steps:
        return merge(tree, value)
    if isinstance(tree.children, list):
        items = list(tree.children)
        if not re.fullmatch(r"[0-9]{1,9}", steps[0]) or int(steps[0]) >= len(items):
            raise PolicyError(f"{value.origin}: got index {shortened(steps[0])}; allowed 0 to {len(items) - 1}")
        items[int(steps[0])] = assign(items[int(steps[0])], steps[1:], value)
        return Tree(None, tree.origin, items)
    children = dict(tree.children or {})
    children[steps[0]] = assign(children.get(steps[0], Tree(None, value.origin)), steps[1:], value)
    return Tree(None, tree.origin if tree.children is not None else value.origin, children)
