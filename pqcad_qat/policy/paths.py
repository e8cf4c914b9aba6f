"""Keys of a policy that name files: a path is relative to the file in which it is written, and is made absolute on
reading.

Not here: `extends`, which is followed at once (policy/loading.py), or whether the named file is usable.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pqcad_qat.errors import shortened
from pqcad_qat.policy.origins import Location, key_path
from pqcad_qat.policy.shipped import named_file
from pqcad_qat.policy.tree import Tree, key_steps

PATHS: Mapping[Location, str] = {
    ("model", "source"): r"(embedded|module):.*",
    ("conditions", "prompts"): "",
    ("conditions", "embeddings"): "",
    ("evaluation", "features"): r"none|auto|efficientnet-lite0|embedded:.*",
    ("evaluation", "reference"): "",
    ("evaluation", "clip"): "",
    ("data", "path"): "",
}
"""Keys that hold paths, each with a pattern of the special words that are not paths."""

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""Pattern of values that are kept where no such file exists: a hub repository, or an architecture that ships."""

HUB = ("model", "source")
"""The key that may also name a hub repository or a shipped architecture."""


def anchor(tree: Tree, file: Path, faults: list[str]) -> None:
    """Make every path in a file's tree absolute, relative to the folder of the file."""
    for location, node in _paths(tree):
        node.value, fault = _from_file(str(node.value), file, location == HUB)
        if fault:
            faults.append(f"{node.origin}: {key_path(location)}: {fault}")
    policies = tree.child("policies")
    for entry in policies.children if policies is not None and isinstance(policies.children, list) else []:
        if isinstance(entry.value, str):
            entry.value = os.path.normpath(named_file(entry.value, file.parent))


def anchor_override(steps: list[str], value: Tree, faults: list[str]) -> None:
    """Make the paths of a command-line override absolute where they exist in the working folder.

    Other values stay as typed.
    """
    for location, node in _below(value, tuple(steps)):
        path = os.path.expanduser(str(node.value))
        there, fault = _is_there(Path(path))
        if there:
            node.value = os.path.abspath(path)
        elif fault:
            faults.append(f"{node.origin}: {key_path(location)}: {fault}")


def _paths(tree: Tree) -> Iterator[tuple[Location, Tree]]:
    """Yield the nodes that hold a path, in a policy's tree or in a study's overrides."""
    yield from _below(tree, ())
    axes = tree.child("axes")
    levels = [level for axis in _children(axes).values() for level in _children(axis).values()]
    for overlay in (tree.child("set"), *levels):
        if overlay is not None:
            yield from _below(overlay, ())


def _below(tree: Tree, location: Location) -> Iterator[tuple[Location, Tree]]:
    if (
        location in PATHS
        and isinstance(tree.value, str)
        and tree.value
        and not re.fullmatch(PATHS[location], tree.value, re.DOTALL)
    ):
        yield location, tree
    if len(location) < max(map(len, PATHS)):
        for key, child in _children(tree).items():
            yield from _below(child, (*location, *key_steps(key)))


def _children(tree: Tree | None) -> dict[str, Tree]:
    return tree.children if tree is not None and isinstance(tree.children, dict) else {}


def _from_file(text: str, file: Path, hub: bool) -> tuple[str, str | None]:
    """Return the absolute path that a file means by a text, and a fault or None."""
    path = os.path.expanduser(text)
    meant = os.path.normpath(file.parent.absolute() / path)
    there, fault = _is_there(Path(meant))
    if there or fault:
        return meant if there else text, fault
    if not os.path.isabs(path) and _is_there(Path(path))[0]:
        instead = os.path.relpath(path, file.parent)
        reason = f"{meant} is not there, and {shortened(text)!r} of the working folder is not meant"
        allowed = f"a path from the folder of {file.name}, such as {instead}: {reason}"
        return text, f"got {shortened(text)!r}; allowed {allowed}"
    return (text if hub and HUB_ID.fullmatch(path) else meant), None


def _is_there(path: Path) -> tuple[bool, str | None]:
    """Return whether a path exists, and a message where no path can have this form."""
    try:
        path.stat()
    except ValueError:
        return (
            False,
            f"got {shortened(str(path))!r} (with a character that no path has); allowed a path that the "
            "file system takes",
        )
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return False, f"got {shortened(str(path))!r} ({error.strerror}); allowed a path that the file system takes"
        return False, None
    return True, None
