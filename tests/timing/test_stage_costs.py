"""What stages cost: that the peak is of the stage, and what is kept is what is kept.

Not here: seconds, which a test cannot tell.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pqcad_qat.timing import stage_costs
from pqcad_qat.timing.stage_costs import StageCost, StageMeter

BLOCK = 2**28


def test_the_peak_of_a_stage_is_its_own_and_what_it_frees_is_not_kept() -> None:
    told: list[StageCost] = []
    meter = StageMeter(told.append)
    with meter.stage("before"):
        pass
    with meter.stage("large"):
        np.ones(BLOCK, np.uint8)
    with meter.stage("after"):
        pass
    before, large, after = ((cost.peak_bytes or 0, cost.kept_bytes or 0) for cost in meter.costs)
    assert large[0] > before[1] + 0.9 * BLOCK
    assert after[0] < large[0] - 0.9 * BLOCK
    assert large[1] < large[0] - 0.9 * BLOCK
    assert meter.peak_bytes == max(before[0], large[0], after[0])
    assert told == meter.costs
    assert [cost.name for cost in told] == ["before", "large", "after"]


def test_where_the_system_does_not_tell_the_peak_of_a_stage_there_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stage_costs, "_CLEAR", tmp_path / "absent" / "clear_refs")
    meter = StageMeter()
    with meter.stage("any"):
        pass
    assert (meter.costs[0].peak_bytes, meter.costs[0].kept_bytes) == (None, None)
    assert meter.peak_bytes > 2**20
