"""The variants a run can make, and the stages that each takes.

Not here: what the stages do (stages/), and the rows that come of them (stages/report_rows.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, get_args

VariantName = Literal[
    "fp32",
    "fp32-half",
    "ov-fp32",
    "ov-bf16",
    "nncf-int8",
    "ptq",
    "fixed-bit",
    "pq",
    "pq-distilled",
    "pqcad",
    "pqcad-openvino",
]
Stage = Literal[
    "calibration",
    "pq",
    "fixed-bit",
    "teacher",
    "pq-distilled",
    "pqcad",
    "export",
    "baselines",
    "benchmark",
    "samples",
    "evaluation",
]

REFERENCE: VariantName = "fp32"
"""Always made: what the others are compared with."""

DEFAULT_VARIANTS: tuple[VariantName, ...] = tuple(name for name in get_args(VariantName) if name != "ptq")

HALF_STEPS: tuple[VariantName, ...] = ("fp32-half", "pq-distilled", "pqcad", "pqcad-openvino")
"""Variants that sample in the student's steps."""

DISTILLED: tuple[VariantName, ...] = ("pq-distilled", "pqcad", "pqcad-openvino")
"""Variants of a distilled student."""

UNTRAINED: tuple[VariantName, ...] = ("fp32", "fp32-half", "ov-fp32", "ov-bf16", "nncf-int8")
"""Variants that no training touches: the same for all runs of one model and calibration set."""

EVERY_RUN: tuple[Stage, ...] = ("calibration", "samples", "evaluation")

TRAINED: tuple[Stage, ...] = ("pq", "fixed-bit", "pq-distilled", "pqcad")
"""The stages that train, each named as the variant that it makes."""

STAGES: Mapping[VariantName, tuple[Stage, ...]] = {  # beside those of every run
    "fp32": (),
    "fp32-half": (),
    "ov-fp32": ("baselines", "benchmark"),
    "ov-bf16": ("baselines", "benchmark"),
    "nncf-int8": ("baselines", "benchmark"),
    "ptq": (),
    "fixed-bit": ("fixed-bit",),
    "pq": ("pq",),
    "pq-distilled": ("pq", "teacher", "pq-distilled"),
    "pqcad": ("pq", "teacher", "pqcad"),
    "pqcad-openvino": ("pq", "teacher", "pqcad", "export", "benchmark"),
}


def made(listed: Collection[VariantName]) -> tuple[VariantName, ...]:
    """The variants that a run makes, in the order of its tables."""
    return tuple(name for name in STAGES if name == REFERENCE or name in listed)


def stages_of(listed: Collection[VariantName]) -> tuple[Stage, ...]:
    """The stages that the listed variants take, in the order in which they run."""
    needed = {*EVERY_RUN, *(stage for name in listed for stage in STAGES[name])}
    return tuple(stage for stage in get_args(Stage) if stage in needed)


def round_name(stage: str, number: int) -> str:
    """The stage of a distillation's round before its last."""
    return f"{stage}-round{number}"
