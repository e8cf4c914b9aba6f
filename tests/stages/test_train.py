"""What the stages that train are built with.

Not here: training itself (tests/training), or what these stages leave (test_run.py).
"""

from __future__ import annotations

import pytest

from pqcad_qat.policy.schema import TrainingPolicy
from pqcad_qat.stages.train import whole_batch


def test_a_step_learns_from_the_accumulated_batches_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingPolicy(batch_size=4, gradient_accumulation=3)
    assert whole_batch(training) == 12
    monkeypatch.setattr("pqcad_qat.stages.train.process_count", lambda: 2)
    assert whole_batch(training) == 24
