"""A study's file becomes its cells, each a whole Policy; every fault of the study and of all its cells at once.

Not here: what a study may say (policy/study.py), and running it (study.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.faults import find_faults
from pqcad_qat.policy.loading import by_place, key_steps, override, read_tree, refuse_other_kind
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.study import StudyPolicy
from pqcad_qat.policy.tree import Tree, assign


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: of its folder.
        labels: `policy` and its name, then every axis and its level.
        policy: that it runs; its name is that of all seeds.
    """

    name: str
    labels: Mapping[str, str]
    policy: Policy


@dataclass(frozen=True)
class Study:
    """A study's name and its cells, policies outermost and seeds innermost."""

    name: str
    cells: tuple[Cell, ...]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study of a file; ``key=value`` overrides its own keys (seeds=[0]), or those of every cell.

    Raises:
        PolicyError: all faults, one a line.
    """
    faults: list[str] = []
    tree = read_tree(path, (), faults)
    own = [text for text in overrides if key_steps(text.partition("=")[0])[:1] in [[key] for key in StudyPolicy.model_fields]]
    for text in own:
        tree = override(tree, text, faults)
    if isinstance(tree.children, dict):
        refuse_other_kind(tree, "study")
    faults += find_faults(StudyPolicy, tree)
    combinations = list(_combinations(tree, path.parent, [text for text in overrides if text not in own], faults))
    for _, cell in combinations:
        faults += find_faults(Policy, cell)
    if not faults:
        study = StudyPolicy.model_validate(tree.plain())
        cells = [cell for labels, found in combinations for cell in _seeded(labels, found, study.seeds)]
        faults += _clashes(cells, tree)
    if faults:
        raise PolicyError("\n".join(sorted(dict.fromkeys(faults), key=by_place)))
    return Study(study.name, tuple(cells))


def _combinations(study: Tree, folder: Path, overrides: Sequence[str], faults: list[str]) -> Iterator[tuple[dict[str, str], Tree]]:
    """(labels, tree) of every policy at every combination of levels, as far as the file is in order."""
    axes = {axis: _mapping(levels) for axis, levels in _mapping(study.child("axes")).items() if _mapping(levels)}
    for base in _policies(study, folder, faults):
        for levels in product(*(levels.items() for levels in axes.values())):
            labels = {"policy": str(base.plain().get("name", "")), **dict(zip(axes, (name for name, _ in levels), strict=True))}
            tree = base
            for overlay in (study.child("set"), *(overlay for _, overlay in levels)):
                tree = _over(tree, _mapping(overlay), faults)
            for text in overrides:
                tree = override(tree, text, faults)
            yield labels, assign(tree, ["name"], Tree("-".join(labels.values()), study.origin))


def _policies(study: Tree, folder: Path, faults: list[str]) -> Iterator[Tree]:
    listed = study.child("policies")
    for index, entry in enumerate(listed.children if listed and isinstance(listed.children, list) else []):
        file = folder / str(entry.value)
        if not file.is_file():
            faults.append(f"{entry.origin}: policies[{index}]: got {entry.plain()}; allowed a policy file, relative to this one")
            continue
        try:
            found = read_tree(file, (), faults)
            refuse_other_kind(found, "quantize")
        except PolicyError as error:
            faults.append(str(error))
            continue
        if isinstance(found.children, dict):
            yield found


def _over(tree: Tree, overlay: Mapping[str, Tree], faults: list[str]) -> Tree:
    for key, value in overlay.items():
        try:
            tree = assign(tree, key_steps(key), value)
        except PolicyError as error:
            faults.append(f"{value.origin}: {key}: {str(error).partition(': ')[2]}")
    return tree


def _mapping(tree: Tree | None) -> dict[str, Tree]:
    return tree.children if tree is not None and isinstance(tree.children, dict) else {}


def _seeded(labels: Mapping[str, str], tree: Tree, seeds: Sequence[int]) -> Iterator[Cell]:
    for seed in seeds:
        seeded = assign(tree, ["training", "seed"], Tree(seed, tree.origin))
        policy = Policy.model_validate(seeded.plain()).written(seeded.origins())
        yield Cell(f"{policy.name}-seed{seed}", labels, policy)


def _clashes(cells: Sequence[Cell], tree: Tree) -> Iterator[str]:
    """Cells of one folder, and cells whose FIDs of one model could not stand in one table."""
    origin = (tree.child("policies") or tree).origin
    names = [cell.name for cell in cells]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"{origin}: policies: got the cell {name} twice; allowed policies and levels whose names differ"
    for model, key in product(dict.fromkeys(cell.policy.model.source for cell in cells), ("images", "features", "seed")):
        policies = [cell.policy for cell in cells if cell.policy.model.source == model]
        values = {str(policy.features if key == "features" else getattr(policy.evaluation, key)) for policy in policies}
        if len(values) > 1:
            got = f"{', '.join(sorted(values))} in different cells of {model}"
            yield f"{origin}: evaluation.{key}: got {got}; allowed one, for FIDs to be compared"
