"""A benchmark shown on the terminal, as JSON, and as a self-contained page.

Not here: the data (benchmark_record.py), the texts of its rows (benchmark_cells.py), or any measurement
(commands/benchmark.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from rich import box

from pqcad_qat.machine.files import write_file
from pqcad_qat.policy.variants import REFERENCE, spec_of, summary_of
from pqcad_qat.report.benchmark_cells import (
    HEADINGS,
    LOADING,
    cells,
    cold_cells,
    cold_headings,
    image_cells,
    image_headings,
    loading_cells,
)
from pqcad_qat.report.benchmark_record import Measurement, SpeedReport, SpeedRow
from pqcad_qat.report.canvas import COLOURS, Canvas, canvas
from pqcad_qat.report.figures import largest_kinds, time_profile
from pqcad_qat.report.page import UNKNOWN, number_text, page_template
from pqcad_qat.report.record import UNSTEADY_NOTE, Hardware, ProfileRow, steps_text
from pqcad_qat.report.terminal_table import TerminalTable

JSON_FILE, PAGE_FILE = "benchmark.json", "benchmark.html"


def write_speed(report: SpeedReport, folder: Path) -> Path:
    """Write benchmark.json and benchmark.html, each completely or not at all; return the path of the page."""
    write_file(folder / JSON_FILE, json.dumps(asdict(report), indent=1, allow_nan=False, ensure_ascii=False).encode())
    write_file(folder / PAGE_FILE, render(report).encode())
    return folder / PAGE_FILE


def title(report: SpeedReport, measurement: Measurement) -> str:
    """Title of one measurement's table."""
    full = f", full precision {report.full_precision_steps}" if report.full_precision_steps else ""
    own = steps_text(report.steps, report.float_steps, report.float_calls) if report.steps else ""
    image = f"; an image takes ours {own}{full}" if own else ""
    return f"{report.source}: batch {measurement.batch}, {measurement.isa}: one denoising step{image}"


def remarks(measurement: Measurement) -> list[str]:
    """Remarks below a table: planned layers that did not run in INT8, what was not timed, and the meaning of
    unsteady.
    """
    lines = [f"{name}: not timed: {why}" for name, why in measurement.left_out.items()]
    for row in measurement.rows:
        if row.planned is not None:
            done = row.planned - len(row.planned_float)
            missed = (
                f"; not: {', '.join(f'{name} ({row.layers[name]})' for name in row.planned_float)}"
                if row.planned_float
                else ""
            )
            lines.insert(
                0, f"{row.name}: {done} of {row.planned} planned layers and attentions executed in INT8{missed}"
            )
    times = [time for row in measurement.rows for time in (row.throughput, row.float_latency, row.float_throughput)]
    if any(row.latency.unsteady for row in measurement.rows) or any(time and time.unsteady for time in times):
        lines.append(UNSTEADY_NOTE)
    return lines


def machine_text(machine: Hardware) -> str:
    """Text of the CPU, its instruction sets and cores, and the settings that change timings."""
    settings = "".join(f", {name}={value}" for name, value in machine.settings.items())
    return (
        f"{machine.cpu}, {machine.cores} {'core' if machine.cores == 1 else 'cores'}, "
        f"{' '.join(machine.isa) or UNKNOWN}{settings}"
    )


def speed_tables(report: SpeedReport) -> Iterator[TerminalTable]:
    """Tables for the terminal: the timings of each measurement, the time by kind of node, and the times of loading."""
    for measurement in report.measurements:
        caption = "\n".join([machine_text(measurement.hardware), *remarks(measurement)])
        yield _candidates_table(
            title(report, measurement), HEADINGS, [cells(measurement, row) for row in measurement.rows], caption
        )
        if report.steps is not None:
            rows = [image_cells(report, measurement, row) for row in measurement.rows]
            yield _candidates_table("the same, an image", image_headings(report), rows)
        yield _profile_table(measurement)
    if report.cold is not None:
        yield _candidates_table(
            f"{report.source}: batch {report.cold.batch}, each in a process of its own, from its start",
            cold_headings(report),
            [cold_cells(report, start) for start in report.cold.rows],
            "\n".join(f"{name}: not started: {why}" for name, why in report.cold.left_out.items()),
        )
    loading = TerminalTable(*LOADING, title=f"{report.source}: loading", box=box.SIMPLE_HEAD)
    for load in report.loading:
        loading.add_row(*loading_cells(load))
    yield loading


def _candidates_table(
    heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None
) -> TerminalTable:
    table = TerminalTable(title=heading, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row, style="bold" if spec_of(row[0]).deploys else "")
    return table


def _profile_table(measurement: Measurement) -> TerminalTable:
    profiles = _profiles(measurement)
    table = TerminalTable("kind of node", title="milliseconds of a step by kind of node", box=box.SIMPLE_HEAD)
    for name in profiles:
        table.add_column(name, justify="right")
    for kind, spent in kind_milliseconds(profiles).items():
        table.add_row(kind, *(number_text(value) if value else "" for value in spent))
    return table


def kind_milliseconds(profiles: Mapping[str, Sequence[ProfileRow]]) -> dict[str, list[float]]:
    """Kind of node -> milliseconds of each candidate, slowest kinds first; the remaining kinds are summed as
    "other".
    """
    kinds = largest_kinds(profiles)
    spent = {kind: [0.0] * len(profiles) for kind in kinds}
    for column, rows in enumerate(profiles.values()):
        for row in rows:
            spent[row.kind if row.kind in spent else "other"][column] += row.milliseconds
    return spent


def render(report: SpeedReport) -> str:
    """Render the self-contained page."""
    return page_template("benchmark_template.html").render(
        report=report,
        cold=report.cold and (cold_headings(report), [cold_cells(report, start) for start in report.cold.rows]),
        loading=(LOADING, [loading_cells(load) for load in report.loading]),
        sections=[_section(report, index, measurement) for index, measurement in enumerate(report.measurements)],
        variants={row.name: summary_of(row.name) for measurement in report.measurements for row in measurement.rows},
        machine=machine_text(report.measurements[0].hardware),
        versions=report.measurements[0].hardware.versions,
        ours=report.ours,
    )


def _section(report: SpeedReport, index: int, measurement: Measurement) -> dict[str, object]:
    charts = (speed_chart(report, measurement, f"speed{index}"), time_profile(_profiles(measurement), f"time{index}"))
    return {
        "title": f"Batch {measurement.batch}, {measurement.isa}",
        "machine": machine_text(measurement.hardware),
        "tables": [
            (HEADINGS, [cells(measurement, row) for row in measurement.rows]),
            (
                headings := image_headings(report),
                [image_cells(report, measurement, row) for row in measurement.rows if headings],
            ),
        ],
        "remarks": remarks(measurement),
        # this package's own SVG, whose texts canvas.py has escaped
        "charts": [Markup(chart or "") for chart in charts],
        "kernels": {
            row.name: ", ".join(f"{count} {kernel}" for kernel, count in row.kernels.items())
            for row in measurement.rows
            if row.kernels
        },
    }


def speed_chart(report: SpeedReport, measurement: Measurement, name: str) -> str:
    """Chart of the latency of one step with its quartiles, and of throughput where it was measured; one bar a
    candidate.
    """
    rows = measurement.rows
    rates = [row.throughput for row in rows]
    panels = 2 if any(rates) else 1
    with canvas(name, 9.6, 0.9 + 0.3 * len(rows)) as drawn:
        axes = drawn.figure.subplots(1, panels, sharey=True, squeeze=False)[0]
        for place, row in enumerate(rows):
            latency = row.latency
            _bar(
                drawn,
                axes[0],
                place,
                row,
                spread=(latency.median_ms, latency.lower_quartile_ms, latency.upper_quartile_ms),
                unit="ms",
            )
            if row.throughput is not None:
                rate = row.throughput
                _bar(
                    drawn,
                    axes[1],
                    place,
                    row,
                    spread=(rate.median, rate.lower_quartile, rate.upper_quartile),
                    unit="image steps a second",
                )
        axes[0].set_title("ms a step, lower is better")
        if panels == 2:
            axes[1].set_title("image steps/s, higher is better")
        axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        for panel in axes:
            panel.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
            panel.grid(axis="y", visible=False)
        medians = "; ".join(f"{row.name} {number_text(row.latency.median_ms)} ms" for row in rows)
        return drawn.svg(f"{title(report, measurement)}: {medians}")


def _bar(
    drawn: Canvas, axes: Axes, place: int, row: SpeedRow, *, spread: tuple[float, float, float], unit: str
) -> None:
    median, lower, upper = spread
    colour = COLOURS["accent" if spec_of(row.name).deploys else "grey" if row.name == REFERENCE else "blue"]
    bars = axes.barh([place], [median], color=colour, height=0.66)
    drawn.tip(
        bars[0], f"{row.name}: {number_text(median)} {unit}, quartiles {number_text(lower)} to {number_text(upper)}"
    )
    axes.plot([lower, upper], [place, place], color=COLOURS["ink"], lw=1.2)
    axes.annotate(
        number_text(median), (upper, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
    )
    axes.margins(x=0.16)


def _profiles(measurement: Measurement) -> dict[str, tuple[ProfileRow, ...]]:
    return {row.name: row.profile for row in measurement.rows if row.profile}
