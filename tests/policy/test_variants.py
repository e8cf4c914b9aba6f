"""Which stages the variants of a run take: the table, without running any.

Not here: runs (test_run.py).
"""

from __future__ import annotations

import pytest

from pqcad_qat.policy.variants import (
    DEFAULT_VARIANTS,
    EVERY_RUN,
    REFERENCE,
    STAGES,
    TRAINED,
    VariantName,
    made,
    stages_of,
)
from pqcad_qat.report.record import VARIANTS


def test_every_variant_has_its_stages_and_its_description_in_one_order() -> None:
    assert list(STAGES) == list(VARIANTS)
    assert set(DEFAULT_VARIANTS) == set(STAGES) - {"ptq"}


def test_by_default_every_stage_runs_and_a_stage_follows_what_it_needs() -> None:
    assert stages_of(DEFAULT_VARIANTS) == (
        *("calibration", "pq", "fixed-bit", "teacher", "pq-distilled", "pqcad"),
        *("export", "baselines", "benchmark", "samples", "evaluation"),
    )


@pytest.mark.parametrize(
    ("listed", "stages"),
    [
        (("fp32", "fp32-half"), ()),
        (("ptq",), ()),
        (("fixed-bit",), ("fixed-bit",)),
        (("pq",), ("pq",)),
        (("pq-distilled",), ("pq", "teacher", "pq-distilled")),
        (("fixed-bit", "pqcad"), ("pq", "fixed-bit", "teacher", "pqcad")),
        (("pqcad-openvino",), ("pq", "teacher", "pqcad", "export", "benchmark")),
        (("nncf-int8",), ("baselines", "benchmark")),
    ],
)
def test_a_run_takes_only_the_stages_of_what_is_listed(
    listed: tuple[VariantName, ...], stages: tuple[str, ...]
) -> None:
    assert [stage for stage in stages_of(listed) if stage not in EVERY_RUN] == list(stages)


def test_full_precision_is_always_made_and_nothing_else_that_is_not_listed() -> None:
    assert made(("pq", "ptq")) == (REFERENCE, "ptq", "pq")


def test_a_stage_that_trains_is_named_as_the_variant_that_it_makes() -> None:
    assert all(name in stages_of((name,)) for name in STAGES if name in TRAINED)
    assert set(TRAINED) <= set(STAGES)
