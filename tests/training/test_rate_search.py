"""Which learning rates are tried, and which is taken.

Not here: a trial (tests/stages/test_found_rate.py).
"""

from __future__ import annotations

import math

import pytest

from pqcad_qat.training.rate_search import FIRST, RATES, SHARE, TRIALS, best, searched, trial_steps
from pqcad_qat.training.stage_end import RateTrial


def found(losses: dict[float, float]) -> tuple[list[float], float]:
    """Rates that were tried in their order, and the one that is taken; a rate without a loss must not be tried."""
    trials = searched(lambda rate: losses[rate])
    return [trial.rate for trial in trials], best(trials)


@pytest.mark.parametrize(
    ("losses", "tried", "taken"),
    [
        ({1e-5: 2.0, 3e-6: 3.0, 3e-5: 2.5}, [3e-6, 1e-5, 3e-5], 1e-5),
        ({1e-5: 2.0, 3e-6: 1.0, 1e-6: 1.5}, [3e-6, 1e-5, 1e-6], 3e-6),
        ({1e-5: 2.0, 3e-6: 3.0, 3e-5: 1.0, 1e-4: math.inf}, [3e-6, 1e-5, 3e-5, 1e-4], 3e-5),
        ({1e-5: 2.0, 3e-6: 2.0, 1e-6: 3.0}, [3e-6, 1e-5, 1e-6], 3e-6),
        ({1e-5: math.nan, 3e-6: 1.0, 1e-6: 3.0}, [3e-6, 1e-5, 1e-6], 3e-6),
        ({1e-5: 2.0, 3e-6: 3.0, 3e-5: 2.0}, [3e-6, 1e-5, 3e-5], 1e-5),
    ],
)
def test_the_search_follows_the_falling_loss_and_ends_behind_its_lowest(
    losses: dict[float, float], tried: list[float], taken: float
) -> None:
    rates, rate = found(losses)
    assert (sorted(rates), rate) == (sorted(tried), taken)


@pytest.mark.parametrize(("seconds", "steps"), [(None, 20), (2_000, 20), (600, 10), (10, 5)])
def test_trials_take_a_share_of_the_stage_at_most_but_for_a_few_steps(seconds: float | None, steps: int) -> None:
    found = trial_steps(seconds, 3.0)
    assert found == steps
    assert seconds is None or found == 5 or TRIALS * found * 3.0 <= SHARE * seconds


def test_it_ends_at_the_ends_of_the_range() -> None:
    assert found({rate: rate for rate in RATES})[1] == RATES[0]
    assert found({rate: -rate for rate in RATES})[1] == RATES[-1]


def test_where_every_rate_diverges_the_lowest_is_taken_and_told_as_diverged() -> None:
    trials = searched(lambda _: math.inf)
    assert best(trials) == RATES[0]
    assert set(trials) == {RateTrial(rate, None) for rate in RATES[: FIRST + 1]}
