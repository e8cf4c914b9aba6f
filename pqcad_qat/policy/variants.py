"""The table of variants, the rows of every report: all facts about each, and the stages that it needs.

Not here: the work of the stages (stages/), or the figures of a row (stages/report_rows.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

FP32: Final = "fp32"
FP32_HALF: Final = "fp32-half"
OV_FP32: Final = "ov-fp32"
OV_BF16: Final = "ov-bf16"
NNCF_INT8: Final = "nncf-int8"
PTQ: Final = "ptq"
FIXED_BIT: Final = "fixed-bit"
PQ: Final = "pq"
PQ_HALF: Final = "pq-half"
PQ_DISTILLED: Final = "pq-distilled"
PQCAD: Final = "pqcad"
PTQ_OPENVINO: Final = "ptq-openvino"
FIXED_BIT_OPENVINO: Final = "fixed-bit-openvino"
PQ_OPENVINO: Final = "pq-openvino"
PQ_DISTILLED_OPENVINO: Final = "pq-distilled-openvino"
PQCAD_OPENVINO: Final = "pqcad-openvino"
"""Names of the variants, which VARIANTS describes."""

REFERENCE: Final = FP32
"""Variant that every run makes, with which the others are compared."""

QUANTIZATION_AWARE: Final = (PQ, FIXED_BIT)
"""Stages that train against the full-precision prediction, each named like the variant that it makes."""

STUDENTS: Final = (PQ_DISTILLED, PQCAD)
"""Stages that distill, each named like the variant that it makes."""

FLOAT_STEPS: Final = "float-steps"
"""Stage that finds how many first steps of quantized variants full precision computes."""

STEP_COSTS: Final = "step-costs"
"""Stage that measures what an error at each sampling step costs; training weighs its states by it."""

WIDTHS: Final = "widths"
"""Stage that gives each layer its width by measurement, for policies that ask for a quality or a size."""

TRAINED: Final = (*QUANTIZATION_AWARE, *STUDENTS)
"""Stages that train."""

DEPLOYED: Final = {
    PTQ: PTQ_OPENVINO,
    FIXED_BIT: FIXED_BIT_OPENVINO,
    PQ: PQ_OPENVINO,
    PQ_DISTILLED: PQ_DISTILLED_OPENVINO,
    PQCAD: PQCAD_OPENVINO,
}
"""Variant that can be deployed -> the variant that its deployed folder is."""


def exporting(variant: str) -> str:
    """Name of the stage that deploys a variant, one of the keys of DEPLOYED."""
    return f"export-{variant}"


EVERY_RUN: Final = ("calibration", "samples", "evaluation")
"""Stages that every run needs."""

STAGES: Final = (
    "calibration",
    FLOAT_STEPS,
    STEP_COSTS,
    WIDTHS,
    PTQ,
    *QUANTIZATION_AWARE,
    "teacher",
    *STUDENTS,
    *map(exporting, DEPLOYED),
    "baselines",
    "benchmark",
    "samples",
    "evaluation",
)
"""All stages, in the order in which they run."""

PYTORCH: Final = "PyTorch"
SIMULATED: Final = "PyTorch, simulated"
OPENVINO: Final = "OpenVINO"
"""Names of the runtimes that compute variants."""

IN_INT8: Final = "OpenVINO INT8"
"""What computed the images of a simulated variant that sampled from an INT8 graph of its own."""


@dataclass(frozen=True)
class VariantSpec:
    """A variant: one way to get images, or only the time of a sampling step, from the model.

    Attributes:
        name: name in policies and reports.
        summary: short description.
        runtime: what computes it. "simulated" is floating-point arithmetic restricted to the values of the quantizers.
        weights_from: stage that produces its weights; None for the unchanged weights of the full-precision model.
        bits: widths of its weights and of its inputs; None where the policy decides them.
        student_steps: whether it samples in the student's steps rather than in the teacher's.
        stages: stages that it needs beside those of every run, in any order.
        sampled: whether images are sampled from it, rather than only its time measured.
        file: folder, relative to the run's, of the model that OpenVINO runs; None also for what is deployed, whose
            folder depends on what else is (Policy.folder_of).
        precision: floating-point precision requested from OpenVINO; None for OpenVINO's own choice.
        deploys: variant that is deployed as this one.
        shown_with: variants that stand beside this deployed one where a policy lists none.
        baseline: name in headlines that compare the deployed variant with it.
        colour: colour of its points in charts of several runs, a key of report.canvas.COLOURS.
    """

    name: str
    summary: str
    runtime: Literal["PyTorch", "PyTorch, simulated", "OpenVINO"]  # one of PYTORCH, SIMULATED, OPENVINO
    weights_from: str | None
    bits: tuple[float, float] | None = None
    student_steps: bool = False
    stages: tuple[str, ...] = ()
    sampled: bool = True
    file: str | None = None
    precision: Literal["f32", "bf16"] | None = None
    deploys: str | None = None
    shown_with: tuple[str, ...] = ()
    baseline: str = ""
    colour: str = "grey"

    @property
    def timed_as(self) -> str:
        """Variant whose step time is used for it. In PyTorch at full precision the network is the same for any number
        of steps.
        """
        return REFERENCE if self.runtime == PYTORCH else self.name

    @property
    def quantized(self) -> bool:
        """Whether it computes in integers, or as if it did; full precision may then compute its first steps."""
        return self.bits is None or max(self.bits) <= 8

    @property
    def distilled(self) -> bool:
        """Whether its weights are those of a distilled student."""
        return "teacher" in self.stages


_FLOAT, _BASELINES = (32, 32), ("baselines", "benchmark")


def _deployed(variant: str, *, shown_with: tuple[str, ...], colour: str, stages: tuple[str, ...] = ()) -> VariantSpec:
    """The deployed form of a variant, which other stages than its export have made."""
    return VariantSpec(
        name=DEPLOYED[variant],
        summary=f"{variant} exported and executed by OpenVINO in INT8",
        runtime=OPENVINO,
        weights_from=exporting(variant),
        student_steps=variant in STUDENTS,
        stages=(*stages, exporting(variant), "benchmark"),
        deploys=variant,
        shown_with=shown_with,
        colour=colour,
    )


VARIANTS: Mapping[str, VariantSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (  # in the order of the tables
            VariantSpec(
                name=FP32,
                summary="full precision, all steps",
                runtime=PYTORCH,
                weights_from=None,
                bits=_FLOAT,
                baseline="PyTorch FP32",
            ),
            VariantSpec(
                name=FP32_HALF,
                summary="full precision at half the steps, not distilled",
                runtime=PYTORCH,
                weights_from=None,
                bits=_FLOAT,
                student_steps=True,
            ),
            VariantSpec(
                name=OV_FP32,
                summary="full precision compiled by OpenVINO, float32 kernels",
                runtime=OPENVINO,
                weights_from="baselines",
                bits=_FLOAT,
                stages=_BASELINES,
                sampled=False,  # its images would be those of fp32
                file="baselines/float",
                precision="f32",
                baseline="OpenVINO FP32",
            ),
            VariantSpec(
                name=OV_BF16,
                summary="full precision compiled by OpenVINO, bfloat16 kernels",
                runtime=OPENVINO,
                weights_from="baselines",
                bits=(16, 16),
                stages=_BASELINES,
                sampled=False,
                file="baselines/float",
                precision="bf16",
                baseline="OpenVINO BF16",
            ),
            VariantSpec(
                name=NNCF_INT8,
                summary="post-training INT8 by NNCF, all steps",
                runtime=OPENVINO,
                weights_from="baselines",
                bits=(8, 8),
                stages=_BASELINES,
                file="baselines/nncf",
            ),
            VariantSpec(
                name=PTQ,
                summary="post-training quantization by ours: calibrated and rounded to the target widths, not trained",
                runtime=SIMULATED,
                weights_from=PTQ,
                stages=(PTQ,),
                colour="amber",
            ),
            VariantSpec(
                name=FIXED_BIT,
                summary="quantization-aware training at one fixed width",
                runtime=SIMULATED,
                weights_from=FIXED_BIT,
                stages=(FIXED_BIT,),
                colour="violet",
            ),
            VariantSpec(
                name=PQ,
                summary="progressive quantization",
                runtime=SIMULATED,
                weights_from=PQ,
                stages=(PQ,),
                colour="accent",
            ),
            VariantSpec(
                name=PQ_HALF,
                summary="progressive quantization at half the steps, not distilled",
                runtime=SIMULATED,
                weights_from=PQ,
                student_steps=True,
                stages=(PQ,),
            ),
            VariantSpec(
                name=PQ_DISTILLED,
                summary="progressive quantization, then distillation without calibration targets",
                runtime=SIMULATED,
                weights_from=PQ_DISTILLED,
                student_steps=True,
                stages=(PQ, "teacher", PQ_DISTILLED),
                colour="rose",
            ),
            VariantSpec(
                name=PQCAD,
                summary="progressive quantization, then calibration-assisted distillation",
                runtime=SIMULATED,
                weights_from=PQCAD,
                student_steps=True,
                stages=(PQ, "teacher", PQCAD),
                colour="blue",
            ),
            _deployed(PTQ, shown_with=(PTQ,), stages=(PTQ,), colour="amber"),
            _deployed(FIXED_BIT, shown_with=(PTQ, FIXED_BIT), stages=(FIXED_BIT,), colour="violet"),
            _deployed(PQ, shown_with=(PTQ, PQ), stages=(PQ,), colour="accent"),
            _deployed(
                PQ_DISTILLED,
                shown_with=(FP32_HALF, PTQ, PQ, PQ_HALF, PQ_DISTILLED),
                stages=(PQ, "teacher", PQ_DISTILLED),
                colour="rose",
            ),
            _deployed(
                PQCAD,
                # and every other way to its widths and steps
                shown_with=(FP32_HALF, PTQ, FIXED_BIT, PQ, PQ_HALF, PQ_DISTILLED, PQCAD),
                stages=(PQ, "teacher", PQCAD),
                colour="blue",
            ),
        )
    }
)
"""All variants by name, in the order of the tables."""

if TYPE_CHECKING:
    VariantName = str
    DeployedName = str
else:
    VariantName = Literal[tuple(VARIANTS)]
    DeployedName = Literal[tuple(DEPLOYED)]
"""Names that a policy may list, and those of what it may deploy."""

BASELINES: Final = (FP32, OV_FP32, OV_BF16, NNCF_INT8)
"""Variants of every policy that lists none."""

UNTRAINED: Final = tuple(spec.name for spec in VARIANTS.values() if spec.bits is not None)
"""Variants that are not trained and have the widths of their own kind, whatever the policy says. Runs with one model,
one calibration set and equal float steps share them.
"""


def spec_of(row: str) -> VariantSpec:
    """Return the variant of a row; rows of one variant in several settings are called NAME SETTING."""
    return VARIANTS[row.partition(" ")[0]]


def summary_of(name: str) -> str:
    """Return the summary of a row's variant; empty for a name that no run makes."""
    return spec_of(name).summary if name.partition(" ")[0] in VARIANTS else ""


def default_variants(deployed: Collection[str]) -> tuple[str, ...]:
    """Return the variants of a policy that lists none and deploys these."""
    rows = {*BASELINES, *(DEPLOYED[name] for name in deployed)}
    rows |= {shown for name in deployed for shown in VARIANTS[DEPLOYED[name]].shown_with}
    return run_variants(rows)


def run_variants(listed: Collection[str]) -> tuple[str, ...]:
    """Return the variants that a run makes where a policy lists these, in the order of its tables."""
    return tuple(name for name in VARIANTS if name == REFERENCE or name in listed)


def stages_of(listed: Collection[str]) -> tuple[str, ...]:
    """Return the stages that the listed variants need, in the order in which they run.

    WIDTHS is not among them: it depends on what the policy asks for.
    """
    needed = {*EVERY_RUN, *(stage for name in listed for stage in VARIANTS[name].stages)}
    if any(VARIANTS[name].quantized for name in listed):
        needed.add(FLOAT_STEPS)
    if not needed.isdisjoint(TRAINED):
        needed |= {STEP_COSTS, PTQ}
    return tuple(stage for stage in STAGES if stage in needed)
