"""The folder of a run: which policy and how many processes it belongs to, which stages are done, and one run at a time.

Not here: what the stages do (stages/). Of the processes that share a run the first writes; the others wait for it, and read.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqcad_qat.errors import CheckpointError
from pqcad_qat.policy.loading import difference, dump_policy, load_policy, load_pretrain_policy
from pqcad_qat.policy.pretraining import PretrainPolicy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.processes import agreed, is_first, process_count

EMBEDDINGS = "conditions.safetensors"
"""What a run's prompts or embeddings are, in its own folder."""

POLICY, LAUNCH = "policy.yaml", "launch.json"
"""What decides a run beside its command: the policy as resolved, and the number of processes."""

DRAFT = re.compile(r"\.(step_\d+|[\w-]+\.(yaml|json|html|png|safetensors))\.\d+|\.(openvino|packed)-\w+")
"""Names under which something is written before it is moved into place."""


@dataclass
class Stage:
    """A stage at work. `new` is False where an earlier run has done it: then its results are read back."""

    new: bool
    facts: dict[str, Any] | None = None

    def done(self, **facts: Any) -> None:
        """Note what the stage found (JSON values); without this call it counts as not done."""
        self.facts = facts


@dataclass(frozen=True)
class RunFolder:
    """An open run. Every stage that is done has a marker `stages/NAME.json`, written after everything else of the stage."""

    path: Path

    def finished(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage noted, or None where it is still to do."""
        marker = self._marker(stage)
        return _read_marker(marker) if marker.exists() else None

    def finish(self, stage: str, seconds: float, facts: dict[str, Any]) -> None:
        write_atomically(self._marker(stage), json.dumps({"seconds": seconds, **facts}, indent=1, allow_nan=False))

    def seconds(self) -> dict[str, float]:
        """Wall time of every finished stage, in the order in which they ended."""
        markers = sorted((self.path / "stages").glob("*.json"), key=lambda marker: marker.stat().st_mtime_ns)
        return {marker.stem: _read_marker(marker)["seconds"] for marker in markers}

    @contextmanager
    def stage(self, name: str, together: bool = False) -> Iterator[Stage]:
        """A stage's work goes inside the block; its marker is written at the end, once `done` has been called.

        Of several processes the first does the work, and to the others, which wait, the stage is an old one; `together` all do it.
        """
        works = together or is_first()
        if not works:
            with agreed():
                pass  # the first is done
        with agreed() as first:
            stage = Stage(new=works and self.finished(name) is None)
            start = time.perf_counter()
            yield stage
            if first and stage.new and stage.facts is not None:
                self.finish(name, time.perf_counter() - start, stage.facts)
        if works and not together:
            with agreed():
                pass  # the others have read

    def _marker(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"


def _read_marker(marker: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{marker}: damaged: {error}; delete it and --resume does this stage again") from error
    return found


@contextmanager
def open_run(path: Path, policy: Policy | PretrainPolicy, resume: bool) -> Iterator[RunFolder]:
    """Open a new run folder, or with `resume` go on with one; another process on the same folder is refused.

    With `resume` and no run there yet, one is begun: so a run that was killed in its first second goes on like any other.

    Raises:
        CheckpointError: the folder holds a run and `resume` was not asked for, it holds something else, it cannot be written, the run's
            policy is another one (every difference is named), or it was begun by another number of processes.
    """
    with ExitStack() as stack:
        with agreed() as first:
            if first:
                _begin(path, policy, resume, process_count())
                stack.enter_context(_locked(path))
                _drop_drafts(path)
        yield RunFolder(path)


def _begin(path: Path, policy: Policy | PretrainPolicy, resume: bool, processes: int) -> None:
    """Check the run that is there, or write what makes the folder one."""
    written, launch = path / POLICY, path / LAUNCH
    if written.exists():
        if not resume:
            raise CheckpointError(f"{path}: holds a run already; --resume goes on with it, --out DIR starts another")
        check_policy(written, policy)
        _check_processes(launch, processes)
        return
    if path.is_dir() and any(
        not entry.name.startswith((f".{POLICY}.", f".{LAUNCH}.", LAUNCH)) for entry in path.iterdir()
    ):  # a killed draft
        raise CheckpointError(f"{path}: not empty and not a run (no {POLICY} in it); --out DIR names another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(launch, json.dumps({"processes": processes}))
        write_atomically(written, dump_policy(policy))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error


def _check_processes(launch: Path, processes: int) -> None:
    """Raise CheckpointError unless as many processes began the run: each adds training.batch_size states to a batch."""
    begun = _read_marker(launch)["processes"] if launch.exists() else 1
    if processes != begun:
        raise CheckpointError(
            f"{launch}: processes: got {processes}; allowed {begun}, with which the run was begun: each adds a batch to every step"
        )


def _drop_drafts(path: Path) -> None:
    """Remove what a killed process was about to move into place: `.NAME.PID` of files and checkpoints, `.NAME-RANDOM` of exports."""
    for draft in [entry for entry in path.rglob(".*") if DRAFT.fullmatch(entry.name)]:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)


def check_policy(written: Path, policy: Policy | PretrainPolicy) -> None:
    """Raise CheckpointError with every difference unless the run's policy, as written, is this one."""
    before = load_policy(written) if isinstance(policy, Policy) else load_pretrain_policy(written)
    changes = difference(before, policy)
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise CheckpointError(f"{written}: the policy has changed since this run began, so it cannot be resumed:\n{listed}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{path}: another process is running this run") from None
        yield


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.rename(path)
