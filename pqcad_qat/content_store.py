"""Folders of work that runs side by side share, each named by the hash of all that decides its contents.

Not here: what is kept in them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path


def content_digest(decides: Mapping[str, object]) -> str:
    """The name of what `decides`, JSON values by name, leads to."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def kept(store: Path, decides: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder of what `decides`: there already, or filled by `make` under a temporary name and moved into place."""
    folder = store / content_digest(decides)
    if folder.exists():
        return folder
    draft = store / f".{folder.name}.{secrets.token_hex(4)}"
    draft.mkdir(parents=True)
    try:
        make(draft)
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # else another run has made the same meanwhile
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
