"""What all sections of a policy have in common: unknown keys are refused, and faults of several keys are reported at
once.

Not here: any section of a policy (schema.py, layer_rules.py, pretraining.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from pqcad_qat.errors import shortened
from pqcad_qat.policy.origins import Location, Origins


class Fault(NamedTuple):
    """A broken rule between keys: the key at fault first, then those that it was judged by, relative to the section
    with the rule.
    """

    keys: tuple[Location, ...]
    got: str
    allowed: str


KEY_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
"""Pattern of the names that users give to rules and targets, which `--set` has to be able to spell."""


def faults_of_names(key: str, names: Iterable[str], kind: str) -> Iterator[Fault]:
    """Faults of the names that the mapping below a key has for things of a kind, such as rules."""
    for name in names:
        if not KEY_NAME.fullmatch(name):
            got = f"a {kind} named {shortened(repr(name))}"
            yield Fault(((key, name),), got, "a name of at most 60 letters, digits, - and _")


def without_nulls(named: Mapping[Any, Any]) -> dict[Any, Any]:
    """Leave out names whose value is null: so a policy drops a rule or a target of the one that it extends."""
    return {name: value for name, value in named.items() if value is not None}


def known_keys(known: Collection[str], unknown: str) -> str:
    """Return the known keys as text, with a hint at the one that the unknown key resembles."""
    close = get_close_matches(unknown, known, n=1)
    return ", ".join(known) + (f" (did you mean {close[0]}?)" if close else "")


class Section(BaseModel):
    """A frozen, strict part of a policy. `faults` yields the broken rules between its keys; all are raised together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def faults(self) -> Iterator[Fault]:
        return iter(())

    @model_validator(mode="after")
    def _hold_rules(self) -> Self:
        faults = list(self.faults())
        if faults:
            message = "; ".join(f"got {fault.got}; allowed {fault.allowed}" for fault in faults)
            raise PydanticCustomError("policy_rule", message, {"faults": faults})
        return self


class PolicyFile(Section):
    """A whole policy. It also knows where its keys were written, which is no part of its value or of its dump."""

    _origins: Origins = PrivateAttr(default_factory=Origins)

    @property
    def origins(self) -> Origins:
        return self._origins

    def place(self, location: Location) -> str | None:
        """Return where a key was written; None for an unknown key, or for a policy that was not read from a file."""
        return self._origins.place(location) if location and location[0] in type(self).model_fields else None

    def written(self, origins: Origins) -> Self:
        """Return the policy itself, after noting where its keys were written."""
        self._origins = origins
        return self
