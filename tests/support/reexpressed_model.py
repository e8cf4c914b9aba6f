"""A trained model, re-expressed exactly for another noise schedule and another kind of prediction.

Two schedules whose x_t has the same share of signal, alpha_bar, describe the same x_t. So a time of the new schedule is
a time of the trained one, found by equal SNR, and what the network predicts there is the new prediction by arithmetic.
Nothing is trained, and full precision's images stay what they are, up to where the sampler places its steps.

Not here: what is tested with it (tests/method/).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.sampling.ddim import join_prediction, split_prediction
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule, ddpm_schedule


class Reexpressed(nn.Module):
    """A trained denoiser, called at the times of another schedule for another kind of prediction.

    Attributes:
        times: (T,), the trained schedule's time at each time of the new one, between whole numbers in general.
        signal: (T,), alpha_bar of the new schedule.
    """

    times: Tensor
    signal: Tensor

    def __init__(self, denoiser: nn.Module, trained: DDPMSchedule, new: DDPMSchedule) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.trained_type, self.new_type = trained.prediction_type, new.prediction_type
        self.register_buffer("times", torch.from_numpy(equal_times(trained, new)).float())
        self.register_buffer("signal", torch.from_numpy(new.alpha_bar).float())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        prediction = self.denoiser(x_t, self.times[t]).sample
        if self.trained_type == self.new_type:
            return prediction
        signal = self.signal[t].reshape(-1, 1, 1, 1)
        return join_prediction(*split_prediction(prediction, x_t, signal, self.trained_type), signal, self.new_type)


def equal_times(trained: DDPMSchedule, new: DDPMSchedule) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(T,), the trained schedule's times of equal SNR; beyond its ends the nearest end."""
    wanted, known = (_log_snr(schedule.alpha_bar) for schedule in (new, trained))
    return np.interp(-wanted, -known, np.arange(len(known), dtype=np.float64))


def _log_snr(alpha_bar: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    signal = np.maximum(alpha_bar, 1e-30)
    return np.log(signal) - np.log1p(-signal)


def reexpressed(source: str, scheduler: Mapping[str, Any]) -> OwnModel:
    """The model of `source` for a scheduler config in diffusers' names, as a module of the user's own."""
    model = load_model(source)
    trained, new = ddpm_schedule(model.scheduler_config), ddpm_schedule(scheduler)
    assert len(model.sample_shape) == 3
    return OwnModel(
        "reexpressed", lambda: Reexpressed(load_model(source).denoiser, trained, new), model.sample_shape, scheduler
    )
