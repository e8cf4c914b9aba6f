"""Targets for a DDIM step that clips x_0: the nearest prediction that carries x_t to x_s, as pure functions.

A scheduler with `clip_sample` limits the x_0 that a prediction implies to [-c, c], and leaves the implied eps as it
is: x_s = sqrt(a_s) clip(x_0) + sqrt(1 - a_s) eps, with a_s the schedule's alpha_bar at s. Distillation needs the
inverse: the prediction that lands on a wanted x_s.

Consider predictions in the order of rising x_0; eps falls along them. Within the bounds x_s rises, since the step
gains more through x_0 than it loses through eps. Beyond a bound, x_0 stays constant while eps keeps falling, so x_s
turns back. The step is thus a folded line with a fold at each bound, and a wanted x_s may be reached:

- By one prediction within the bounds: the inverse of the step without clipping.
- By another one beyond a bound. Its distance from the bound is the inverse's distance from it, times the slope before
  the fold divided by the slope after it. That ratio is sqrt(SNR_s / SNR_t) - 1. A full-precision model that overshoots
  a white background a little makes such predictions.
- By none, where the inverse itself lies beyond the bound. The step then comes nearest to x_s at the bound, and the
  error is measured from there.

The target of a prediction is the nearest of these, and its error is the distance to it. So a student whose step lands
on x_s has no error, whichever way it lands there. Where neither prediction nor target is clipped, the target is the
same as without clipping.

All errors are measured between predictions, so none of them grows without limit where alpha_bar is near 0. Errors
measured in x_s, where an unclipped step lands, do.

Not here: the step itself and its inverse without clipping (sampling/ddim.py), and the loss (distillation.py).
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

    Predictions between centre * x_t - reach and centre * x_t + reach imply an x_0 within the bounds. slopes is the
    slope of x_s before a bound divided by the slope after it. It is infinite where the step ends in the image, since
    x_s is then constant beyond a bound.
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
    """The prediction nearest to the given one whose clipped step lands on, or nearest to, the wanted x_s.

    The wanted x_s is where the step without clipping lands from `inverse`.

    Args:
        prediction: (B, C, H, W), without gradient.
        inverse: (B, C, H, W), the prediction that carries x_t to x_s in one step without clipping.
        x_t: (B, C, H, W), the states.
        folding: centre, reach and slopes of `fold`, each broadcastable over (B, C, H, W).
    """
    centre, reach, slopes = folding
    low, high = centre * x_t - reach, centre * x_t + reach
    within = inverse.clamp(low, high)
    edge = prediction.clamp(low, high)
    # Where the prediction is beyond a bound, edge is that bound, and `before` is the inverse's distance from it. The
    # second way exists only if the inverse lies on the inner side, that is, on the other side of the edge.
    before = edge - inverse
    beyond = edge + before * slopes
    folded = ((prediction - edge) * before > 0) & ((prediction - beyond).abs() < (prediction - within).abs())
    return torch.where(folded, beyond, within)
