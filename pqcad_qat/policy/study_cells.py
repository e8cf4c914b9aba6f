"""Expansion of a study's file into cells, each with a whole Policy, and all faults of the study and its cells at once.

Not here: the definition of a study (policy/study.py), or running it (commands/sweep.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from pqcad_qat.errors import PolicyError, shortened
from pqcad_qat.policy.faults import find_faults
from pqcad_qat.policy.loading import (
    Override,
    overridden,
    override,
    raise_all,
    read_override,
    read_tree,
    refuse_other_kind,
)
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.study import StudyPolicy
from pqcad_qat.policy.tree import Tree, assign, key_steps

CELLS = 1_000
"""Largest number of cells of a study, all seeds included."""

VALUES = 2_000_000
"""Largest number of values in the policies of all cells, not counting seeds."""

ENOUGH = 100
"""Number of faults after which the remaining cells are not checked."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: name of its folder.
        labels: `policy` with the policy's name, then each axis with its level.
        policy: the policy that it runs, whose name is the same for all seeds.
    """

    name: str
    labels: Mapping[str, str]
    policy: Policy


@dataclass(frozen=True)
class Study:
    """A study's name and its cells, with policies as the outermost loop and seeds as the innermost."""

    name: str
    cells: tuple[Cell, ...]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Load a study from a file; ``key=value`` overrides set its own keys (seeds=[0]) or those of every cell.

    Raises:
        PolicyError: the study or a cell has faults; the message lists them, one per line.
    """
    faults: list[str] = []
    tree = read_tree(path, (), faults)
    own = [
        text
        for text in overrides
        if key_steps(text.partition("=")[0])[:1] in [[key] for key in StudyPolicy.model_fields]
    ]
    for text in own:
        tree = override(tree, text, faults)
    if isinstance(tree.children, dict):
        refuse_other_kind(tree, "study")
    faults += find_faults(StudyPolicy, tree)
    of_cells = [read_override(text, faults) for text in overrides if text not in own]
    combinations: list[tuple[dict[str, str], Tree]] = []
    values = 0
    for labels, cell in _combinations(tree, of_cells, faults):
        values += cell.size
        if values > VALUES:
            faults.append(
                f"{tree.origin}: policies: got more than {VALUES:,} values in all cells; allowed up to so many"
            )
        if len(faults) >= ENOUGH or values > VALUES:
            break
        faults += find_faults(Policy, cell)
        combinations.append((labels, cell))
    if not faults:
        study = StudyPolicy.model_validate(tree.plain())
        cells = [cell for labels, unseeded in combinations for cell in _seeded(labels, unseeded, study.seeds)]
        faults += _clashes(cells, tree)
    raise_all(faults)
    return Study(study.name, tuple(cells))


def _combinations(
    study: Tree, overrides: Sequence[Override | None], faults: list[str]
) -> Iterator[tuple[dict[str, str], Tree]]:
    """Yield (labels, tree) for every policy at every combination of levels, as far as the file is valid."""
    axes = {axis: _mapping(levels) for axis, levels in _mapping(study.child("axes")).items() if _mapping(levels)}
    policies, seeds = (_listed(study.child(key)) for key in ("policies", "seeds"))
    if (cells := prod((len(policies), len(seeds) or 1, *map(len, axes.values())))) > CELLS:
        faults.append(f"{study.origin}: axes: got {cells:,} cells; allowed up to {CELLS:,}")
        return
    for base in _policies(policies, faults):
        for levels in product(*(levels.items() for levels in axes.values())):
            # Later overrides win: first those of the study's `set`, then the levels', then the command line's.
            labels = {
                "policy": str(base.plain().get("name", "")),
                **dict(zip(axes, (name for name, _ in levels), strict=True)),
            }
            tree = base
            for overlay in (study.child("set"), *(overlay for _, overlay in levels)):
                tree = _over(tree, _mapping(overlay), faults)
            for parsed in overrides:
                tree = overridden(tree, parsed, faults)
            yield labels, assign(tree, ["name"], Tree("-".join(labels.values()), study.origin))


def _policies(listed: Sequence[Tree], faults: list[str]) -> Iterator[Tree]:
    for index, entry in enumerate(listed):
        if not isinstance(entry.value, str):
            continue  # the study's own check reports this
        if not os.path.isfile(entry.value):
            got = shortened(entry.value, 300)
            faults.append(f"{entry.origin}: policies[{index}]: got {got}; allowed a policy file, relative to this one")
            continue
        try:
            policy = read_tree(Path(entry.value), (), faults)
            refuse_other_kind(policy, "quantize")
        except PolicyError as error:
            faults.append(str(error))
            continue
        if isinstance(policy.children, dict):
            yield policy


def _over(tree: Tree, overlay: Mapping[str, Tree], faults: list[str]) -> Tree:
    for key, value in overlay.items():
        try:
            tree = assign(tree, key_steps(key), value)
        except PolicyError as error:
            faults.append(f"{value.origin}: {shortened(key)}: {str(error).partition(': ')[2]}")
    return tree


def _listed(tree: Tree | None) -> list[Tree]:
    return tree.children if tree is not None and isinstance(tree.children, list) else []


def _mapping(tree: Tree | None) -> dict[str, Tree]:
    return tree.children if tree is not None and isinstance(tree.children, dict) else {}


def _seeded(labels: Mapping[str, str], tree: Tree, seeds: Sequence[int]) -> Iterator[Cell]:
    for seed in seeds:
        seeded = assign(tree, ["training", "seed"], Tree(seed, tree.origin))
        policy = Policy.model_validate(seeded.plain()).written(seeded.origins())
        yield Cell(f"{policy.name}-seed{seed}", labels, policy)


def _clashes(cells: Sequence[Cell], tree: Tree) -> Iterator[str]:
    """Yield faults for cells that share a folder, and for cells of one model whose distances cannot be compared."""
    origin = (tree.child("policies") or tree).origin
    names = [cell.name for cell in cells]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"{origin}: policies: got the cell {name} twice; allowed policies and levels whose names differ"
    for model, key in product(
        dict.fromkeys(cell.policy.model.source for cell in cells), ("images", "features", "reference", "seed")
    ):
        policies = [cell.policy for cell in cells if cell.policy.model.source == model]
        values = {str(policy.features if key == "features" else getattr(policy.evaluation, key)) for policy in policies}
        if len(values) > 1:
            got = f"{', '.join(sorted(values))} in different cells of {model}"
            yield f"{origin}: evaluation.{key}: got {got}; allowed one, for Frechet distances to be compared"
