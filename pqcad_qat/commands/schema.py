"""The command `schema`: what a policy may say, for editors as a JSON Schema, for people as Markdown tables.

Not here: how either follows from the policies' classes (policy/loading.py, policy/reference.py).
"""

from __future__ import annotations

import json

from pqcad_qat.policy.loading import json_schema
from pqcad_qat.policy.reference import markdown_reference


def schema(markdown: bool = False) -> str:
    """The text of the schema, with its last line ended."""
    return markdown_reference() if markdown else json.dumps(json_schema(), indent=2) + "\n"
