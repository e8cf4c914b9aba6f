"""The table of the policies that ship, which the command `policies` shows without loading torch.

Not here: tables about models and runs (tables.py), whose imports take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box

from pqcad_qat.policy.loading import COMMANDS
from pqcad_qat.policy.shipped import ShippedPolicy
from pqcad_qat.report.terminal_table import TerminalTable


def policies_table(policies: Sequence[ShippedPolicy]) -> TerminalTable:
    """Table of the policies that ship with the package, with the command that takes each."""
    table = TerminalTable("policy", "taken by", "what it is for", box=box.SIMPLE_HEAD)
    for policy in policies:
        table.add_row(policy.name, COMMANDS[policy.kind], policy.summary)
    return table
