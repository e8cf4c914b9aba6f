"""Preview of a run as data: which stages are kept, and what the others cost.

Not here: how it is computed (commands/run.py), or how it looks (tables.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torch import nn

from pqcad_qat.quantization.plan import LayerPlan

KEPT, AGAIN, GOES_ON, TO_DO = "kept", "again", "goes on", "to do"
"""States of a stage in a preview."""


@dataclass(frozen=True)
class StageBytes:
    """Estimate of the bytes that a stage occupies on disk.

    Attributes:
        working: largest number while it works.
        left: number when it is done; None for as many.
    """

    working: int
    left: int | None = None

    @property
    def kept(self) -> int:
        """Number when it is done."""
        return self.working if self.left is None else self.left


def bytes_wanted(stages: Sequence[StageBytes]) -> int:
    """Largest number of bytes that stages occupy together while they work one after the other."""
    before = accumulate((stage.kept for stage in stages), initial=0)
    return max((there + stage.working for there, stage in zip(before, stages, strict=False)), default=0)


@dataclass(frozen=True)
class StageSeconds:
    """Wall time of a stage, in seconds.

    Attributes:
        expected: what it takes as a rule.
        most: what it may take at most; it is more where the stage finds its number of training steps by itself.
    """

    expected: float = 0.0
    most: float = 0.0


def time_ahead(stages: Iterable[StageSeconds]) -> str:
    """Sentence on the time that stages are expected to take."""
    times = list(stages)
    expected, most = about(sum(time.expected for time in times)), about(sum(time.most for time in times))
    at_most = f", and {most} at most: training ends by itself" if most != expected else ""
    return f"the stages to do take about {expected} on this machine{at_most}"


def about(seconds: float) -> str:
    """A time in a few words, as precise as an estimate is."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "a minute"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


@dataclass(frozen=True)
class StagePreview:
    """One stage of a preview.

    Attributes:
        name: name of the stage.
        state: one of KEPT, AGAIN, GOES_ON and TO_DO.
        reason: reason why the stage is repeated; empty otherwise.
        training_steps: number of training steps; None for a stage that does not train.
        size: bytes that it occupies on disk.
        automatic: whether the stage finds its number of steps by itself, up to `training_steps`.
        seconds: wall time that it takes; 0 for one that is kept.
    """

    name: str
    state: str
    reason: str
    training_steps: int | None
    size: StageBytes
    automatic: bool = False
    seconds: StageSeconds = StageSeconds()


@dataclass(frozen=True)
class RunPreview:
    """Preview of a run that has not started.

    Attributes:
        folder: folder that the run would use.
        denoiser: network that the plan is made for.
        layers: plan of the layers that would be quantized.
        notes: remarks on a valid policy that its reader may not expect.
        stages: stages in the order in which they run.
        free_bytes: free space of the folder's disk.
    """

    folder: Path
    denoiser: nn.Module
    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...]
    stages: tuple[StagePreview, ...]
    free_bytes: int
