"""Markdown tables of every key of every kind of policy: its default, its allowed values, and its purpose.

Not here: the definition of policies (policy/schema.py), from which the tables are made.
"""

from __future__ import annotations

import json

from pqcad_qat.policy.faults import Schema
from pqcad_qat.policy.loading import COMMANDS
from pqcad_qat.policy.origins import Location
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.sections import Section
from pqcad_qat.policy.study import StudyPolicy

ANY_NAME = "NAME"
"""Placeholder for a name of the user's choice in the path of a key."""


def markdown_reference() -> str:
    """Return one heading per command, and under it one table per section of the policies that the command takes."""
    kinds: tuple[type[Section], ...] = (Policy, PretrainPolicy, StudyPolicy)
    return "\n".join(
        f"## Keys for `{command}`\n\n{_tables(Schema(kind))}"
        for command, kind in zip(COMMANDS.values(), kinds, strict=True)
    )


def _tables(schema: Schema) -> str:
    names = schema.keys(schema.root)
    single = [name for name in names if not schema.is_section((name,))]
    tables = [_table(schema, [place for name in single for place in ((name,), *_below(schema, (name, ANY_NAME)))])]
    for name in names:
        if name not in single:
            summary = schema.follow((name,))[0]["description"]
            tables.append(f"### {name}\n\n{' '.join(summary.split())}\n\n{_table(schema, _keys_of(schema, (name,)))}")
    return "\n".join(tables)


def _keys_of(schema: Schema, section: Location) -> list[Location]:
    """Return the keys of a section, each followed by the keys below it."""
    locations: list[Location] = []
    for key in schema.keys(schema.follow(section)[0]):
        location = (*section, key)
        locations += [location] * (not schema.is_section(location))
        locations += _below(schema, location)
        locations += _below(schema, (*location, ANY_NAME)) or _below(schema, (*location, 0))
    return locations


def _below(schema: Schema, place: Location) -> list[Location]:
    known = schema.follow(place)[1] == place
    return _keys_of(schema, place) if known else []


def _table(schema: Schema, locations: list[Location]) -> str:
    rows = ["| key | default | may be | what it is |", "|---|---|---|---|"]
    return "\n".join([*rows, *(_row(schema, location) for location in locations)]) + "\n"


def _row(schema: Schema, location: Location) -> str:
    node, _ = schema.follow(location)
    path = ".".join("NUMBER" if isinstance(step, int) else step for step in location)
    default = f"`{json.dumps(node['default'])}`" if "default" in node else "required"
    cells = [f"`{path}`", default, schema.describe(node), node["description"]]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
