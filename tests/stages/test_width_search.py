"""The search for the smallest choice of widths, against choices whose quality is known.

Not here: the measurement of a real choice (test_chosen_widths.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tiny_runs import POLICIES

from pqcad_qat.policy.loading import load_policy
from pqcad_qat.stages.prepared import prepare
from pqcad_qat.stages.width_search import FLOAT_SHARE, MEASURED, left_float, search

ERRORS = [10.0 ** -(place / 20) for place in range(81)]
"""Predicted errors of 81 choices, each half a decibel better than the one before."""


class Measured:
    """A measurement that counts its calls: PSNR is what the errors predict, changed by `bent`."""

    def __init__(self, bent: float = 1.0) -> None:
        self.bent = bent
        self.places: list[int] = []

    def psnr(self, place: int) -> float:
        return 20 + (-10 * math.log10(ERRORS[place])) ** self.bent

    def __call__(self, place: int) -> float:
        self.places.append(place)
        return self.psnr(place)


@pytest.mark.parametrize("quality", [20.3, 31.0, 42.7, 59.9])
def test_the_first_choice_that_has_the_quality_is_found_where_the_errors_predict_it(quality: float) -> None:
    measure = Measured()
    found = search(measure, ERRORS, quality)
    assert found is not None
    assert measure.psnr(found) >= quality > measure.psnr(found - 1)
    assert len(measure.places) <= 5


@pytest.mark.parametrize("bent", [0.7, 1.2])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_wrong_prediction_costs_measurements_and_no_more_than_a_few_choices(bent: float, share: float) -> None:
    measure = Measured(bent)
    quality = 20 + share * (measure.psnr(80) - 20)
    found = search(measure, ERRORS, quality)
    assert found is not None
    assert measure.psnr(found) >= quality
    assert measure.psnr(max(0, found - 5)) < quality
    assert found in measure.places
    assert len(measure.places) <= MEASURED


def test_the_smallest_choice_is_taken_at_once_and_none_where_the_best_has_not_the_quality() -> None:
    measure = Measured()
    assert search(measure, ERRORS, 20.0) == 0
    assert measure.places == [0]
    assert search(measure, ERRORS, 60.5) is None
    assert measure.places == [0, 0, 80]


def test_choices_that_the_errors_cannot_tell_apart_are_halved() -> None:
    measure = Measured()
    found = search(measure, [1.0] * len(ERRORS), 40.0)
    assert found is not None
    assert measure.psnr(found) >= 40.0


def test_layers_that_read_one_tensor_stay_in_float_together_the_worst_first() -> None:
    plan = prepare(load_policy(POLICIES / "smoke.yaml", ["model.source=embedded:digits"])).plan[-12:]
    plan = tuple(replace(layer, input_group=plan[index // 2 * 2].name) for index, layer in enumerate(plan))
    errors = {layer.name: float(index % 4) for index, layer in enumerate(plan)}
    plans = list(left_float(plan, errors))
    assert [len(quantized) for quantized in plans] == [10, 8, 6]
    assert 12 - len(plans[-1]) == FLOAT_SHARE * 12
    gone = [layer.name for layer in plan if layer not in plans[-1]]
    assert [errors[name] for name in gone] == [2.0, 3.0] * 3
