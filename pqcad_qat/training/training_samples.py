"""Images sampled while a model trains, always from the same noise, which show whether a stage goes well.

Not here: the images of a run's report (report/), and how images reach TensorBoard (metrics_log.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqcad_qat.data.images import to_uint8
from pqcad_qat.machine.processes import is_first
from pqcad_qat.models.guidance import Guidance
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.sampling.ddpm_schedule import Walk
from pqcad_qat.sampling.trajectory import NoiseSchedule, landing
from pqcad_qat.training.callback import Callback, StepReport, TrainState, averaged_weights


@dataclass
class TrainingSamples(Callback):
    """Samples images from the averaged weights at regular steps and at the last, in the first process while the others
    wait.

    Attributes:
        states: (N, C, H, W), the states at which the sampling steps begin.
        schedule: noise schedule of the model.
        walk: the sampling steps.
        every: training steps between two sets of images; 0 for none.
        last: last training step, where nothing decides it during training.
        guidance: conditions of the images and how they are guided.
    """

    states: Tensor
    schedule: NoiseSchedule
    walk: Walk
    every: int
    guidance: Guidance = field(default_factory=Guidance)
    last: int | None = None

    def __post_init__(self) -> None:
        self.name = "training-samples"
        self._sampled: Tensor | None = None

    def after_step(self, state: TrainState, report: StepReport) -> None:
        last = self.last if state.ending is None else state.ending.last
        due = self.every > 0 and (state.step % self.every == 0 or state.step == last)
        self._sampled = self._sample(state) if due and is_first() else None

    def images(self) -> Mapping[str, Tensor]:
        """Images for the log, uint8 (N, C, H, W)."""
        return {} if self._sampled is None else {"samples": self._sampled}

    @torch.no_grad()
    def _sample(self, state: TrainState) -> Tensor | None:
        """The sampled images, or None where a value of them is not finite."""
        with averaged_weights(state) as model, frozen_weights(model.eval()):
            x = self.states.to(next(model.parameters()).device)
            x = landing(self.walk, self.guidance.follow(model, x.device), x, self.schedule)
        return to_uint8(x).cpu() if bool(x.isfinite().all()) else None
