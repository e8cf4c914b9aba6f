"""The folder of a run: which stages are done, by which recipe, and the record of each.

Not here: how a folder is begun and resumed (open_run.py), and what the stages do. If several processes share a run, the
first one writes; the others wait for it, then read.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.text import Text

from pqcad_qat.errors import CheckpointError, InterruptedByUserError
from pqcad_qat.machine.files import room_for, write_file
from pqcad_qat.machine.processes import agreed, is_first
from pqcad_qat.stages.recipe import Recipes, decides, reason_to_repeat, record_of

EMBEDDINGS = "conditions.safetensors"
"""Name of the file in a run's folder that holds its encoded prompts or embeddings."""

WARNINGS = "warnings.json"
"""Name of the file of warnings shown during the run, kept for the report, which another process may write."""

SUPERSEDED = "superseded"
"""Name of the folder for what was trained under a policy that the run no longer has."""

CHECKPOINTS = "checkpoints"
"""Name of the folder in a run's that holds a folder for each stage that trains, until the stage is done."""

_DAMAGED = (
    "{}: got a damaged file: {}; allowed what the stage wrote: delete the file, and --resume does the stage again"
)


@dataclass(frozen=True)
class StageRecord:
    """Record that a stage writes when it is done; it is empty unless the stage has a class of its own
    (stage_records.py).
    """


NOTHING = StageRecord()
Record = TypeVar("Record", bound=StageRecord)


@dataclass
class Stage:
    """A stage while it runs.

    `new` is False if an earlier run has finished it; then its results are read back.
    """

    new: bool
    record: StageRecord | None = None

    def done(self, record: StageRecord = NOTHING) -> None:
        """Set the record of the stage; a stage that never calls this counts as not done."""
        self.record = record


@dataclass(frozen=True)
class RunFolder:
    """An open run.

    Before a stage writes anything, `recipes/NAME.json` records what determines it. After everything else, its marker
    `stages/NAME.json` stores its record.

    Attributes:
        path: folder of the run.
        recipes: stage -> recipe, for the stages of the run's policy in order.
    """

    path: Path
    recipes: Recipes = field(default_factory=dict)

    def finished(self, stage: str) -> bool:
        """Tell whether a stage is done."""
        marker = self._marker(stage)
        return marker.exists() and "seconds" in read_marker(marker)

    def read(self, stage: str, kind: type[Record]) -> Record | None:
        """Read the record of a finished stage; None if the stage is still to do."""
        marker = self._marker(stage)
        if not marker.exists():
            return None
        try:
            return TypeAdapter(kind).validate_python(read_marker(marker), by_alias=True, by_name=True)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise CheckpointError(_DAMAGED.format(marker, f"{where}: {fault['msg']}")) from error

    def read_always(self, stage: str, kind: type[Record]) -> Record:
        """Read the record of a stage that an earlier part of the run has finished, or that this run does not have.

        A run without the stage gets the record's defaults.
        """
        return self.read(stage, kind) or kind()

    def finish(self, stage: str, seconds: float, record: StageRecord) -> None:
        noted = {"seconds": seconds, **asdict(record)}
        write_file(self._marker(stage), json.dumps(noted, indent=1, allow_nan=False))

    def seconds(self) -> dict[str, float]:
        """Wall time in seconds of every finished stage of the policy, in the order in which they ended."""
        markers = sorted((self.path / "stages").glob("*.json"), key=lambda marker: marker.stat().st_mtime_ns)
        listed = [marker for marker in markers if not self.recipes or marker.stem in self.recipes]
        return {marker.stem: read_marker(marker)["seconds"] for marker in listed}

    def unfinished(self, stage: str) -> Path:
        """Folder of a stage's results so far: they survive a killed process, and are dropped once the stage is done."""
        return self.path / ".parts" / stage

    def drop_unfinished(self, stage: str) -> None:
        """Delete a stage's results so far, its checkpoints among them, which take many times the size of its model."""
        for folder in (self.unfinished(stage), self.path / CHECKPOINTS / stage):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # that of other stages is still there
                folder.parent.rmdir()

    @contextmanager
    def stage(self, name: str, together: bool = False) -> Iterator[Stage]:
        """Context of a stage's work: its marker is written at the end if `done` has been called.

        Of several processes the first one does the work. The others wait, then see the stage as done earlier. With
        `together`, all processes do the work.

        Raises:
            InterruptedByUserError: Ctrl-C inside the block.
            DiskError: the disk became full inside the block.
        """
        # `agreed` is a block that all processes leave together. Unless `together`, the others pass two such blocks: an
        # empty one while the first process works, then one in which they read its results, during which the first
        # process waits in an empty one.
        works = together or is_first()
        if not works:
            with agreed():
                pass  # wait until the first process is done
        with agreed() as first:
            stage = Stage(new=works and not self.finished(name))
            start = time.perf_counter()
            with self._endings_told(name):
                if first and stage.new and name in self.recipes:
                    write_file(self._record(name), json.dumps(record_of(self.recipes, name), indent=1))
                yield stage
                if first and stage.new and stage.record is not None:
                    self.finish(name, time.perf_counter() - start, stage.record)
                    self.drop_unfinished(name)
        if works and not together:
            with agreed():
                pass  # wait until the others have read the results

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
        """Recorded recipe by which a stage was begun; None if it was not begun."""
        record = self._record(stage)
        return read_marker(record) if record.exists() else None

    def outdated(self) -> dict[str, str]:
        """Stages that were begun by another recipe than the current policy's, each with the reason to repeat it."""
        reasons = {}
        for stage in self.recipes:
            there = self.begun(stage)
            if there is not None and (reason := reason_to_repeat(there, record_of(self.recipes, stage))) is not None:
                reasons[stage] = reason
        return reasons

    def unrecorded(self) -> list[str]:
        """Stages begun by a version of this package that did not record recipes."""
        traces = {
            stage: [self._marker(stage), *(self.path / name for name in recipe.trained)]
            for stage, recipe in self.recipes.items()
        }
        return [
            stage
            for stage, paths in traces.items()
            if any(path.exists() for path in paths) and not self._record(stage).exists()
        ]

    def adopt(self, stages: Sequence[str]) -> None:
        """Record that the given stages were made by the recipes of the current policy."""
        for stage in stages:
            write_file(self._record(stage), json.dumps(record_of(self.recipes, stage), indent=1))

    def set_aside(self, stage: str) -> Path | None:
        """Mark a stage as still to do; return the folder to which its training results were moved, or None if there
        were none.

        Other files of the stage stay until they are replaced. The recipe's record moves last: after an interruption the
        stage still counts as outdated, so it is set aside again.
        """
        marker, record = self._marker(stage), self._record(stage)
        there = [self.path / name for name in self.recipes[stage].trained if (self.path / name).exists()]
        if not there:
            marker.unlink(missing_ok=True)
            self.drop_unfinished(stage)
            record.unlink()
            return None
        # The marker moves first, so that an interrupted move never leaves a stage that counts as finished without its
        # files.
        places = (self.path / SUPERSEDED / f"{stage}-{index}" for index in range(1, 1_000_000))
        to = next(folder for folder in places if not folder.exists())
        for path in [marker, *there, record]:
            if path.exists():
                (to / path.relative_to(self.path)).parent.mkdir(parents=True, exist_ok=True)
                path.rename(to / path.relative_to(self.path))
        return to

    def forget(self, stage: str) -> None:
        """Mark a stage as one that this run has never begun; its files stay until they are replaced."""
        self._marker(stage).unlink(missing_ok=True)
        self._record(stage).unlink(missing_ok=True)

    def decides(self, stage: str) -> dict[str, Any]:
        """Everything that determines the results of a stage to the last bit."""
        return decides(self.recipes, stage)

    def link(self, name: str, folder: Path) -> None:
        """Link `name` in the run's folder to a folder that runs side by side share.

        The link is relative, so it remains valid if all of them are moved together.
        """
        link = self.path / name
        to = os.path.relpath(folder, link.parent)
        if not link.is_symlink() or os.readlink(link) != to:
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(to)

    def warnings(self) -> list[str]:
        """Warnings shown so far, also by earlier processes of the run."""
        file = self.path / WARNINGS
        messages: list[str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        return messages

    def warn(self, message: str, console: Console) -> None:
        """Show a warning and store it, unless this run has already shown it, possibly in an earlier process."""
        earlier = self.warnings()
        if message not in earlier:
            write_file(self.path / WARNINGS, json.dumps([*earlier, message], indent=1))
            console.print(Text.assemble(("warning:", "yellow"), f" {message}"))

    def _marker(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def _record(self, stage: str) -> Path:
        return self.path / "recipes" / f"{stage}.json"


def read_marker(marker: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(_DAMAGED.format(marker, error)) from error
    return content
