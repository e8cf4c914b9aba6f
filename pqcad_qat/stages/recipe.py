"""Recipes, which list what determines a stage's results, and the comparison that decides which stages a changed policy
repeats.

Not here: what determines each stage (stages/stage_dependencies.py), and the folder (run_folder.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pqcad_qat.machine.content_store import content_digest


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the results of a stage.

    Attributes:
        values: name -> JSON value, for keys of the policy and other inputs that have a name.
        after: names of the stages that it reads; whatever determines them determines this stage too.
        circumstances: settings that may change only the last bits, or only how training continues after a divergence. A
            finished stage stays valid when they change; runs side by side share it only if they are equal.
        trained: paths in the folder of what the stage has trained: never deleted, but for the checkpoints of a stage
            that is done.
    """

    values: Mapping[str, Any]
    after: tuple[str, ...] = ()
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ()


Recipes = Mapping[str, Recipe]
"""Mapping from stage to recipe, in the order in which stages run."""


def record_of(recipes: Recipes, stage: str) -> dict[str, Any]:
    """Return a stage's recipe as JSON, with digests of the recipes of the stages that it reads.

    The run's folder keeps this record beside the stage's results.
    """
    recipe = recipes[stage]
    after = {name: content_digest(_compared(record_of(recipes, name))) for name in recipe.after}
    record: dict[str, Any] = json.loads(
        json.dumps({"values": recipe.values, "after": after, "circumstances": recipe.circumstances})
    )
    return record


def decides(recipes: Recipes, stage: str) -> dict[str, Any]:
    """Return everything that determines a stage's results to the last bit, including the recipes of the stages that it
    reads.

    This value names the results that runs share.
    """
    recipe = recipes[stage]
    after = {name: content_digest(decides(recipes, name)) for name in recipe.after}
    return {"stage": stage, **recipe.values, **recipe.circumstances, "after": after}


def reason_to_repeat(there: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return why a stage begun under the record `there` must be repeated under the record `now`; None if its results
    are valid under both.
    """
    # A stage is repeated if one of its own values differs, or if a stage that it reads now has another recipe.
    # Circumstances are not compared.
    was, values = there["values"], now["values"]
    keys = [key for key in {**was, **values} if was.get(key) != values.get(key)]
    changes = [f"{key} {_short(was.get(key))} -> {_short(values.get(key))}" for key in keys]
    behind = [name for name, digest in now["after"].items() if there["after"].get(name) != digest]
    # If all of that agrees, the only difference left is a stage that was read before and is not read now.
    if changes or behind or there["after"] == now["after"]:
        return ", ".join(changes) or (f"after {', '.join(behind)}" if behind else None)
    return "it reads fewer stages"


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("values", "after")}


def _short(value: object) -> str:
    """Text of a value for one line of the terminal; a long value is replaced by its digest, which shows only that it
    differs.
    """
    text = json.dumps(value)
    return text if len(text) <= 40 else f"[{content_digest({'': value})[:8]}]"
