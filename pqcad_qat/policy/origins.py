"""Places where the keys of a policy were written. They are added to every error that names a key, whichever module
raises it.

Not here: reading (policy/tree.py), or the faults of a file on its own (policy/faults.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from pqcad_qat.errors import PqcadError, abridged, shortened

Location = tuple[str | int, ...]
"""Path of a key from the top, such as ("quantization", "layers", 1, "weights", "bits")."""

KEY = re.compile(r"[a-z_]+(?:\.[A-Za-z0-9_-]+|\[\d+\])+(?=: )|[a-z_]+(?=: got )")
"""Pattern of a key at the start of a message: a key inside a section, or a section followed by "got"."""


@dataclass(frozen=True, eq=False)
class Origins:
    """Map from a key's location, its steps as text, to ``file:line`` or to the command line's ``--set key``.

    All instances compare equal, because the place of a key does not change the meaning of a policy.
    """

    places: Mapping[tuple[str, ...], str] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origins)

    def __hash__(self) -> int:
        return 0

    def place(self, location: Location) -> str | None:
        """Return where a key was written, or else its nearest enclosing mapping; None for a policy that was not read
        from a file.
        """
        steps = tuple(map(str, location))
        depths = range(len(steps), -1, -1)
        return next((self.places[steps[:depth]] for depth in depths if steps[:depth] in self.places), None)


class Written(Protocol):
    """A policy that knows where its keys were written."""

    def place(self, location: Location) -> str | None:
        """Return where a key was written; None for an unknown key, or for a policy that was not read from a file."""


@contextmanager
def located(policy: Written) -> Iterator[None]:
    """Add the place of the key to every line of an error that begins with a key, such as ``sampler.name: got ...``.

    This holds for errors raised within the context.
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
    """Return a layer rule's key: ``quantization.layers.body``, or ``quantization.layers[1]`` in a list."""
    return key_path(("quantization", "layers", int(name) if name.isdecimal() else name))


def rule_text(name: str) -> str:
    """Return a layer rule's name within a sentence: ``body``, or ``[1]`` for a rule in a list."""
    return f"[{name}]" if name.isdecimal() else name


def key_path(location: Location) -> str:
    """Return a location as text, such as ``quantization.layers[1].weights.bits``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{shortened(step)}" for step in location)
    return "".join(steps).removeprefix(".") or "top level"


def key_location(path: str) -> Location:
    """Return the location of a text such as ``quantization.layers[1].weights.bits``."""
    return tuple(int(index) if index else name for index, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", path))
