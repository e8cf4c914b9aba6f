"""The DDIM step and its inverse, and the three kinds of prediction, as pure functions.

Every function takes numpy arrays and torch tensors alike.

Names follow the papers: x_t is the state, x_0 the image, eps the noise and v the velocity. alpha_bar_t is the share of
signal, whose square root multiplies x_0. Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021, eq. 12), v (Salimans
and Ho 2022, appendix D).

Not here: the noise schedule and its timesteps (ddpm_schedule.py), the effect of clipping on a step's inverse
(training/clipped_targets.py), and the Euler step (flow.py).
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from pqcad_qat.sampling.schedulers import PredictionType

Array = TypeVar("Array")  # a numpy array or a torch tensor


def split_prediction(
    prediction: Array, x_t: Array, alpha_bar_t: Any, prediction_type: PredictionType
) -> tuple[Array, Array]:
    """Return the (x_0, eps) that a prediction at x_t stands for.

    alpha_bar_t is a number or broadcasts over (B, C, H, W).
    """
    p, x = cast(Any, prediction), cast(Any, x_t)
    signal, noise = alpha_bar_t**0.5, (1.0 - alpha_bar_t) ** 0.5
    if prediction_type == "epsilon":
        return (x - noise * p) / signal, p
    if prediction_type == "sample":
        return p, (x - signal * p) / noise
    return signal * x - noise * p, signal * p + noise * x


def join_prediction(x_0: Array, eps: Array, alpha_bar_t: Any, prediction_type: PredictionType) -> Array:
    """Return the prediction that stands for (x_0, eps) at alpha_bar_t, the inverse of `split_prediction`."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    return cast(Array, alpha_bar_t**0.5 * cast(Any, eps) - (1.0 - alpha_bar_t) ** 0.5 * cast(Any, x_0))


def ddim_step(
    prediction: Array,
    x_t: Array,
    alpha_bar_t: Any,
    alpha_bar_s: Any,
    *,
    prediction_type: PredictionType,
    clip_sample_range: float | None = None,
) -> Array:
    """Make one deterministic DDIM step from t to the less noisy s (Song et al. 2021, eq. 12 with eta = 0).

    Args:
        prediction: (B, C, H, W), the denoiser's output at x_t.
        x_t: (B, C, H, W).
        alpha_bar_t, alpha_bar_s: numbers, or arrays that broadcast over (B, C, H, W).
        prediction_type: quantity that the denoiser predicts.
        clip_sample_range: bound on the predicted x_0; eps stays as predicted, as in diffusers.

    Returns:
        (B, C, H, W), the state x_s.
    """
    x_0, eps = split_prediction(prediction, x_t, alpha_bar_t, prediction_type)
    if clip_sample_range is not None:
        x_0 = cast(Any, x_0).clip(-clip_sample_range, clip_sample_range)
    return cast(Array, alpha_bar_s**0.5 * cast(Any, x_0) + (1.0 - alpha_bar_s) ** 0.5 * cast(Any, eps))


def ddim_inverse(
    x_t: Array,
    x_s: Array,
    alpha_bar_t: Any,
    alpha_bar_s: Any,
    *,
    prediction_type: PredictionType,
    clip_sample_range: float | None = None,
) -> Array:
    """Return the prediction that takes x_t to x_s in one DDIM step (Salimans and Ho 2022, appendix G).

    It is `ddim_step` solved for the prediction. x_t and x_s give two linear equations in (x_0, eps). Their determinant
    is 0 only where t and s are the same timestep.

    With `clip_sample_range` an x_0 beyond the bound becomes the bound, and eps follows, so that the pair still makes up
    x_t. A clipped step then comes near to x_s. An x_0 far beyond the other bound would land on it, but mean something
    else to every other sampler.
    """
    signal_t, noise_t = alpha_bar_t**0.5, (1.0 - alpha_bar_t) ** 0.5
    signal_s, noise_s = alpha_bar_s**0.5, (1.0 - alpha_bar_s) ** 0.5
    determinant = signal_t * noise_s - noise_t * signal_s
    t, s = cast(Any, x_t), cast(Any, x_s)
    x_0 = (t * noise_s - s * noise_t) / determinant
    eps = (s * signal_t - t * signal_s) / determinant
    if clip_sample_range is not None:
        within = cast(Any, x_0).clip(-clip_sample_range, clip_sample_range)
        x_0, eps = within, eps + (x_0 - within) * (signal_t / noise_t)
    return cast(Array, join_prediction(x_0, eps, alpha_bar_t, prediction_type))


def add_noise(x_0: Array, eps: Array, alpha_bar_t: Any) -> Array:
    """Return x_t of the forward process (Ho et al. 2020, eq. 4)."""
    return cast(Array, alpha_bar_t**0.5 * cast(Any, x_0) + (1.0 - alpha_bar_t) ** 0.5 * cast(Any, eps))
