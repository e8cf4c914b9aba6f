"""The layers that a pattern of a policy's rule matches: by module path, by regular expression, or by class.

Not here: how a rule quantizes the layers that it matches (plan.py).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from pqcad_qat.errors import shortened
from pqcad_qat.policy.origins import rule_key, rule_text

if TYPE_CHECKING:
    from pqcad_qat.policy.layer_rules import LayerRule


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def quoted(pattern: str) -> str:
    """A pattern as messages show it."""
    return shortened(repr(pattern))


def matches_layer(pattern: str, name: str, model: nn.Module) -> bool:
    """Whether one pattern of a rule names the layer: a glob on its path, re:REGEX (whole path), or type:CLASS.

    The halves of a split convolution also answer to the path that the convolution had.
    """
    if pattern.startswith("type:"):
        return fnmatch.fnmatchcase(type(model.get_submodule(name)).__name__, pattern[5:])
    names = [name]
    parent = name.rpartition(".")[0]
    if getattr(model.get_submodule(parent), "is_split_convolution", False):
        names.append(parent)
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], candidate) for candidate in names)
    return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in names)


def claims(
    model: nn.Module, layers: dict[str, nn.Module], rules: Mapping[str, LayerRule]
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """The (rule's name, pattern) that claims each layer, in the model's order, and messages about useless patterns.

    The first rule that matches a layer claims it. A pattern is useless if it is no regular expression, matches no
    layer, or matches only layers that earlier rules have.
    """
    claimed: dict[str, tuple[str, str]] = {}
    faults = []
    for rule_name, rule in rules.items():
        before = dict(claimed)
        for pattern in rule.match:
            got = f"{rule_key(rule_name)}.match: got {quoted(pattern)}"
            try:
                hits = [name for name in layers if matches_layer(pattern, name, model)]
            except (re.error, RecursionError, OverflowError) as error:
                faults.append(
                    f"{got}, no regular expression ({shortened(str(error))}); allowed one, such as re:down_blocks.*"
                )
                continue
            if not hits:
                faults.append(
                    f"{got}, which matches no Conv2d or Linear of the model; allowed patterns that "
                    f"do{_suggest(pattern, layers)}"
                )
            elif all(name in before for name in hits):
                owners = listed(sorted({f"{rule_text(before[name][0])} ({quoted(before[name][1])})" for name in hits}))
                faults.append(
                    f"{got}, whose layers earlier rules have: {owners}; allowed a pattern that matches "
                    "one more, or an earlier place"
                )
            for name in hits:
                claimed.setdefault(name, (rule_name, pattern))
    return {name: claimed[name] for name in layers if name in claimed}, faults


def _suggest(pattern: str, layers: dict[str, nn.Module]) -> str:
    """The end of a message about a pattern that matches nothing: the layers' classes, or names close to the pattern."""
    if pattern.startswith("type:"):
        classes = sorted({type(layer).__name__ for layer in layers.values()})
        return f"; its classes are {', '.join(classes)}"
    bare = pattern.removeprefix("re:").strip("*.^$").replace("*", "").replace("\\", "")
    prefixes = {name.rsplit(".", depth)[0] for name in layers for depth in range(name.count(".") + 1)}
    ends = {name.rpartition(".")[2] for name in layers}
    close = difflib.get_close_matches(bare, sorted(prefixes | ends), n=3, cutoff=0.5)
    return f"; close names: {', '.join(close)}" if close else ""
