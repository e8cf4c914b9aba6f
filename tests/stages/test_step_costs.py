"""What an error at a sampling step costs in the image, and the weights that training makes of it.

Not here: the losses that use the weights (training/).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import POLICIES, tiny_overrides

from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import PQ, PQCAD
from pqcad_qat.sampling.trajectory import along, initial_noise
from pqcad_qat.stages.prepared import Prepared, prepare
from pqcad_qat.stages.step_costs import POINTS, step_costs, weights_by_time


class Shifted(torch.nn.Module):
    """A denoiser that is off by the same small number everywhere."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = predict(self.denoiser, x, t) + 0.01
        return prediction


@pytest.fixture(scope="module")
def prepared(tiny_folder: Path) -> Prepared:
    return prepare(load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder)))


def test_a_cost_is_what_an_error_at_that_step_alone_does_to_the_image(
    prepared: Prepared, tiny_folder: Path, tiny_model: DiffusionModel
) -> None:
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))
    costs = step_costs(policy, prepared, Shifted(tiny_model.denoiser), variant=PQ)
    schedule = prepared.schedule
    walk = schedule.walk(policy.sampler.steps)
    assert [t for t, _ in costs] == [t for t, _ in walk]
    section = policy.calibration
    noise = torch.from_numpy(
        initial_noise(section.seed, section.trajectories, section.trajectories, tiny_model.sample_shape)
    )

    @torch.no_grad()
    def image(shifted_at: float | None) -> torch.Tensor:
        x = noise
        for step in along(
            walk, lambda x_t, t: predict(tiny_model.denoiser, x_t, t) + 0.01 * (t == shifted_at), noise, schedule
        ):
            x = step.x_s
        return x

    for t, cost in costs:
        change = float((image(t) - image(None)).square().mean())
        assert cost == pytest.approx(change / 0.01**2, rel=1e-2)


def test_the_students_costs_are_of_its_own_longer_steps(
    prepared: Prepared, tiny_folder: Path, tiny_model: DiffusionModel
) -> None:
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))
    ours = step_costs(policy, prepared, Shifted(tiny_model.denoiser), variant=PQCAD)
    assert len(ours) == policy.distillation.student_steps
    assert all(cost > 0 for _, cost in ours)


def test_of_many_steps_some_are_measured(prepared: Prepared, tiny_folder: Path, tiny_model: DiffusionModel) -> None:
    overrides = tiny_overrides(tiny_folder, "sampler.steps=24", "calibration.trajectories=2")
    costs = step_costs(
        load_policy(POLICIES / "smoke.yaml", overrides), prepared, Shifted(tiny_model.denoiser), variant=PQ
    )
    walk = prepared.schedule.walk(24)
    assert len(costs) == POINTS
    assert (costs[0][0], costs[-1][0]) == (walk[0][0], walk[-1][0])


def test_a_model_without_an_error_leaves_all_states_their_weight(prepared: Prepared, tiny_folder: Path) -> None:
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))
    same = replace(prepared).model.denoiser
    costs = step_costs(policy, prepared, same, variant=PQ)
    assert set(weights_by_time(costs, [t for t, _ in costs]).values()) == {1.0}


def test_weights_have_a_mean_of_one_and_lie_between_their_neighbours() -> None:
    weights = weights_by_time(((900.0, 4.0), (500.0, 1.0), (100.0, 0.25)), [900.0, 700.0, 500.0, 300.0, 100.0])
    assert sum(weights.values()) / 5 == pytest.approx(1.0)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    assert weights[900.0] / weights[500.0] == pytest.approx(weights[500.0] / weights[100.0])
    assert weights[700.0] ** 2 == pytest.approx(weights[900.0] * weights[500.0])


def test_without_costs_every_state_counts_alike() -> None:
    assert weights_by_time((), [3.0, 1.0]) == {3.0: 1.0, 1.0: 1.0}
