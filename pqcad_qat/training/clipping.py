"""Which prediction a clipped DDIM step is to be given: the nearest one that carries x_t to x_s, as pure functions.

Not here: the step itself and its inverse without a bound (ddim.py), and the loss (training/distillation.py).

A scheduler with `clip_sample` bounds the x_0 that a prediction stands for to [-c, c], and leaves its eps as it was:
x_s = sqrt(a_s) clip(x_0) + sqrt(1 - a_s) eps. From prediction to prediction x_0 rises as eps falls. Within the bounds
x_s rises with x_0, since the step gains more by x_0 than it loses by eps; beyond a bound x_0 stands still, eps falls
on, and x_s turns back. So the step is folded at both bounds, and there may be for a wanted x_s

- one prediction within the bounds: the inverse of the step without a bound;
- another beyond a bound, by as much as the inverse lies before it, times the slope before the fold by that after it,
  which is sqrt(SNR_s / SNR_t) - 1. A full-precision model that overshoots a white background by a little makes one of
  these;
- none on the side where the inverse itself lies beyond the bound. Then the step lands nearest to x_s at the bound, and
  is measured there.

A prediction's target is the nearest of them, and its error the distance to it. So a student whose step lands on x_s has
no error, however it does so. Where nothing is clipped, neither in the prediction nor in the target, all is as without a
bound. And every error is one of the
prediction itself: none grows without limit where alpha_bar is near 0, as one that is measured where a step without a
bound lands does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pqcad_qat.sampling.schedulers import PredictionType


def fold(
    alpha_bar_t: float, alpha_bar_s: float, prediction_type: PredictionType, bound: float
) -> tuple[float, float, float]:
    """(centre, reach, slopes) of the step from t to s.

    Predictions from centre x_t - reach to centre x_t + reach stand for an x_0 within the bounds; slopes is that of the
    landing before a bound by that after it, infinite where the step lands on the image, since beyond a bound nothing
    moves then.
    """
    signal, noise = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    centre, reach = {
        "epsilon": (1 / noise, bound * signal / noise),
        "v_prediction": (signal / noise, bound / noise),
        "sample": (0.0, bound),
    }[prediction_type]
    after = math.sqrt(1 - alpha_bar_s) * signal
    return centre, reach, math.sqrt(alpha_bar_s) * noise / after - 1 if after else math.inf


def nearest_target(prediction: Tensor, inverse: Tensor, x_t: Tensor, folding: Sequence[Tensor]) -> Tensor:
    """The prediction nearest to this one whose clipped step lands where that of `inverse` does without a bound, or
    nearest to there.

    Args:
        prediction: (B, C, H, W), without gradient.
        inverse: (B, C, H, W), the prediction that carries x_t to x_s in one step whose x_0 is not clipped.
        x_t: (B, C, H, W).
        folding: centre, reach and slopes of `fold`, each to be broadcast over (B, C, H, W).
    """
    centre, reach, slopes = folding
    low, high = centre * x_t - reach, centre * x_t + reach
    within = inverse.clamp(low, high)
    edge = prediction.clamp(low, high)
    before = edge - inverse  # how far the inverse lies before the bound that the prediction is beyond
    beyond = edge + before * slopes
    folded = ((prediction - edge) * before > 0) & ((prediction - beyond).abs() < (prediction - within).abs())
    return torch.where(folded, beyond, within)
