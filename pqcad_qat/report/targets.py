"""Targets of a run: what its policy wants of its figures, beside what was measured.

Not here: the targets of a policy (policy/targets.py), the variants' figures (stages/report_rows.py), and how a target
is shown (tables.py, page.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pqcad_qat.policy.targets import METRICS, TargetPolicy, Targets
from pqcad_qat.report.record import UNSTEADY, Execution, Parity, Report, Target, VariantRow, target

PACKED = "packed_bytes"
"""The metric that no row of a report has."""

TIMES = ("ms",)
"""Metrics that are computed from a timing."""

OF_DISTANCES = ("distance", "kid")
"""Metrics that need a feature network."""


def targets_of(
    report: Report, wanted: Targets, variants: Collection[str], packed_bytes: int | None
) -> Iterator[Target]:
    """Yield the proofs of what is deployed, which every run has to pass, and the targets that concern the variants of
    the run. Its report may lack variants that the machine cannot run.

    Args:
        report: the run's report without its targets.
        wanted: targets of its policy.
        variants: the variants that it makes.
        packed_bytes: size of the packed folder; None where there is none.
    """
    if report.execution and report.parity:
        yield from _proven(report.execution, report.parity)
    for name, proof in report.also_deployed.items():
        yield from _proven(proof.execution, proof.parity, f" ({name})")
    for goal in wanted.values():
        concerned = {goal.variant, goal.against or goal.variant}
        if concerned <= {*variants} and (goal.metric not in OF_DISTANCES or report.fid_protocol):
            yield _judged(report, goal, packed_bytes)


def _proven(execution: Execution, parity: Parity, of: str = "") -> Iterator[Target]:
    yield target(
        f"planned layers that executed in INT8{of}", execution.executed_int8, "==", execution.planned, unit="layers"
    )
    yield target(
        f"layers whose integers equal PyTorch's{of}", parity.layers_exact, "==", parity.layers_checked, unit="layers"
    )


def _judged(report: Report, goal: TargetPolicy, packed_bytes: int | None) -> Target:
    """A target with what was measured, or why nothing was."""
    metric, note = METRICS[goal.metric], _why_not(report, goal)
    rows = {row.name: row for row in report.variants}
    measured = None if note else _measured(rows, goal, packed_bytes)
    words = metric.words.format(against=report.against)
    sign = "-" if metric.subtracted else "/"
    compared = goal.variant if goal.against is None else f"{goal.variant} {sign} {goal.against}"
    unit = "x" if goal.against is not None and not metric.subtracted else metric.unit
    if goal.at_most is not None:
        return target(f"{words}: {compared}", measured, "<=", goal.at_most, unit=unit, note=note)
    assert goal.at_least is not None
    return target(f"{words}: {compared}", measured, ">=", goal.at_least, unit=unit, note=note)


def _why_not(report: Report, goal: TargetPolicy) -> str:
    """Reason why a target cannot be judged; empty if it can."""
    rows, names = {row.name: row for row in report.variants}, dict.fromkeys((goal.variant, goal.against))
    concerned = [name for name in names if name is not None]
    if absent := [name for name in concerned if name not in rows]:
        return f"the arithmetic of {absent[0]} is not native on this CPU"
    if dead := [name for name in concerned if rows[name].did_not_run]:
        return f"{' and '.join(dead)} did not run"
    unsteady = report.unsteady if goal.metric in TIMES else frozenset()
    if wide := [name for name in concerned if name in unsteady]:
        return f"the times of {' and '.join(wide)} are {UNSTEADY}: their quartiles lie too far apart"
    return ""


def _measured(rows: dict[str, VariantRow], goal: TargetPolicy, packed_bytes: int | None) -> float | None:
    """A figure, or its difference from another variant's, or their ratio; None where one is unknown."""
    metric = METRICS[goal.metric]
    own = packed_bytes if goal.metric == PACKED else getattr(rows[goal.variant], metric.field)
    if goal.against is None or own is None:
        return None if own is None else float(own)
    other = getattr(rows[goal.against], metric.field)
    if other is None:
        return None
    if metric.subtracted:
        return float(own - other)
    return float(own / other) if other else None
