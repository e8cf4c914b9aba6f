"""Reading of JSON files that others wrote: one object, read as a whole or refused in one line that names the file.

Not here: the meaning of the keys. Needs the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pqcad_qat.errors import ModelError

LARGEST_FILE = 2**24
"""Largest size of a file in bytes: configs take kilobytes, the index of a thousand shards a megabyte."""

SHOWN = 80
"""Largest number of characters of a value that a message repeats."""


def read_json(path: Path, allowed: str = "a file that holds a JSON object") -> dict[str, Any]:
    """The object that a JSON file holds; a byte-order mark before it is ignored.

    Args:
        path: the file.
        allowed: what the message allows if the file does not exist.

    Raises:
        ModelError: the file does not exist, is not a regular file, is too large or unreadable, or holds no JSON object.
    """
    try:
        if not path.is_file():  # checked before opening, which would block on a pipe
            kind = "no regular file" if path.exists() else "no such file"
            raise ModelError(f"{path}: got {kind}; allowed {allowed}")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ModelError(f"{path}: got {size} bytes; allowed {LARGEST_FILE}, which is far more than any config has")
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except RecursionError:
        raise ModelError(f"{path}: got JSON that is nested too deeply; allowed a JSON object of fewer levels") from None
    except OSError as error:
        raise ModelError(f"{path}: got a file that cannot be read: {error}; allowed a readable one") from error
    except ValueError as error:
        raise ModelError(f"{path}: got text that is not JSON: {error}; allowed a JSON object") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: got a JSON {type(content).__name__}; allowed an object")
    return content


def shown(value: object) -> str:
    """A value as messages repeat it: None as JSON's null, and long values cut off."""
    text = "null" if value is None else _bounded_repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _bounded_repr(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(part) for part in value[:SHOWN])}]"
    try:
        return repr(value)
    except ValueError:  # the number has more digits than Python converts
        return "a number of thousands of digits"


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its pairs; a key that it has twice is an error."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return content
