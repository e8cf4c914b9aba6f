"""What a run wants of its disk: the stages that are done keep less than they took.

Not here: the bytes of each stage, which a run's preview shows (tests/test_cli.py).
"""

from __future__ import annotations

from pqcad_qat.report.run_preview import StageBytes, bytes_wanted


def test_a_stage_works_beside_what_those_before_it_have_left() -> None:
    assert bytes_wanted([StageBytes(10, 2), StageBytes(5), StageBytes(12, 1), StageBytes(3)]) == 2 + 5 + 12
    assert bytes_wanted([StageBytes(30, 2), StageBytes(5)]) == 30
    assert bytes_wanted([]) == 0
