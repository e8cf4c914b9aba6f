"""Where the keys of a policy were written, which every error that names a key is told with, whoever finds it.

Not here: reading (policy/tree.py), and the faults of a file alone (policy/faults.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from pqcad_qat.errors import PqcadError, abridged, shortened

Location = tuple[str | int, ...]
"""A key from the top, such as ("quantization", "layers", 1, "weights", "bits")."""

KEY = re.compile(r"[a-z_]+(?:\.[A-Za-z0-9_-]+|\[\d+\])+(?=: )|[a-z_]+(?=: got )")
"""What a message begins with that names a key: one of a section, or a section itself and what was got."""


@dataclass(frozen=True, eq=False)
class Origins:
    """Location, its steps as text -> ``file:line``, or the command line's ``--set key``. It says nothing of what a
    policy means, so that all are equal.
    """

    places: Mapping[tuple[str, ...], str] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origins)

    def __hash__(self) -> int:
        return 0

    def of(self, location: Location) -> str | None:
        """Where the key was written, or the mapping that it would stand in; None for a policy that no file says."""
        steps = tuple(map(str, location))
        depths = range(len(steps), -1, -1)
        return next((self.places[steps[:depth]] for depth in depths if steps[:depth] in self.places), None)


class Written(Protocol):
    """A policy that knows where its keys were written."""

    def place(self, location: Location) -> str | None:
        """Where a key was written; None for what is no key of it, and for a policy that no file says."""


@contextmanager
def located(policy: Written) -> Iterator[None]:
    """Inside, whatever line of an error begins with a key of the policy, as in ``sampler.name: got ...``, is told with
    the key's place.
    """
    try:
        yield
    except PqcadError as error:
        error.args = (abridged([_located(line, policy) for line in str(error).splitlines()]),)
        raise


def _located(line: str, policy: Written) -> str:
    named = KEY.match(line)
    place = policy.place(key_location(named[0])) if named else None
    return line if place is None else f"{place}: {line}"


def rule_key(name: str) -> str:
    """The key of a rule of layers: ``quantization.layers.body``, or ``quantization.layers[1]`` by its number."""
    return key_path(("quantization", "layers", int(name) if name.isdecimal() else name))


def rule_text(name: str) -> str:
    """A rule of layers in the middle of a sentence: ``body``, or ``[1]``."""
    return f"[{name}]" if name.isdecimal() else name


def key_path(location: Location) -> str:
    """``quantization.layers[1].weights.bits``"""
    steps = (f"[{step}]" if isinstance(step, int) else f".{shortened(step)}" for step in location)
    return "".join(steps).removeprefix(".") or "top level"


def key_location(path: str) -> Location:
    """The location that ``quantization.layers[1].weights.bits`` names."""
    return tuple(int(index) if index else name for index, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", path))
