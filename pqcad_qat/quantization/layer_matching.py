"""The layers that a pattern of a policy's rule matches: by module path, regular expression, class, or role.

Not here: how roles are found (layer_roles.py), and how a rule quantizes the layers that it matches (plan.py).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from pqcad_qat.errors import shortened
from pqcad_qat.policy.layer_rules import ROLES
from pqcad_qat.policy.origins import rule_key, rule_text

if TYPE_CHECKING:
    from pqcad_qat.policy.layer_rules import LayerRule


LENIENT = (*ROLES, "type:Conv2d", "type:Linear")
"""Patterns that fit every network, and may therefore match no layer of one."""


@dataclass(frozen=True)
class Claims:
    """What the patterns of a policy's rules match in a network.

    Attributes:
        layers: layer -> (name of the rule, pattern) that claims it, in the network's order.
        faults: messages about patterns that no policy may hold.
        remarks: messages about lenient patterns that claim nothing.
    """

    layers: Mapping[str, tuple[str, str]]
    faults: Sequence[str]
    remarks: Sequence[str]


def names_roles(rules: Mapping[str, LayerRule]) -> bool:
    """Whether a pattern of the rules is a role, so that the roles of layers have to be found."""
    return any(pattern in ROLES for rule in rules.values() for pattern in rule.match)


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
    model: nn.Module,
    layers: dict[str, nn.Module],
    rules: Mapping[str, LayerRule],
    roles: Mapping[str, Collection[str]],
) -> Claims:
    """Match layers with patterns: the first rule that matches a layer claims it.

    A pattern is at fault if it is no regular expression, matches no layer, or matches only layers that earlier rules
    have. The last two are a remark for a lenient pattern. The rules are at fault together if none of them claims a
    layer, or none of those that quantize.

    Args:
        model: the network.
        layers: its layers that can be quantized, by path.
        rules: the policy's rules by name.
        roles: layers of each role; may be empty if the rules name none.
    """
    claimed: dict[str, tuple[str, str]] = {}
    faults, remarks = [], []
    for rule_name, rule in rules.items():
        before = dict(claimed)
        for pattern in rule.match:
            key = f"{rule_key(rule_name)}.match"
            try:
                hits = (
                    [name for name in layers if name in roles[pattern]]
                    if pattern in ROLES
                    else [name for name in layers if matches_layer(pattern, name, model)]
                )
            except (re.error, RecursionError, OverflowError) as error:
                faults.append(
                    f"{key}: got {quoted(pattern)}, no regular expression ({shortened(str(error))}); allowed one, such "
                    "as re:down_blocks.*"
                )
                continue
            if useless := _useless(hits, before):
                if pattern in LENIENT:
                    remarks.append(f"{key}: {quoted(pattern)} {useless}")
                else:
                    allowed = "one more, or an earlier place" if hits else f"one{_suggest(pattern, layers)}"
                    faults.append(
                        f"{key}: got {quoted(pattern)}, which {useless}; allowed a pattern that matches {allowed}"
                    )
            for name in hits:
                claimed.setdefault(name, (rule_name, pattern))
    quantizing = {name for name, rule in rules.items() if not rule.keep_float} or rules.keys()
    if not faults and not any(rule_name in quantizing for rule_name, _ in claimed.values()):
        faults.append(
            f"quantization.layers: got rules that claim no layer to quantize ({'; '.join(remarks)}); allowed rules "
            "that claim a module of exactly the class Conv2d or Linear"
        )
    return Claims({name: claimed[name] for name in layers if name in claimed}, faults, remarks)


def _useless(hits: Sequence[str], before: Mapping[str, tuple[str, str]]) -> str:
    """Why a pattern that matches these layers is useless, or "" if it is not; `before` has those of earlier rules."""
    if not hits:
        return "matches no Conv2d or Linear of the model"
    if not all(name in before for name in hits):
        return ""
    owners = sorted({f"{rule_text(before[name][0])} ({quoted(before[name][1])})" for name in hits})
    return f"matches only layers that earlier rules have: {listed(owners)}"


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
