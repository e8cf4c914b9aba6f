"""What all sections of a policy have in common: unknown keys are refused, and faults of several keys are reported at
once.

Not here: any section of a policy (schema.py, layer_rules.py, pretraining.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from pqcad_qat.policy.origins import Location, Origins


class Fault(NamedTuple):
    """A broken rule between keys: the key at fault first, then those that it was judged by, relative to the section
    with the rule.
    """

    keys: tuple[Location, ...]
    got: str
    allowed: str


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
