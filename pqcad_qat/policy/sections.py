"""What every section of a policy has in common: unknown keys are refused, faults of several keys are told together.

Not here: any section of a policy (schema.py, quantizers.py, pretraining.py).
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
    """What is allowed in the place of an unknown key."""
    close = get_close_matches(unknown, known, n=1)
    return ", ".join(known) + (f" (did you mean {close[0]}?)" if close else "")


class Section(BaseModel):
    """A frozen, strict part of a policy; `faults` yields the broken rules between its keys, and all of them are raised
    together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def faults(self) -> Iterator[Fault]:
        return iter(())

    @model_validator(mode="after")
    def _hold_rules(self) -> Self:
        found = list(self.faults())
        if found:
            message = "; ".join(f"got {fault.got}; allowed {fault.allowed}" for fault in found)
            raise PydanticCustomError("policy_rule", message, {"faults": found})
        return self


class PolicyFile(Section):
    """A whole policy, which knows where its keys were written; that is no part of what it says, and of no dump."""

    _origins: Origins = PrivateAttr(default_factory=Origins)

    @property
    def origins(self) -> Origins:
        return self._origins

    def place(self, location: Location) -> str | None:
        """Where a key was written; None for what is no key of this policy, and for one that no file says."""
        return self._origins.of(location) if location and location[0] in type(self).model_fields else None

    def written(self, origins: Origins) -> Self:
        """The policy as it was written there."""
        self._origins = origins
        return self
