"""The target of a clipped step: where it lands, what it costs, and that training by it comes nearer to where the step
is to land.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pqcad_qat.sampling.ddim import ddim_inverse, ddim_step, split_prediction
from pqcad_qat.training.clipped_targets import fold, nearest_target

PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = [(0.002, 0.1), (0.1, 0.5), (0.6, 0.7), (0.98, 0.999), (0.9, 1.0)]
BOUND = 1.0


def states(count: int = 4000) -> tuple[Tensor, Tensor]:
    """(x_t, another as large) of noise, float64."""
    dice = torch.Generator().manual_seed(0)
    x_t, other = torch.randn(2, count, 1, 1, 1, generator=dice, dtype=torch.float64)
    return x_t, other


def folded(a_t: float, a_s: float, kind: Any) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in fold(a_t, a_s, kind, BOUND)]


def of_x_0(x_0: Tensor, x_t: Tensor, a_t: float, kind: Any) -> Tensor:
    """The prediction at x_t that stands for x_0."""
    eps = (x_t - a_t**0.5 * x_0) / (1 - a_t) ** 0.5
    return {"epsilon": eps, "sample": x_0, "v_prediction": a_t**0.5 * eps - (1 - a_t) ** 0.5 * x_0}[kind]


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(("a_t", "a_s"), STEPS)
def test_a_prediction_whose_step_lands_there_is_its_own_target_however_much_is_clipped(
    kind: Any, a_t: float, a_s: float
) -> None:
    x_t, x_0 = states()
    prediction = of_x_0(3 * x_0, x_t, a_t, kind)  # two thirds beyond a bound
    x_s = ddim_step(prediction, x_t, a_t, a_s, prediction_type=kind, clip_sample_range=BOUND)
    target = nearest_target(
        prediction, ddim_inverse(x_t, x_s, a_t, a_s, prediction_type=kind), x_t, folded(a_t, a_s, kind)
    )
    landed = ddim_step(target, x_t, a_t, a_s, prediction_type=kind, clip_sample_range=BOUND)
    torch.testing.assert_close(landed, x_s, rtol=1e-9, atol=1e-9)
    near = (3 * x_0).abs() < BOUND + 0.1  # further away another prediction that lands there may be nearer
    if a_s < 1:
        torch.testing.assert_close(target[near], prediction[near], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(("a_t", "a_s"), STEPS)
def test_it_is_the_nearest_of_all_predictions_that_land_there(kind: Any, a_t: float, a_s: float) -> None:
    """Against a search through predictions."""
    for start, wanted in ((1.05, 0.97), (1.02, 0.2), (-1.5, -0.9), (0.3, -0.8), (4.0, 0.99)):
        x_t = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
        prediction, inverse = (
            of_x_0(torch.tensor([[[[value]]]], dtype=torch.float64), x_t, a_t, kind) for value in (start, wanted)
        )
        x_s = ddim_step(inverse, x_t, a_t, a_s, prediction_type=kind)
        found = nearest_target(prediction, inverse, x_t, folded(a_t, a_s, kind))
        tried = of_x_0(torch.linspace(-60, 60, 400_001, dtype=torch.float64).view(-1, 1, 1, 1), x_t, a_t, kind)
        error = (ddim_step(tried, x_t, a_t, a_s, prediction_type=kind, clip_sample_range=BOUND) - x_s).abs().flatten()
        lands = tried.flatten()[error <= 2e-4]  # a spacing of 3e-4 in x_0
        best = float((lands - prediction.flatten()).abs().min())
        scale = float(
            (of_x_0(torch.ones_like(x_t), x_t, a_t, kind) - of_x_0(torch.zeros_like(x_t), x_t, a_t, kind)).abs()
        )
        folds = fold(a_t, a_s, kind, BOUND)[2]
        assert float((found - prediction).abs()) == pytest.approx(
            best, abs=2e-3 * scale * max(1.0, min(folds, 60.0)) / a_s
        )


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(("a_t", "a_s"), STEPS)
def test_where_nothing_is_clipped_it_is_the_inverse_bit_for_bit(kind: Any, a_t: float, a_s: float) -> None:
    x_t, x_0 = states()
    one, other = (of_x_0(torch.tanh(value) * 0.99, x_t, a_t, kind) for value in (x_0, x_t))
    assert torch.equal(nearest_target(one, other, x_t, folded(a_t, a_s, kind)), other)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(("a_t", "a_s"), STEPS)
def test_where_no_prediction_of_a_side_lands_there_it_is_the_bound_which_lands_nearest(
    kind: Any, a_t: float, a_s: float
) -> None:
    x_t, _ = states(50)
    inverse = of_x_0(torch.full_like(x_t, 1.4), x_t, a_t, kind)
    x_s = ddim_step(inverse, x_t, a_t, a_s, prediction_type=kind)
    for start in (0.3, 1.1, 2.0):
        target = nearest_target(
            of_x_0(torch.full_like(x_t, start), x_t, a_t, kind), inverse, x_t, folded(a_t, a_s, kind)
        )
        torch.testing.assert_close(
            split_prediction(target, x_t, a_t, kind)[0], torch.ones_like(x_t), rtol=1e-6, atol=1e-6
        )
        error = (ddim_step(target, x_t, a_t, a_s, prediction_type=kind, clip_sample_range=BOUND) - x_s).abs()
        for x_0 in np.linspace(-1, 3, 41):
            tried = of_x_0(torch.full_like(x_t, float(x_0)), x_t, a_t, kind)
            assert (
                (ddim_step(tried, x_t, a_t, a_s, prediction_type=kind, clip_sample_range=BOUND) - x_s).abs()
                >= error - 1e-9
            ).all()


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(("a_t", "a_s"), [(1e-9, 1e-3), (0.0, 1e-6), (1e-3, 1.0), (1 - 1e-6, 1.0), (0.5, 0.5 + 1e-9)])
def test_errors_are_finite_and_no_larger_than_without_a_bound_or_the_way_to_it(
    kind: Any, a_t: float, a_s: float
) -> None:
    if kind == "epsilon" and a_t == 0:
        return
    x_t = states()[0].float()
    prediction, inverse = torch.randn(2, *x_t.shape, generator=torch.Generator().manual_seed(1)) * 30
    bounds = [value.float() for value in folded(a_t, a_s, kind)]
    error = prediction - nearest_target(prediction, inverse, x_t, bounds)
    centre, reach, _ = bounds
    within = prediction - inverse.clamp(centre * x_t - reach, centre * x_t + reach)
    assert bool(error.isfinite().all())
    assert bool((error.abs() <= within.abs()).all())


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(("a_t", "a_s"), [(0.01, 0.2), (0.5, 0.7), (0.97, 1.0)])
def test_descent_by_it_lands_there_from_any_prediction_or_ends_at_the_bound_that_the_inverse_is_beyond(
    kind: Any, a_t: float, a_s: float
) -> None:
    x_t, x_0 = states(300)
    dice = torch.Generator().manual_seed(2)
    x_s = ddim_step(
        of_x_0(1.3 * x_0, x_t, a_t, kind), x_t, a_t, a_s, prediction_type=kind, clip_sample_range=BOUND
    )  # the teacher clips, too
    inverse = ddim_inverse(x_t, x_s, a_t, a_s, prediction_type=kind)
    start = of_x_0(2 * torch.randn(x_t.shape, generator=dice, dtype=torch.float64), x_t, a_t, kind)
    prediction, bounds = start.clone().requires_grad_(), folded(a_t, a_s, kind)
    for _ in range(80):
        loss = (prediction - nearest_target(prediction.detach(), inverse, x_t, bounds)).square().sum() / 2
        (gradient,) = torch.autograd.grad(loss, prediction)
        prediction = (prediction - 0.3 * gradient).detach().requires_grad_()
    before, after = (
        ddim_step(p.detach(), x_t, a_t, a_s, prediction_type=kind, clip_sample_range=BOUND) - x_s
        for p in (start, prediction)
    )
    x_0_after, x_0_wanted = (split_prediction(p.detach(), x_t, a_t, kind)[0] for p in (prediction, inverse))
    at_the_bound = ((x_0_after - x_0_wanted.clamp(-BOUND, BOUND)).abs() < 1e-6) & (x_0_wanted.abs() > BOUND)
    assert bool(((after.abs() < 1e-6) | at_the_bound).all())
    assert float(at_the_bound.double().mean()) < 0.25
    assert float(after.abs().mean()) < 0.3 * float(before.abs().mean())
