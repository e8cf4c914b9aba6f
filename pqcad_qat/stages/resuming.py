"""What decides a stage's results, and what follows where a run goes on under another policy: which stages stay, which
are done again.

Not here: what decides which stage (stages/recipes.py), and the folder (run_folder.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pqcad_qat.machine.content_store import content_digest


@dataclass(frozen=True)
class Recipe:
    """All that decides what a stage leaves.

    Attributes:
        values: keys of the policy, and what else has a name, to JSON values.
        after: the stages that it reads; what decides them decides this one.
        circumstances: what may move its last bits, or decides only what it does after a divergence. A stage that is
            there stays when these change; runs side by side share it only where they are equal.
        trained: paths in the run's folder of what it has trained, which is never thrown away.
    """

    values: Mapping[str, Any]
    after: tuple[str, ...] = ()
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ()


Recipes = Mapping[str, Recipe]
"""Stage -> recipe, in the order in which stages run."""


def record_of(recipes: Recipes, stage: str) -> dict[str, Any]:
    """A stage's recipe as JSON, with digests of those of the stages that it reads: what the run's folder keeps beside
    its results.
    """
    recipe = recipes[stage]
    after = {name: content_digest(_compared(record_of(recipes, name))) for name in recipe.after}
    found: dict[str, Any] = json.loads(
        json.dumps({"values": recipe.values, "after": after, "circumstances": recipe.circumstances})
    )
    return found


def decides(recipes: Recipes, stage: str) -> dict[str, Any]:
    """All that decides a stage's results to the last bit, those of the stages that it reads included: the name of what
    runs share.
    """
    recipe = recipes[stage]
    after = {name: content_digest(decides(recipes, name)) for name in recipe.after}
    return {"stage": stage, **recipe.values, **recipe.circumstances, "after": after}


def reason_to_repeat(there: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a stage that was begun under one record is done again under another; None where its results are those of
    both.
    """
    was, values = there["values"], now["values"]
    keys = [key for key in {**was, **values} if was.get(key) != values.get(key)]
    told = [f"{key} {_short(was.get(key))} -> {_short(values.get(key))}" for key in keys]
    behind = [name for name, digest in now["after"].items() if there["after"].get(name) != digest]
    if told or behind or there["after"] == now["after"]:
        return ", ".join(told) or (f"after {', '.join(behind)}" if behind else None)
    return "it reads fewer stages"


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("values", "after")}


def _short(value: object) -> str:
    """A value in a line of the terminal; of long ones only that they differ is told, by their digest."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"[{content_digest({'': value})[:8]}]"
