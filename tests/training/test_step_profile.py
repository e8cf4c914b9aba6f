"""A training step's cost by part: whose time is counted where, and what autograd keeps; nothing here asserts a speed.

Not here: the models of the command `profile` (test_profile.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pqcad_qat.training.callback import Batch, Callback, StepReport, TrainState
from pqcad_qat.training.step_profile import PARTS, WARM_UP, profile_steps


@dataclass
class Slow(Callback):
    """Sleeps so long before, in and after a step."""

    before: float = 0.0
    within: float = 0.0
    after: float = 0.0

    def __post_init__(self) -> None:
        self.name = "slow"
        self.steps: list[int] = []

    def before_step(self, state: TrainState) -> None:
        self.steps.append(state.step)
        time.sleep(self.before)

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        time.sleep(self.within)
        return {"loss": state.network(batch["x"]).square().mean()}

    def after_step(self, state: TrainState, report: StepReport) -> None:
        time.sleep(self.after)


def batch(step: int) -> Batch:
    return {"x": torch.ones(16, 4)}


def test_time_is_counted_where_it_was_spent() -> None:
    slow = {"schedule": Slow(before=0.02), "forward": Slow(within=0.02), "watch": Slow(after=0.02)}
    found = profile_steps(
        {name: (nn.Linear(4, 4), [callback]) for name, callback in slow.items()}, batch, "fp32", 0.9, runs=3
    )
    for name, profile in found.items():
        assert tuple(profile.milliseconds) == PARTS
        assert max(profile.milliseconds, key=lambda part: profile.milliseconds[part]) == name
        assert profile.total >= profile.milliseconds[name] >= 20


def test_every_candidate_makes_the_steps_of_the_loop_and_says_so() -> None:
    callbacks, told = [Slow(), Slow()], []
    profile_steps(
        {str(number): (nn.Linear(4, 4), [slow]) for number, slow in enumerate(callbacks)},
        batch,
        "fp32",
        0.0,
        runs=2,
        advance=told.append,
    )
    assert [slow.steps for slow in callbacks] == [list(range(WARM_UP + 2))] * 2
    assert sum(told) == 2 * (WARM_UP + 2)


@pytest.mark.parametrize("hidden", [8, 64])
def test_kept_bytes_are_those_of_the_activations(hidden: int) -> None:
    model = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    (found,) = profile_steps({"m": (model, [Slow()])}, batch, "fp32", 0.0, runs=1).values()
    # the batch, tanh's output (also the second layer's input), the squared output
    assert found.kept_bytes == 4 * 16 * (4 + hidden + 1)
    # weights, and the two moments and the number of steps of each of the four; nothing is averaged
    assert found.held_bytes == 4 * (3 * (4 * hidden + hidden + hidden + 1) + 4)
