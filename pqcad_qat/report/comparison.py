"""Reports of several runs as a table a model: those of other seeds alone as mean and spread; FIDs that do not compare
are refused.

Not here: how the table looks (comparison_page.py), or where the reports lie (report_files.py).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pqcad_qat.errors import StudyError
from pqcad_qat.policy.variants import UNTRAINED, VARIANTS
from pqcad_qat.quality.fid_protocol import FidProtocol
from pqcad_qat.report.record import Report, VariantRow

QUALITY = ("fid_real", "fid_fp", "psnr_fp")
FIGURES = (*QUALITY, "latency_ms_per_image")
PROTOCOL = ("images", "features_sha256", "reference", "sampler", "seed")
"""What has to be equal before two FIDs compare; steps may differ."""

ALL = "all"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: as the user knows it.
        labels: what its rows are called: heading -> text.
        report: that it left.
    """

    path: str
    labels: Mapping[str, str]
    report: Report


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, and the sample standard deviation where there are two or more."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """One variant of the runs that differ in their seed alone."""

    labels: Mapping[str, str]
    variant: str
    weight_bits: float | None
    activation_bits: float | None
    steps: int
    seeds: tuple[int, ...]
    figures: Mapping[str, Spread]  # of FIGURES, those that were measured
    unsteady: bool = False  # the times of one of them at least spread too widely to mean something
    did_not_run: tuple[str, ...] = ()  # why, of those that could not be made or run


@dataclass(frozen=True)
class Part:
    """The rows whose figures compare: those of one full-precision model.

    Attributes:
        model: its source, as the policies name it.
        protocol: of its FIDs; None where none was measured.
    """

    model: str
    protocol: FidProtocol | None
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Comparison:
    """All that a table of runs says."""

    title: str
    headings: tuple[str, ...]  # of the labels
    parts: tuple[Part, ...]
    machines: tuple[str, ...]
    runs: tuple[str, ...]
    command: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of all parts, in order."""
        return tuple(row for part in self.parts for row in part.rows)


def named_runs(reports: Mapping[str, Report]) -> list[Run]:
    """Runs called by the names of their policies, or by their paths where runs of different policies have one name."""
    policies: dict[str, set[str]] = {}
    for report in reports.values():
        policies.setdefault(_name(report), set()).add(_policy(report))
    return [
        Run(path, {"run": path if len(policies[_name(report)]) > 1 else _name(report)}, report)
        for path, report in reports.items()
    ]


def compare_runs(title: str, runs: Sequence[Run], command: str) -> Comparison:
    """A part for every model, in it one row a variant of the runs that differ in their seed alone.

    Raises:
        StudyError: two runs of one model have FIDs of different protocols, or the same policy and seed.
    """
    models: dict[str, list[Run]] = {}
    for run in runs:
        models.setdefault(_model(run.report), []).append(run)
    return Comparison(
        title=title,
        headings=tuple(runs[0].labels) if runs else (),
        parts=tuple(_part(model, found) for model, found in models.items()),
        machines=tuple(dict.fromkeys(run.report.hardware.cpu for run in runs)),
        runs=tuple(run.path for run in runs),
        command=command,
    )


def _part(model: str, runs: Sequence[Run]) -> Part:
    _refuse_other_protocols(runs)
    groups = _groups(runs)
    common = [name for name in UNTRAINED if len(groups) > 1 and _is_one(name, runs)]
    rows = [_row(dict.fromkeys(runs[0].labels, ALL), name, runs) for name in common]
    for group in groups:
        found = {row.name for run in group for row in run.report.variants} - {*common}
        rows += [_row(group[0].labels, name, group) for name in VARIANTS if name in found]
    return Part(model, next((run.report.fid_protocol for run in runs if run.report.fid_protocol), None), tuple(rows))


def _refuse_other_protocols(runs: Sequence[Run]) -> None:
    known = [(run.path, run.report.fid_protocol) for run in runs if run.report.fid_protocol]
    faults = []
    for path, protocol in known[1:]:
        first, reference = known[0]
        differs = [
            f"{key}: {was} and {now}"
            for key in PROTOCOL
            if (was := getattr(reference, key)) != (now := getattr(protocol, key))
        ]
        if differs:
            faults.append(
                f"{first} and {path}: got FIDs of different protocols ({'; '.join(differs)}); allowed one protocol"
            )
    if faults:
        raise StudyError("\n".join(faults))


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((*run.labels.values(), _policy(run.report)), []).append(run)
    return list(groups.values())


def _policy(report: Report) -> str:
    """The policy without its name, its seed, and which variants it makes: what decides a variant's figures."""
    policy: dict[str, Any] = {**report.policy, "name": None}
    for section, key in (("training", "seed"), ("evaluation", "variants")):
        policy[section] = {**policy.get(section, {}), key: None}
    return json.dumps(policy, sort_keys=True)


def _name(report: Report) -> str:
    return str(report.policy.get("name", "run"))


def _model(report: Report) -> str:
    return str(cast(dict[str, Any], report.policy["model"])["source"])


def _variant(run: Run, name: str) -> VariantRow | None:
    return next((row for row in run.report.variants if row.name == name), None)


def _is_one(name: str, runs: Sequence[Run]) -> bool:
    """Every run that has the variant has the same: widths, steps, and figures of quality but for their last digits."""
    rows = [row for run in runs if (row := _variant(run, name))]
    return len(rows) > 1 and all(_alike(row, rows[0]) for row in rows)


def _alike(a: VariantRow, b: VariantRow) -> bool:
    same = (a.weight_bits, a.activation_bits, a.steps) == (b.weight_bits, b.activation_bits, b.steps)
    return same and all(_agree(getattr(a, figure), getattr(b, figure)) for figure in QUALITY)


def _agree(a: float | None, b: float | None) -> bool:
    """Equal but for rounding, which differs with the number of threads."""
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6))


def _row(labels: Mapping[str, str], name: str, runs: Sequence[Run]) -> Row:
    rows = [(run.report.seed, row) for run in runs if (row := _variant(run, name))]
    if name not in UNTRAINED:
        _refuse_twice(name, runs)
    first = rows[0][1]
    figures = {figure: [value for _, row in rows if (value := getattr(row, figure)) is not None] for figure in FIGURES}
    if name in UNTRAINED:  # training seeds do not reach them: one figure, not many that agree
        figures = {
            figure: [min(values)] if values and all(_agree(value, values[0]) for value in values) else values
            for figure, values in figures.items()
        }
    return Row(
        labels=labels,
        variant=name,
        weight_bits=first.weight_bits,
        activation_bits=first.activation_bits,
        steps=first.steps,
        seeds=tuple(sorted({seed for seed, _ in rows})),
        figures={figure: spread(values) for figure, values in figures.items() if values},
        unsteady=any(name in run.report.unsteady for run in runs),
        did_not_run=tuple(sorted({row.did_not_run for _, row in rows if row.did_not_run})),
    )


def _refuse_twice(name: str, runs: Sequence[Run]) -> None:
    """One seed of one policy counts once."""
    first: dict[int, str] = {}
    for run in (run for run in runs if _variant(run, name)):
        other = first.setdefault(run.report.seed, run.path)
        if other != run.path:
            raise StudyError(
                f"{other} and {run.path}: got {name} of the same policy and seed {run.report.seed} twice; allowed once"
            )


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
