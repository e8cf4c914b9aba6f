"""Reports of several runs as one table for each model. Runs that differ only in their seed become a mean and a spread;
Frechet distances of different protocols are refused.

Not here: how the table looks (comparison_page.py), or where the reports are stored (report_files.py).
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
FIGURES = (*QUALITY, "kid_real", "clip_score", "latency_ms_per_image", "size_bytes")
PROTOCOL = ("images", "features_sha256", "reference", "sampler", "seed")
"""Fields of the protocol that must be equal for two Frechet distances to be compared; steps may differ."""

ALL = "all"
"""Label of a row that stands for all runs of its model."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: folder as the user named it.
        labels: heading -> text that identifies the run's rows.
        report: report of the run.
    """

    path: str
    labels: Mapping[str, str]
    report: Report


@dataclass(frozen=True)
class Spread:
    """Mean of a figure over seeds, and its sample standard deviation if there are two or more values."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """One variant of the runs that differ only in their seed."""

    labels: Mapping[str, str]
    variant: str
    weight_bits: float | None
    activation_bits: float | None
    steps: int
    seeds: tuple[int, ...]
    figures: Mapping[str, Spread]  # key of FIGURES -> spread, for the figures that were measured
    unsteady: bool = False  # whether the times of at least one run are unsteady
    did_not_run: tuple[str, ...] = ()  # reasons of the runs in which the variant could not be made or run


@dataclass(frozen=True)
class Part:
    """Rows of one full-precision model, whose figures can be compared.

    Attributes:
        model: source of the model, as the policies name it.
        protocol: protocol of its Frechet distances; None if none was measured.
        rows: rows in the order of the table.
    """

    model: str
    protocol: FidProtocol | None
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that a table of runs shows."""

    title: str
    headings: tuple[str, ...]  # headings of the labels
    parts: tuple[Part, ...]
    machines: tuple[str, ...]
    runs: tuple[str, ...]
    command: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """Rows of all parts, in order."""
        return tuple(row for part in self.parts for row in part.rows)


def named_runs(reports: Mapping[str, Report]) -> list[Run]:
    """Name runs after their policies, or by their paths if different policies have the same name."""
    policies: dict[str, set[str]] = {}
    for report in reports.values():
        policies.setdefault(_name(report), set()).add(_policy(report))
    return [
        Run(path, {"run": path if len(policies[_name(report)]) > 1 else _name(report)}, report)
        for path, report in reports.items()
    ]


def compare_runs(title: str, runs: Sequence[Run], command: str) -> Comparison:
    """Compare runs: one part for each model, with one row for each variant of the runs that differ only in their seed.

    Raises:
        StudyError: two runs of one model have distances of different protocols, scores by different CLIP models, or the
            same policy and seed.
    """
    models: dict[str, list[Run]] = {}
    for run in runs:
        models.setdefault(_model(run.report), []).append(run)
    return Comparison(
        title=title,
        headings=tuple(runs[0].labels) if runs else (),
        parts=tuple(_part(model, group) for model, group in models.items()),
        machines=tuple(dict.fromkeys(run.report.hardware.cpu for run in runs)),
        runs=tuple(run.path for run in runs),
        command=command,
    )


def _part(model: str, runs: Sequence[Run]) -> Part:
    _refuse_other_protocols(runs)
    groups = _groups(runs)
    # Variants without training that are the same in all groups get one row for the whole part.
    common = [name for name in UNTRAINED if len(groups) > 1 and _is_one(name, runs)]
    rows = [_row(dict.fromkeys(runs[0].labels, ALL), name, runs) for name in common]
    for group in groups:
        remaining = {row.name for run in group for row in run.report.variants} - {*common}
        rows += [_row(group[0].labels, name, group) for name in VARIANTS if name in remaining]
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
                f"{first} and {path}: got distances of different protocols ({'; '.join(differs)}); allowed one protocol"
            )
    clips = [(run.path, run.report.clip) for run in runs if run.report.clip]
    faults += [
        f"{clips[0][0]} and {path}: got CLIP scores by {clips[0][1]} and {clip}; allowed one CLIP model"
        for path, clip in clips
        if clip != clips[0][1]
    ]
    if faults:
        raise StudyError("\n".join(faults))


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((*run.labels.values(), _policy(run.report)), []).append(run)
    return list(groups.values())


def _policy(report: Report) -> str:
    """Policy as JSON without its name, its seed and what it makes and deploys: what determines a variant's figures."""
    policy: dict[str, Any] = {**report.policy, "name": None, "deploy": None}
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
    """Tell whether all runs that have the variant agree on it: widths, steps, and figures of quality up to rounding."""
    rows = [row for run in runs if (row := _variant(run, name))]
    return len(rows) > 1 and all(_alike(row, rows[0]) for row in rows)


def _alike(a: VariantRow, b: VariantRow) -> bool:
    same = (a.weight_bits, a.activation_bits, a.steps) == (b.weight_bits, b.activation_bits, b.steps)
    return same and all(_agree(getattr(a, figure), getattr(b, figure)) for figure in QUALITY)


def _agree(a: float | None, b: float | None) -> bool:
    """Tell whether two values are equal up to rounding, which differs with the number of threads."""
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6))


def _row(labels: Mapping[str, str], name: str, runs: Sequence[Run]) -> Row:
    rows = [(run.report.seed, row) for run in runs if (row := _variant(run, name))]
    if name not in UNTRAINED:
        _refuse_twice(name, runs)
    first = rows[0][1]
    figures = {figure: [value for _, row in rows if (value := getattr(row, figure)) is not None] for figure in FIGURES}
    if name in UNTRAINED:  # Training seeds do not affect these variants: report one value, not several equal ones.
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
    """Raise StudyError if one policy and seed occurs twice."""
    first: dict[int, str] = {}
    for run in (run for run in runs if _variant(run, name)):
        earlier = first.setdefault(run.report.seed, run.path)
        if earlier != run.path:
            raise StudyError(
                f"{earlier} and {run.path}: got {name} of one policy and seed {run.report.seed} twice; allowed once"
            )


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
