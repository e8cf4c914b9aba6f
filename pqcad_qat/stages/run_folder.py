"""The folder of a run: its policy, which stages are done and by which recipe, what is done again on resuming, and one
run at a time.

Not here: what the stages do (stages/). Of the processes that share a run the first writes; the others wait for it, and
read.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.text import Text

from pqcad_qat.errors import CheckpointError, InterruptedByUserError
from pqcad_qat.machine.files import room_for, write_file
from pqcad_qat.machine.processes import agreed, is_first, process_count
from pqcad_qat.policy.loading import difference, dump_policy, load_policy, load_pretrain_policy
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.stages.resuming import Recipes, decides, reason_to_repeat, record_of

EMBEDDINGS = "conditions.safetensors"
"""What a run's prompts or embeddings are, in its own folder."""

POLICY, LAUNCH = "policy.yaml", "launch.json"
"""What decides a run beside its command: the policy as resolved, and the number of processes."""

WARNINGS = "warnings.json"
"""What was told while the run trained, kept for the report of the process that ends it."""

SUPERSEDED = "superseded"
"""Folder of what was trained under a policy that the run has left."""

DRAFT = re.compile(r"\.(step_\d+|[\w-]+\.(yaml|json|html|png|safetensors))\.\d+|\.(openvino|packed|inputs)-\w+")
"""Names under which something is written before it is moved into place."""

_DAMAGED = "{}: damaged: {}; delete it and --resume does this stage again"


@dataclass(frozen=True)
class StageRecord:
    """What a stage notes when it is done: nothing, unless it has a record of its own (stage_records.py)."""


NOTHING = StageRecord()
Record = TypeVar("Record", bound=StageRecord)


@dataclass
class Stage:
    """A stage at work. `new` is False where an earlier run has done it: then its results are read back."""

    new: bool
    record: StageRecord | None = None

    def done(self, record: StageRecord = NOTHING) -> None:
        """Note what the stage came to; without this call it counts as not done."""
        self.record = record


@dataclass(frozen=True)
class RunFolder:
    """An open run.

    Before a stage writes anything `recipes/NAME.json` says what decides it, and after everything else its marker
    `stages/NAME.json` what it came to.

    Attributes:
        recipes: of the stages of the run's policy, in order.
    """

    path: Path
    recipes: Recipes = field(default_factory=dict)

    def finished(self, stage: str) -> bool:
        """Whether a stage is done."""
        marker = self._marker(stage)
        return marker.exists() and "seconds" in _read_marker(marker)

    def read(self, stage: str, kind: type[Record]) -> Record | None:
        """What a finished stage noted, or None where it is still to do."""
        marker = self._marker(stage)
        if not marker.exists():
            return None
        try:
            return TypeAdapter(kind).validate_python(_read_marker(marker), by_alias=True, by_name=True)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise CheckpointError(_DAMAGED.format(marker, f"{where}: {fault['msg']}")) from error

    def finish(self, stage: str, seconds: float, record: StageRecord) -> None:
        noted = {"seconds": seconds, **asdict(record)}
        write_file(self._marker(stage), json.dumps(noted, indent=1, allow_nan=False))

    def seconds(self) -> dict[str, float]:
        """Wall time of every finished stage of the policy, in the order in which they ended."""
        markers = sorted((self.path / "stages").glob("*.json"), key=lambda marker: marker.stat().st_mtime_ns)
        listed = [marker for marker in markers if not self.recipes or marker.stem in self.recipes]
        return {marker.stem: _read_marker(marker)["seconds"] for marker in listed}

    def parts(self, stage: str) -> Path:
        """Where a stage lays what is to outlive a killed process, until it is done."""
        return self.path / ".parts" / stage

    def drop_parts(self, stage: str) -> None:
        shutil.rmtree(self.parts(stage), ignore_errors=True)
        with suppress(OSError):  # others lie there
            self.parts(stage).parent.rmdir()

    @contextmanager
    def stage(self, name: str, together: bool = False) -> Iterator[Stage]:
        """A stage's work goes inside the block; its marker is written at the end, once `done` has been called.

        Of several processes the first does the work, and to the others, which wait, the stage is an old one; `together`
        all do it.

        Raises:
            InterruptedByUserError: Ctrl-C inside the block.
            DiskError: a full disk inside the block.
        """
        works = together or is_first()
        if not works:
            with agreed():
                pass  # the first is done
        with agreed() as first:
            stage = Stage(new=works and not self.finished(name))
            start = time.perf_counter()
            with self._endings_told(name):
                if first and stage.new and name in self.recipes:
                    write_file(self._record(name), json.dumps(record_of(self.recipes, name), indent=1))
                yield stage
                if first and stage.new and stage.record is not None:
                    self.finish(name, time.perf_counter() - start, stage.record)
                    self.drop_parts(name)
        if works and not together:
            with agreed():
                pass  # the others have read

    @contextmanager
    def _endings_told(self, name: str) -> Iterator[None]:
        try:
            with room_for(self.path):
                yield
        except KeyboardInterrupt:
            if not is_first():
                raise
            raise InterruptedByUserError(f"interrupted in {name}: what was finished before it is kept") from None

    def begun(self, stage: str) -> dict[str, Any] | None:
        """The record of the recipe by which a stage was begun, or None where it was not."""
        record = self._record(stage)
        return _read_marker(record) if record.exists() else None

    def outdated(self) -> dict[str, str]:
        """Stages that were begun by another recipe than that of the run's policy, each with the reason to do it
        again.
        """
        found = {}
        for stage in self.recipes:
            there = self.begun(stage)
            if there is not None and (reason := reason_to_repeat(there, record_of(self.recipes, stage))) is not None:
                found[stage] = reason
        return found

    def unrecorded(self) -> list[str]:
        """Stages that a version has begun which did not record recipes."""
        left = {
            stage: [self._marker(stage), *(self.path / name for name in recipe.trained)]
            for stage, recipe in self.recipes.items()
        }
        return [
            stage
            for stage, paths in left.items()
            if any(path.exists() for path in paths) and not self._record(stage).exists()
        ]

    def adopt(self, stages: Sequence[str]) -> None:
        """Take stages as those of the run's policy."""
        for stage in stages:
            write_file(self._record(stage), json.dumps(record_of(self.recipes, stage), indent=1))

    def set_aside(self, stage: str) -> Path | None:
        """Make a stage one that is still to do: what it trained is moved to the folder that is returned, the rest stays
        until replaced.

        The record goes last: whoever is killed on the way sets the stage aside once more.
        """
        marker, record, trained = self._marker(stage), self._record(stage), self.recipes[stage].trained
        there = [self.path / name for name in trained if (self.path / name).exists()]
        if not there:
            marker.unlink(missing_ok=True)
            self.drop_parts(stage)
            record.unlink()
            return None
        numbers = (self.path / SUPERSEDED / f"{stage}-{number}" for number in range(1, 1_000_000))
        to = next(folder for folder in numbers if not folder.exists())
        for path in [marker, *there, record]:
            if path.exists():
                (to / path.relative_to(self.path)).parent.mkdir(parents=True, exist_ok=True)
                path.rename(to / path.relative_to(self.path))
        return to

    def decides(self, stage: str) -> dict[str, Any]:
        """All that decides a stage to the last bit."""
        return decides(self.recipes, stage)

    def link(self, name: str, folder: Path) -> None:
        """`name` in the run's folder leads to a folder that runs side by side share, and still does when all of them
        move.
        """
        link = self.path / name
        to = os.path.relpath(folder, link.parent)
        if not link.is_symlink() or os.readlink(link) != to:
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(to)

    def warnings(self) -> list[str]:
        """What was told."""
        told = self.path / WARNINGS
        found: list[str] = json.loads(told.read_text(encoding="utf-8")) if told.exists() else []
        return found

    def warn(self, message: str, console: Console) -> None:
        """Tell it once, also where a process that was killed has told it before."""
        told = self.warnings()
        if message not in told:
            write_file(self.path / WARNINGS, json.dumps([*told, message], indent=1))
            console.print(Text.assemble(("warning:", "yellow"), f" {message}"))

    def _marker(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def _record(self, stage: str) -> Path:
        return self.path / "recipes" / f"{stage}.json"


def _read_marker(marker: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(_DAMAGED.format(marker, error)) from error
    return found


@contextmanager
def open_run(
    path: Path,
    policy: Policy | PretrainPolicy,
    resume: bool,
    recipes: Recipes | None = None,
    *,
    console: Console | None = None,
) -> Iterator[RunFolder]:
    """Open a new run folder, or with `resume` go on with one; another process on the same folder is refused.

    With `resume` and no run there yet, one is begun: so a run that was killed in its first second goes on like any
    other. Where the run was begun under another policy, the stages that this changes are done again and the others
    stay, which the console is told.

    Raises:
        CheckpointError: the folder holds a run and `resume` was not asked for, it holds something else, it cannot be
            written, or the run was begun by another number of processes, or under another policy by a version that
            recorded no recipes (every difference is named).
    """
    folder = RunFolder(path, recipes or {})
    with ExitStack() as stack:
        with agreed() as first:
            if first:
                before = _begin(path, policy, resume, process_count())
                stack.enter_context(_locked(path))
                _drop_drafts(folder)
                if before is not None:
                    _go_on(folder, before, policy, console or Console(quiet=True))
        yield folder


def _begin(path: Path, policy: Policy | PretrainPolicy, resume: bool, processes: int) -> Policy | PretrainPolicy | None:
    """The policy of the run that is there; or write what makes the folder one."""
    written, launch = path / POLICY, path / LAUNCH
    if written.exists():
        if not resume:
            raise CheckpointError(f"{path}: holds a run already; --resume goes on with it, --out DIR starts another")
        before = _policy_there(written, policy)
        _check_processes(launch, processes)
        return before
    # a killed draft
    if path.is_dir() and any(
        not entry.name.startswith((f".{POLICY}.", f".{LAUNCH}.", LAUNCH)) for entry in path.iterdir()
    ):
        raise CheckpointError(f"{path}: not empty and not a run (no {POLICY} in it); --out DIR names another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_file(launch, json.dumps({"processes": processes}))
        write_file(written, dump_policy(policy))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return None


def _go_on(
    folder: RunFolder, before: Policy | PretrainPolicy, policy: Policy | PretrainPolicy, console: Console
) -> None:
    """Compare the stages that are there with the policy's, tell which stay and which are done again, and make these
    ones to do.
    """
    changes = difference(before, policy)
    if unrecorded := folder.unrecorded():
        if _as_by_default(before) != _as_by_default(policy):
            raise CheckpointError(
                _changed(
                    folder.path / POLICY, changes, "begun by a version that did not record what its stages depend on"
                )
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
    """What stays, what is done again and why, and what was not begun."""
    stays = [stage for stage in folder.recipes if stage not in again and folder.begun(stage) is not None]
    kept = [stage if folder.finished(stage) else f"{stage} (begun)" for stage in stays]
    new = [stage for stage in folder.recipes if stage not in again and stage not in stays]
    lines = [
        f"{folder.path}: going on" + (", under another policy:" if changes else ""),
        *(f"  - {change}" for change in changes),
        f"  kept: {', '.join(kept) or 'nothing'}",
        *([f"  again: {', '.join(f'{stage} ({reason})' for stage, reason in again.items())}"] if again else []),
        *([f"  to do: {', '.join(new)}"] if new else []),
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _as_by_default(policy: Policy | PretrainPolicy) -> Policy | PretrainPolicy:
    """The policy with its features written out: an older version wrote none that followed from the model."""
    if not isinstance(policy, Policy):
        return policy
    return policy.model_copy(update={"evaluation": policy.evaluation.model_copy(update={"features": policy.features})})


def _drop_warnings(told: Path, stage: str) -> None:
    """Forget what was told of a stage that is done again."""
    if told.exists():
        messages: list[str] = json.loads(told.read_text(encoding="utf-8"))
        left = [
            message
            for message in messages
            if not message.startswith(f"{stage}: ") and f"checkpoints/{stage}/" not in message
        ]
        write_file(told, json.dumps(left, indent=1))


def _check_processes(launch: Path, processes: int) -> None:
    """Raise CheckpointError unless as many processes began the run: each adds training.batch_size states to a batch."""
    begun = _read_marker(launch)["processes"] if launch.exists() else 1
    if processes != begun:
        raise CheckpointError(
            f"{launch}: processes: got {processes}; allowed {begun}, with which the run was begun: each "
            "adds a batch to every step"
        )


def _drop_drafts(folder: RunFolder) -> None:
    """Remove the parts of stages that are done, and what a killed process was about to move into place.

    That is `.NAME.PID` of files and checkpoints, and `.NAME-RANDOM` of exports.
    """
    for stage in (stage for stage in folder.recipes if folder.finished(stage)):
        folder.drop_parts(stage)
    for draft in [entry for entry in folder.path.rglob(".*") if DRAFT.fullmatch(entry.name)]:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)


def check_policy(written: Path, policy: Policy | PretrainPolicy) -> None:
    """Raise CheckpointError with every difference unless the run's policy, as written, is this one."""
    if changes := difference(_policy_there(written, policy), policy):
        raise CheckpointError(_changed(written, changes, "it stands in one table with others"))


def _policy_there(written: Path, policy: Policy | PretrainPolicy) -> Policy | PretrainPolicy:
    """The policy of a run, which must be of the same kind."""
    return load_policy(written) if isinstance(policy, Policy) else load_pretrain_policy(written)


def _changed(written: Path, changes: Sequence[str], why: str) -> str:
    listed = "\n".join(f"  - {change}" for change in changes)
    return f"{written}: the policy has changed since this run began, so it cannot be resumed ({why}):\n{listed}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{path}: another process is running this run") from None
        yield
