"""Targets of a run: what the method promises of its variants, beside what was measured.

Not here: the variants' figures (stages/report_rows.py), and how a target is shown (tables.py, page.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pqcad_qat.policy.variants import (
    FIXED_BIT,
    FP32,
    FP32_HALF,
    OV_BF16,
    OV_FP32,
    PQ,
    PQ_DISTILLED,
    PQ_HALF,
    PQCAD,
    PQCAD_OPENVINO,
)
from pqcad_qat.report.record import UNSTEADY, Execution, Parity, Report, Target, VariantRow, target

CLEARLY = 0.95
"""Ratio of two Frechet distances at or below which the first counts as clearly better."""

SAME = 1.02
"""Ratio of two distances or errors at or below which the first counts as no worse."""

LOW_BITS = 3
"""Width in bits below which progressive quantization has to beat fixed-bit training."""

FIGURES = {
    "latency_ms_per_image": "milliseconds an image",
    "fid_real": "Frechet distance to {against}",
    "psnr_fp": "squared error to full precision",
}
"""Mapping from a figure that targets compare to its words; a PSNR is compared as the squared error behind it."""

TIMES = ("latency_ms_per_image",)
"""Keys of FIGURES that are computed from a timing."""

COMPARISONS = (
    (PQCAD_OPENVINO, OV_BF16, "latency_ms_per_image", 0.45),
    (PQCAD_OPENVINO, OV_FP32, "latency_ms_per_image", 0.20),
    (PQCAD_OPENVINO, FP32, "latency_ms_per_image", 0.10),
    (PQCAD, FP32, "fid_real", 1.10),
    (PQCAD, FP32_HALF, "fid_real", CLEARLY),
    (PQCAD, PQ_DISTILLED, "fid_real", CLEARLY),
    (PQ, FIXED_BIT, "fid_real", SAME),
    # beside the distances, since either kind of figure alone can mislead
    (PQCAD, FP32_HALF, "psnr_fp", SAME),
    (PQCAD, PQ_HALF, "psnr_fp", SAME),  # as many denoiser calls, where full precision takes a step in parts
    (PQCAD, PQ_DISTILLED, "psnr_fp", SAME),
    (PQ, FIXED_BIT, "psnr_fp", SAME),
)
"""A variant, the one that it is compared with, the figure, and the largest ratio of the two that holds."""

PACKED = 0.16
"""Largest share of the float32 weights' bytes that all files of the packed folder may take."""


def targets_of(report: Report, variants: Collection[str], packed_bytes: int | None) -> Iterator[Target]:
    """Targets that concern the variants of a run, which its report may lack where the machine cannot run them.

    `packed_bytes` is the size of the packed folder, where there is one.
    """
    if report.execution and report.parity:
        yield from _proven(report.execution, report.parity)
    for name, proof in report.also_deployed.items():
        yield from _proven(proof.execution, proof.parity, f" ({name})")
    rows = {row.name: row for row in report.variants}
    low = min((row.weight_bits for row in report.layers if row.weight_bits is not None), default=8) < LOW_BITS
    for variant, against, figure, bound in COMPARISONS:
        if variant in variants and against in variants and (figure != "fid_real" or report.fid_protocol):
            note = _why_not(report, variant, against, figure=figure)
            measured = None if note else _ratio(rows.get(variant), rows.get(against), figure)
            words = FIGURES[figure].format(against=report.against)
            clearly = low and (variant, figure) == (PQ, "fid_real")
            most = CLEARLY if clearly else bound
            yield target(f"{words}: {variant} / {against}", measured, "<=", most, unit="x", note=note)
    size = rows[FP32].size_bytes if FP32 in rows else None
    if packed_bytes is not None and size:
        yield target("bytes packed, all files / float32 weights", packed_bytes / size, "<=", PACKED, unit="x")


def _proven(execution: Execution, parity: Parity, of: str = "") -> Iterator[Target]:
    yield target(
        f"planned layers that executed in INT8{of}", execution.executed_int8, "==", execution.planned, unit="layers"
    )
    yield target(
        f"layers whose integers equal PyTorch's{of}", parity.layers_exact, "==", parity.layers_checked, unit="layers"
    )


def _why_not(report: Report, variant: str, against: str, *, figure: str) -> str:
    """Reason why two variants cannot be compared; empty if they can."""
    rows = {row.name: row for row in report.variants}
    if against not in rows:
        return "BF16 is not native on this CPU"
    if dead := [name for name in (variant, against) if rows[name].did_not_run]:
        return f"{' and '.join(dead)} did not run"
    unsteady = report.unsteady if figure in TIMES else frozenset()
    if wide := [name for name in (variant, against) if name in unsteady]:
        return f"the times of {' and '.join(wide)} are {UNSTEADY}: their quartiles lie too far apart"
    return ""


def _ratio(variant: VariantRow | None, against: VariantRow | None, figure: str) -> float | None:
    own, other = (None if row is None else getattr(row, figure) for row in (variant, against))
    if own is None or other is None:
        return None
    if figure == "psnr_fp":
        return float(10 ** ((other - own) / 10))
    return float(own / other) if other else None
