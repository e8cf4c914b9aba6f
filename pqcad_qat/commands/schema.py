"""The command `schema`: the keys of a policy, as a JSON Schema for editors, or as Markdown tables for people.

Not here: how either is derived from the policies' classes (policy/loading.py, policy/key_tables.py).
"""

from __future__ import annotations

import json

from pqcad_qat.policy.key_tables import markdown_reference
from pqcad_qat.policy.loading import json_schema


def schema(markdown: bool = False) -> str:
    """Text of the schema, ending in a line break."""
    return markdown_reference() if markdown else json.dumps(json_schema(), indent=2) + "\n"
