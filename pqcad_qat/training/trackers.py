"""Where the scalars and images of a training stage go besides the run's own files: TensorBoard, and other trackers by
Hugging Face Accelerate.

Not here: which scalars there are (metrics_log.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, WandBTracker
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pqcad_qat.errors import PolicyError
from pqcad_qat.policy.value_types import TrackerName

WITHOUT_LOGIN = ("offline", "disabled", "dryrun")
"""Values of WANDB_MODE with which Weights & Biases needs no login."""


class Tracker(Protocol):
    """One place to which a stage's scalars and images go."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record the scalars of a training step."""

    def images(self, values: Mapping[str, Tensor], step: int) -> None:
        """Record images, uint8 (N, C, H, W), of a training step."""

    def close(self) -> None:
        """Write what is still to be written."""


class TensorBoard:
    """Events in a folder, which is a run of TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, values: Mapping[str, Tensor], step: int) -> None:
        for name, pictures in values.items():
            self._writer.add_images(name, pictures, step)

    def close(self) -> None:
        self._writer.close()


class Accelerates:
    """A tracker that Accelerate knows. Where it fails, as without a network, that is told once and training goes on."""

    def __init__(self, tracker: GeneralTracker, tell: Callable[[str], None]) -> None:
        self._tracker, self._tell, self._failed = tracker, tell, False
        PartialState()  # Accelerate asks it whether this is the first process
        self._attempt(tracker.start)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._attempt(self._tracker.log, dict(values), step=step)

    def images(self, values: Mapping[str, Tensor], step: int) -> None:
        if hasattr(self._tracker, "log_images"):
            pictures = {name: list(value.permute(0, 2, 3, 1).numpy()) for name, value in values.items()}
            self._attempt(self._tracker.log_images, pictures, step=step)

    def close(self) -> None:
        self._attempt(self._tracker.finish)

    def _attempt(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        if self._failed:
            return
        try:
            call(*arguments, **named)
        except Exception as error:  # each tracker raises kinds of its own
            self._failed = True
            self._tell(f"{self._tracker.name} gets nothing any more: {type(error).__name__}: {error}")


def opened_trackers(
    names: Sequence[TrackerName], stage: str, folder: Path, tell: Callable[[str], None]
) -> list[Tracker]:
    """The trackers of a stage whose events are written to ``folder``/STAGE.

    The stages of a run are runs of one project (Weights & Biases) or experiment (MLflow) named after the run's folder.
    """
    project = folder.resolve().parent.name
    makers: Mapping[TrackerName, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder / stage),
        "wandb": lambda: Accelerates(WandBTracker(project, name=stage, dir=str(folder)), tell),
        "mlflow": lambda: Accelerates(MLflowTracker(project, run_name=stage), tell),
    }
    return [makers[name]() for name in names]


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers that could not begin, before anything is trained.

    Raises:
        PolicyError: a tracker's package is not installed, or nobody is logged in.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise PolicyError(
            f"training.trackers: got {', '.join(missing)}, not installed here; allowed after: pip install "
            f"{' '.join(missing)}"
        )
    if "wandb" in names and os.environ.get("WANDB_MODE") not in WITHOUT_LOGIN and not _logged_in():
        raise PolicyError(
            "training.trackers: got wandb, and nobody is logged in; allowed after `wandb login`, or with "
            "WANDB_MODE=offline"
        )


def _logged_in() -> bool:
    """Whether Weights & Biases has a key; its package takes seconds to import."""
    return bool(import_module("wandb").api.api_key)
