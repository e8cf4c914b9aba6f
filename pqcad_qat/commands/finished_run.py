"""The opening of a run of which stages are finished, for the commands that make something of what its folder holds.

Not here: `run` itself, which does the stages (run.py), and folders of other kinds (open_folder.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pqcad_qat.errors import CheckpointError, ModelError
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.origins import located
from pqcad_qat.policy.schema import Policy
from pqcad_qat.stages.open_run import POLICY, locked
from pqcad_qat.stages.prepared import SHARED, Prepared, prepare, with_own_model
from pqcad_qat.stages.recipe import Recipes
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_dependencies import recipes


@contextmanager
def finished_run(
    path: Path, needed: Callable[[Policy, Recipes], Collection[str]], own: OwnModel | None = None
) -> Iterator[tuple[Policy, Prepared, RunFolder]]:
    """Open a run whose `needed` stages are finished: its policy, its model with the plan of the policy's rules, and its
    folder, locked.

    Raises:
        ModelError: the folder holds no run, or its model cannot be loaded.
        CheckpointError: a needed stage is still to do or would be repeated, or another process works in the folder.
    """
    if not (path / POLICY).is_file():
        raise ModelError(f"{path}: got a folder without {POLICY}; allowed the folder of a run")
    policy = with_own_model(load_policy(path / POLICY), own)
    with located(policy):
        prepared = prepare(policy, path.parent / SHARED, own)
        table = recipes(policy, prepared)
    folder = RunFolder(path, table)
    outdated = folder.outdated()
    if to_do := [stage for stage in needed(policy, table) if not folder.finished(stage) or stage in outdated]:
        raise CheckpointError(
            f"{path}: got a run whose stages {', '.join(to_do)} are to do; allowed one that has finished them: "
            f"`run {path / POLICY} --out {path} --resume` goes on with it"
        )
    with located(policy), locked(path):
        yield policy, prepared, folder
