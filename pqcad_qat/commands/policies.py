"""The command `policies`: the policies that ship, one of them as it reads, or a copy of it to start one's own.

Not here: where they lie and how a copy is made (policy/shipped.py).
"""

from __future__ import annotations

from pathlib import Path

from pqcad_qat.errors import UsageError
from pqcad_qat.policy.shipped import ShippedPolicy, copy_policy, shipped_policies, shipped_policy


def policies_that_ship() -> tuple[ShippedPolicy, ...]:
    """All policies that ship, by kind and name."""
    return shipped_policies()


def policy_text(name: str) -> str:
    """A policy that ships, as it reads.

    Raises:
        PolicyError: there is none of that name.
    """
    return shipped_policy(name).file.read_text(encoding="utf-8")


def copied(name: str, to: str) -> tuple[Path, ...]:
    """Start a policy of one's own from one that ships; returns the files that were written.

    Raises:
        UsageError: a file that no policy can have.
        PolicyError: there is none of that name, or a file is there already.
    """
    if Path(to).suffix not in (".yaml", ".yml"):
        raise UsageError(f"--copy: got {to!r}; allowed a name in .yaml")
    return copy_policy(shipped_policy(name), Path(to))
