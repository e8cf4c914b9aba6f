"""What the stages of a run share: its policy, model and plan, its folder, its progress bars and its warnings.

Not here: the stages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import process_count
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import VARIANTS, made
from pqcad_qat.sampling.trajectory import NoiseSchedule, noise_schedule
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.resuming import decides
from pqcad_qat.stages.run_folder import WARNINGS, RunFolder
from pqcad_qat.stages.stage_records import BaselinesRecord


@dataclass
class Work:
    """One run: its policy, its folder, and what stages hand on."""

    policy: Policy
    prepared: Prepared
    folder: RunFolder
    console: Console
    shares_training: bool = False

    def __post_init__(self) -> None:
        self.schedule = noise_schedule(self.prepared.model.scheduler_config)
        self.student_schedule = self.schedule.student(self.policy.sampler.steps, self.policy.distillation.student_steps)
        self.shape = self.prepared.model.sample_shape
        told = self.path / WARNINGS
        self.warnings: list[str] = json.loads(told.read_text(encoding="utf-8")) if told.exists() else []
        self.made = made(self.policy.evaluation.variants)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def runnable(self) -> tuple[str, ...]:
        """The variants less the baselines that have died."""
        baselines = self.folder.read("baselines", BaselinesRecord)
        died = {} if baselines is None else baselines.died
        return tuple(name for name in self.made if name not in died)

    @property
    def whole_batch(self) -> int:
        """States that one step of the optimizer learns from: every process adds its batches."""
        training = self.policy.training
        return training.batch_size * training.gradient_accumulation * process_count()

    def steps(self, name: str) -> int:
        return self.policy.distillation.student_steps if VARIANTS[name].student_steps else self.policy.sampler.steps

    def sampled_by(self, name: str) -> NoiseSchedule:
        """The schedule of a variant; full precision in half the steps makes those of the student."""
        return self.student_schedule if VARIANTS[name].student_steps else self.schedule

    def decides(self, stage: str) -> dict[str, Any]:
        """All that decides a stage to the last bit."""
        return decides(self.folder.recipes, stage)

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

    def warn(self, message: str) -> None:
        """Tell it once, also where a process that was killed has told it before."""
        if message in self.warnings:
            return
        self.warnings.append(message)
        write_file(self.path / WARNINGS, json.dumps(self.warnings, indent=1))
        self.console.print(Text.assemble(("warning:", "yellow"), f" {message}"))

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; the yielded function advances it."""
        bar = progress_bar(self.console)
        with bar:
            task = bar.add_task(name, total=total, note="")
            yield lambda count: bar.update(task, advance=count)
