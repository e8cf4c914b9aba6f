"""The noise schedules that diffusers knows by name, as variances beta_t of the added noise; numpy only.

Not here: the keys of a scheduler config (schedulers.py), or the steps of a sampler (ddpm_schedule.py).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pqcad_qat.sampling.schedulers import SQUARED_COSINE

Betas = npt.NDArray[np.float64]

LARGEST_BETA = 0.999
"""Largest beta_t of schedules that are defined by a curve of alpha_bar."""


def named_betas(curve: str, first: float, last: float, count: int) -> Betas:
    """Return beta_t (T,) of the schedule that diffusers calls `curve`.

    `first` and `last` are its end points, and `count` is T.
    """
    if curve == "linear":
        return np.linspace(first, last, count)
    if curve == "scaled_linear":
        return np.linspace(math.sqrt(first), math.sqrt(last), count) ** 2
    if curve == "sigmoid":
        return (last - first) / (1 + np.exp(-np.linspace(-6, 6, count))) + first
    time = np.arange(count + 1) / count
    if curve == SQUARED_COSINE:  # Nichol and Dhariwal 2021, eq. 17
        signal = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    elif curve == "exp":
        signal = np.exp(-12.0 * time)
    else:
        assert curve == "laplace", curve
        # log SNR is the inverse CDF of a Laplace distribution with mean 0 and scale 0.5, falling with time. diffusers
        # takes the square root of its sigmoid as the curve.
        log_snr = -0.5 * np.copysign(1, 0.5 - time) * np.log(1 - 2 * np.abs(0.5 - time) + 1e-6)
        signal = np.sqrt(1 / (1 + np.exp(-log_snr)))
    betas: Betas = np.minimum(1.0 - signal[1:] / signal[:-1], LARGEST_BETA)
    return betas


def zero_terminal_snr(betas: Betas) -> Betas:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return betas_of(root**2)


def betas_of(alpha_bar: npt.NDArray[np.float64]) -> Betas:
    """Return the beta_t (T,) that produce the given alpha_bar (T,)."""
    return 1.0 - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
