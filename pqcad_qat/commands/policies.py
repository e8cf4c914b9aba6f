"""The command `policies`: list the policies that ship with the package, print one of them, or copy one as the start of
the user's own.

Not here: where they are stored and how a copy is made (policy/shipped.py).
"""

from __future__ import annotations

from pathlib import Path

from pqcad_qat.errors import UsageError
from pqcad_qat.policy.shipped import ShippedPolicy, copy_policy, shipped_policies, shipped_policy


def policies_that_ship() -> tuple[ShippedPolicy, ...]:
    """All policies that ship with the package, by kind and name."""
    return shipped_policies()


def policy_text(name: str) -> str:
    """Text of a policy that ships with the package.

    Raises:
        PolicyError: there is no policy of that name.
    """
    return shipped_policy(name).file.read_text(encoding="utf-8")


def copied(name: str, to: str) -> tuple[Path, ...]:
    """Copy a shipped policy as the start of the user's own; return the files that were written.

    Raises:
        UsageError: the file name does not end in .yaml or .yml.
        PolicyError: there is no policy of that name, or a file exists already.
    """
    if Path(to).suffix not in (".yaml", ".yml"):
        raise UsageError(f"--copy: got {to!r}; allowed a name in .yaml")
    return copy_policy(shipped_policy(name), Path(to))
