"""Starting a run's folder, or resuming it: its policy, which stages a changed policy repeats, and the lock that allows
one run at a time.

Not here: the folder itself (run_folder.py), and how recipes are compared (recipe.py).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout
from rich.console import Console

from pqcad_qat.errors import CheckpointError
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import agreed, process_count
from pqcad_qat.policy.loading import difference, dump_policy, load_policy, load_pretrain_policy
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.stages.recipe import Recipes
from pqcad_qat.stages.run_folder import CHECKPOINTS, WARNINGS, RunFolder, read_marker

POLICY, LAUNCH = "policy.yaml", "launch.json"
"""Files that hold what determines a run besides its command: the resolved policy, and the number of processes."""

DRAFT = re.compile(r"\.(step_\d+|[\w-]+\.(yaml|json|html|png|safetensors))\.\d+|\.(openvino|packed|inputs)-[\w-]+")
"""Pattern of temporary names, under which files and folders are written before they are moved into place."""


@contextmanager
def open_run(
    path: Path,
    policy: Policy | PretrainPolicy,
    resume: bool,
    recipes: Recipes | None = None,
    *,
    console: Console | None = None,
) -> Iterator[RunFolder]:
    """Open a new run folder, or resume one if `resume` is set; a second process on the same folder is refused.

    If `resume` is set and no run exists yet, one is begun, so a run that was killed in its first second resumes like
    any other. If the run was begun under another policy, the stages affected by the change are repeated and the others
    are kept; the console shows which.

    Raises:
        CheckpointError: the folder holds a run and `resume` is not set, holds something else, or cannot be written. It
            is also raised if the run was begun by another number of processes, or under another policy by a version
            that recorded no recipes (every difference is named).
    """
    folder = RunFolder(path, recipes or {})
    with ExitStack() as stack:
        with agreed() as first:
            if first:
                before = _begin(path, policy, resume, process_count())
                stack.enter_context(locked(path))
                _drop_drafts(folder)
                if before is not None:
                    _go_on(folder, before, policy, console or Console(quiet=True))
        yield folder


def holds_run(path: Path, resume: bool) -> bool:
    """Tell whether the folder holds a run to resume.

    Raises:
        CheckpointError: it holds one and `resume` is not set, or it holds something else.
    """
    if (path / POLICY).exists():
        if not resume:
            raise CheckpointError(
                f"{path}: got a folder that holds a run already; allowed --resume, which goes on with it, "
                "or --out DIR, which starts another"
            )
        return True
    drafts = (f".{POLICY}.", f".{LAUNCH}.", LAUNCH)  # left by a run that was killed in its first second
    if path.is_dir() and any(not entry.name.startswith(drafts) for entry in path.iterdir()):
        raise CheckpointError(
            f"{path}: got a folder that is not empty and not a run, for it holds no {POLICY}; allowed a run, or a new "
            "folder: --out DIR names another"
        )
    return False


def _begin(path: Path, policy: Policy | PretrainPolicy, resume: bool, processes: int) -> Policy | PretrainPolicy | None:
    """Return the policy of an existing run; otherwise write the files that make the folder a run, and return None."""
    written, launch = path / POLICY, path / LAUNCH
    if holds_run(path, resume):
        before = _policy_there(written, policy)
        _check_processes(launch, processes)
        return before
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_file(launch, json.dumps({"processes": processes}))
        write_file(written, dump_policy(policy))
    except OSError as error:
        raise CheckpointError(
            f"{path}: got a folder that cannot be written: {error.strerror}; allowed another: --out DIR names it"
        ) from error
    return None


def _go_on(
    folder: RunFolder, before: Policy | PretrainPolicy, policy: Policy | PretrainPolicy, console: Console
) -> None:
    """Compare the existing stages with the policy, print which are kept and which are repeated, and mark the latter as
    to do.
    """
    changes = difference(before, policy)
    # Stages of an older version have no recipes to compare. They are adopted if the whole policy is unchanged, and
    # refused otherwise.
    if unrecorded := folder.unrecorded():
        if _as_by_default(before) != _as_by_default(policy):
            _refuse_changes(
                folder.path / POLICY, changes, "begun by a version that did not record what its stages depend on"
            )
        folder.adopt(unrecorded)
    again = folder.outdated()
    _tell(folder, changes, again, console)
    for stage in again:
        _drop_warnings(folder.path / WARNINGS, stage)
        if (to := folder.set_aside(stage)) is not None:
            console.print(
                f"  {stage}: what was trained is in {to}, and may be deleted",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    if changes:
        write_file(folder.path / POLICY, dump_policy(policy))


def _tell(folder: RunFolder, changes: Sequence[str], again: Mapping[str, str], console: Console) -> None:
    """Print which stages are kept, which are repeated and why, and which have not begun."""
    stays = [stage for stage in folder.recipes if stage not in again and folder.begun(stage) is not None]
    results_kept = [stage if folder.finished(stage) else f"{stage} (begun)" for stage in stays]
    new = [stage for stage in folder.recipes if stage not in again and stage not in stays]
    lines = [
        f"{folder.path}: going on" + (", under another policy:" if changes else ""),
        *(f"  - {change}" for change in changes),
        f"  kept: {', '.join(results_kept) or 'nothing'}",
        *([f"  again: {', '.join(f'{stage} ({reason})' for stage, reason in again.items())}"] if again else []),
        *([f"  to do: {', '.join(new)}"] if new else []),
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _as_by_default(policy: Policy | PretrainPolicy) -> Policy | PretrainPolicy:
    """Return the policy with its feature network, its variants and what it deploys written out; other versions leave
    out what follows from other keys, or do not.
    """
    if not isinstance(policy, Policy):
        return policy
    evaluation = policy.evaluation.model_copy(update={"features": policy.features, "variants": policy.variants})
    return policy.model_copy(update={"evaluation": evaluation, "deploy": policy.deployed or None})


def _drop_warnings(file: Path, stage: str) -> None:
    """Remove the stored warnings of a stage that is repeated."""
    if file.exists():
        messages: list[str] = json.loads(file.read_text(encoding="utf-8"))
        remaining = [
            message
            for message in messages
            if not message.startswith(f"{stage}: ") and f"{CHECKPOINTS}/{stage}/" not in message
        ]
        write_file(file, json.dumps(remaining, indent=1))


def _check_processes(launch: Path, processes: int) -> None:
    """Raise CheckpointError unless the run was begun by the same number of processes.

    Every process adds `training.batch_size` states to a batch, so their number changes the training.
    """
    begun = read_marker(launch)["processes"] if launch.exists() else 1
    if processes != begun:
        raise CheckpointError(
            f"{launch}: processes: got {processes}; allowed {begun}, with which the run was begun: each "
            "adds a batch to every step"
        )


def _drop_drafts(folder: RunFolder) -> None:
    """Remove unfinished work of finished stages, and everything that a killed process had not yet moved into place.

    Files and checkpoints in progress are named `.NAME.PID`, exports in progress `.NAME-RANDOM`.
    """
    for stage in (stage for stage in folder.recipes if folder.finished(stage)):
        folder.drop_unfinished(stage)
    for draft in [entry for entry in folder.path.rglob(".*") if DRAFT.fullmatch(entry.name)]:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)


def check_policy(written: Path, policy: Policy | PretrainPolicy) -> None:
    """Raise CheckpointError that lists every difference unless the run's stored policy equals this one."""
    if changes := difference(_as_by_default(_policy_there(written, policy)), _as_by_default(policy)):
        _refuse_changes(written, changes, "it stands in one table with others")


def _policy_there(written: Path, policy: Policy | PretrainPolicy) -> Policy | PretrainPolicy:
    """Load the stored policy of a run, which must be of the same kind."""
    return load_policy(written) if isinstance(policy, Policy) else load_pretrain_policy(written)


def _refuse_changes(written: Path, changes: Sequence[str], why: str) -> NoReturn:
    listed = "\n".join(f"  - {change}" for change in changes)
    raise CheckpointError(
        f"{written}: got a policy that has changed since this run began, so it cannot be resumed ({why}); "
        f"allowed the same policy, without these changes:\n{listed}"
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run's folder.

    Raises:
        CheckpointError: another process holds it.
    """
    try:
        held = FileLock(path / ".lock").acquire(blocking=False)
    except Timeout:
        raise CheckpointError(
            f"{path}: got a run that another process is running; allowed one process at a time"
        ) from None
    with held:
        yield
