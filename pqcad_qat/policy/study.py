"""Definition of a study: the policies, overrides, axes and seeds whose product is its cells.

Not here: quantization policies (policy/schema.py), or the expansion into cells (policy/study_cells.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from pqcad_qat.policy.origins import Location
from pqcad_qat.policy.sections import Fault, Section
from pqcad_qat.policy.value_types import Name, Seed, Text

Overrides = dict[str, Any]  # dotted key of a policy -> value
Files = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)]
Seeds = Annotated[tuple[Seed, ...], Strict(False), Field(min_length=1)]

OWN_KEYS = ("name", "kind", "extends", "training.seed")
"""Keys of a cell's policy that the study sets itself."""


class StudyPolicy(Section):
    """Runs to compare in one table, called cells: every policy, at every combination of levels, with every seed."""

    kind: Literal["study"] = Field(description="tells a study from a policy")
    name: Name = Field(description="name of the study and of its folder")
    policies: Files = Field(description="policy files, relative to this one")
    set: Overrides = Field({}, description="overrides for every cell, key: value")
    axes: dict[str, dict[str, Overrides]] = Field(
        {}, description="axis -> level -> overrides, key: value, over those of set"
    )
    seeds: Seeds = Field((0,), description="values of training.seed; figures are reported as mean and spread over them")

    def faults(self) -> Iterator[Fault]:
        yield from self._named_wrongly()
        yield from self._set_twice()
        if len({*self.seeds}) < len(self.seeds):
            yield Fault((("seeds",),), str(list(self.seeds)), "each seed once")
        places = [(("set",), self.set), *((("axes", axis, level), keys) for axis, level, keys in self._levels())]
        for place, overrides in places:
            for keys in leaves(overrides):
                if ".".join(keys) in OWN_KEYS:
                    yield Fault(
                        ((*place, *keys), place), "a key that the study sets itself", "seeds: [...], or another key"
                    )

    def _levels(self) -> Iterator[tuple[str, str, Overrides]]:
        return ((axis, level, keys) for axis, levels in self.axes.items() for level, keys in levels.items())

    def _named_wrongly(self) -> Iterator[Fault]:
        names: list[Location] = [("axes", axis) for axis in self.axes] + [
            ("axes", axis, level) for axis, level, _ in self._levels()
        ]
        for location in names:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(location[-1])):
                yield Fault((location,), repr(location[-1]), "a name of letters, digits, '.', '_' and '-'")
        for axis in (axis for axis, levels in self.axes.items() if not levels):
            yield Fault((("axes", axis),), "no level", "one or more")

    def _set_twice(self) -> Iterator[Fault]:
        """Yield keys that two axes set, since the value of only one axis could take effect."""
        first: dict[str, str] = {}
        for axis, level, overrides in self._levels():
            for keys in leaves(overrides):
                first_axis = first.setdefault(".".join(keys), axis)
                if first_axis != axis:
                    yield Fault(
                        (("axes", axis, level, *keys), ("axes", axis, level)),
                        "a key of two axes",
                        f"one; {first_axis} sets it too",
                    )


def leaves(overrides: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the path of keys to every value, however nested; joined by dots it is a key of a policy."""
    for key, value in overrides.items():
        below = leaves(value) if isinstance(value, Mapping) and value else ((),)
        yield from ((key, *keys) for keys in below)
