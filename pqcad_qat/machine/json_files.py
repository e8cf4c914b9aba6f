"""JSON files as others wrote them: one object, read whole or refused in one line that names the file.

Not here: what its keys mean. Needs the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pqcad_qat.errors import ModelError

LARGEST_FILE = 2**24
"""Bytes: configs are kilobytes, the index of a thousand shards a megabyte."""

SHOWN = 80
"""Characters of a value that a message repeats."""


def read_json(path: Path, absent: str = "") -> dict[str, Any]:
    """The object that a JSON file holds; a byte-order mark before it is passed over.

    Args:
        path: of the file.
        absent: what a message adds where there is no such file.

    Raises:
        ModelError: no such file, no regular file, one that is too large, not readable, no JSON, or JSON of something
            else.
    """
    try:
        if not path.is_file():  # before it is opened: a pipe would be waited for
            kind = "not a file" if path.exists() else "no such file"
            raise ModelError(f"{path}: {kind}{absent and f'; {absent}'}")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ModelError(f"{path}: got {size} bytes; allowed {LARGEST_FILE}, far more than any config has")
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except RecursionError:
        raise ModelError(f"{path}: not readable as JSON: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: got a JSON {type(found).__name__}; allowed an object")
    return found


def shown(value: object) -> str:
    """A value as messages repeat it: as JSON spells null, and never at length."""
    text = "null" if value is None else _bounded_repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _bounded_repr(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(part) for part in value[:SHOWN])}]"
    try:
        return repr(value)
    except ValueError:  # a number of more digits than Python spells
        return "a number of thousands of digits"


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose keys stands there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found
