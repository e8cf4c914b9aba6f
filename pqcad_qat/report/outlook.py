"""What a run would do before it is begun, as data: which stages stay, and what the others take.

Not here: how it is found (commands/run.py), or how it looks (tables.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pqcad_qat.quantization.plan import LayerPlan

KEPT, AGAIN, GOES_ON, TO_DO = "kept", "again", "goes on", "to do"
"""What becomes of a stage."""


@dataclass(frozen=True)
class StageOutlook:
    """One stage.

    Attributes:
        name: of the stage.
        state: what becomes of it.
        reason: why it is done again, empty otherwise.
        training_steps: None of a stage that does not train.
        size_bytes: that it takes on disk at most, about.
    """

    name: str
    state: str
    reason: str
    training_steps: int | None
    size_bytes: int


@dataclass(frozen=True)
class RunOutlook:
    """A run that is not begun.

    Attributes:
        folder: that it would be in.
        denoiser: the network that the plan stands on.
        layers: that would be quantized.
        notes: what is no fault of the policy, and still not what somebody reads in it.
        stages: in order.
        free_bytes: of the folder's disk.
    """

    folder: Path
    denoiser: nn.Module
    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...]
    stages: tuple[StageOutlook, ...]
    free_bytes: int
