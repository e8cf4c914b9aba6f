"""The folder of a run: which stages are done, by which recipe, and what each noted.

Not here: how a folder is begun and gone on with (open_run.py), and what the stages do. Of the processes that share a
run the first writes; the others wait for it, and read.
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
from pqcad_qat.stages.resuming import Recipes, decides, reason_to_repeat, record_of

EMBEDDINGS = "conditions.safetensors"
"""What a run's prompts or embeddings are, in its own folder."""

WARNINGS = "warnings.json"
"""What was told while the run trained, kept for the report of the process that ends it."""

SUPERSEDED = "superseded"
"""Folder of what was trained under a policy that the run has left."""

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
        return marker.exists() and "seconds" in read_marker(marker)

    def read(self, stage: str, kind: type[Record]) -> Record | None:
        """What a finished stage noted, or None where it is still to do."""
        marker = self._marker(stage)
        if not marker.exists():
            return None
        try:
            return TypeAdapter(kind).validate_python(read_marker(marker), by_alias=True, by_name=True)
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
        return {marker.stem: read_marker(marker)["seconds"] for marker in listed}

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
        return read_marker(record) if record.exists() else None

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


def read_marker(marker: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(_DAMAGED.format(marker, error)) from error
    return found
