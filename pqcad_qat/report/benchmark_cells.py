"""The rows of a benchmark's tables as texts.

Not here: the tables themselves, on the terminal and on the page (benchmark_page.py).
"""

from __future__ import annotations

from collections import Counter

from pqcad_qat.policy.variants import REFERENCE, spec_of
from pqcad_qat.report.benchmark_record import ColdStart, LoadTime, Measurement, SpeedReport, SpeedRow
from pqcad_qat.report.page import TIMES, UNKNOWN, number_text
from pqcad_qat.report.record import UNSTEADY, Throughput, Timing, steps_text

RATIO = f"ours / this, {TIMES}"
"""Heading of the ratio of our figure to a row's."""

HEADINGS = ("", "ms a step", "minimum", "quartiles", "image steps/s", RATIO, "MB", "layers ran in")
"""Headings of the tables of steps; a step is one denoiser call with the whole batch."""


def cells(measurement: Measurement, row: SpeedRow) -> list[str]:
    """Texts of a row, in the order of HEADINGS."""
    latency, rate = row.latency, row.throughput
    spread = f"{number_text(latency.lower_quartile_ms)} - {number_text(latency.upper_quartile_ms)}"
    images = UNKNOWN if rate is None else marked(rate.median, rate)
    numbers = [images, _ratio(_ours(measurement), row), f"{row.size_bytes / 1e6:.2f}"]
    return [
        row.name,
        marked(latency.median_ms, latency),
        number_text(latency.minimum_ms),
        spread,
        *numbers,
        precisions_text(row),
    ]


def marked(value: float, measured: Timing | Throughput) -> str:
    """Text of a measured value, marked if its measurement is unsteady."""
    return _marked(value, measured.unsteady)


def _marked(value: float, unsteady: bool) -> str:
    return f"{number_text(value)} {UNSTEADY}" if unsteady else number_text(value)


def image_headings(report: SpeedReport) -> list[str]:
    """Headings of the tables of whole images; empty if the number of sampling steps is unknown."""
    if report.steps is None:
        return []
    return [
        "",
        f"ms an image, {report.steps} steps each",
        "own steps",
        "ms an image, own steps",
        "images/s, own steps",
        RATIO,
    ]


def image_cells(report: SpeedReport, measurement: Measurement, row: SpeedRow) -> list[str]:
    """Texts of a row, in the order of `image_headings`: an image at our number of sampling steps, and at the
    candidate's own number.
    """
    assert report.steps is not None
    own, unsteady = own_steps(report, row.name), _unsteady(row)
    same = _marked(_call_ms(report, row, report.steps) / measurement.batch, unsteady)
    if own is None:
        return [row.name, same, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]
    in_float = row.float_latency is not None
    steps = steps_text(own, report.float_steps, report.float_calls) if in_float else str(own)
    image, ours = _call_ms(report, row, own), _ours(measurement)
    ratio = UNKNOWN
    if ours is not None and not unsteady and not _unsteady(ours):
        ratio = number_text(_call_ms(report, ours, report.steps) / image)
    return [row.name, same, steps, _marked(image / measurement.batch, unsteady), _rate(report, row, own), ratio]


def _call_ms(report: SpeedReport, row: SpeedRow, steps: int) -> float:
    """Milliseconds of all denoiser calls that take a batch through these sampling steps."""
    if row.float_latency is None:
        return row.latency.median_ms * steps
    in_float = row.float_latency.median_ms * report.float_calls
    return row.latency.median_ms * (steps - report.float_steps) + in_float


def _rate(report: SpeedReport, row: SpeedRow, steps: int) -> str:
    """Text of the images a second under load; unknown where it was not measured."""
    if row.throughput is None:
        return UNKNOWN
    if row.float_latency is None:
        return marked(row.throughput.median / steps, row.throughput)
    if row.float_throughput is None:
        return UNKNOWN
    seconds = (steps - report.float_steps) / row.throughput.median + report.float_calls / row.float_throughput.median
    return _marked(1 / seconds, row.throughput.unsteady or row.float_throughput.unsteady)


def _unsteady(row: SpeedRow) -> bool:
    """Tell whether a time of which an image's is made is unsteady."""
    return row.latency.unsteady or (row.float_latency is not None and row.float_latency.unsteady)


def own_steps(report: SpeedReport, name: str) -> int | None:
    """Number of sampling steps that a candidate takes for an image: the student's for ours, full precision's for the
    others.
    """
    return report.steps if name == report.ours else report.full_precision_steps


def _ratio(ours: SpeedRow | None, row: SpeedRow) -> str:
    """Text of the ratio of our time of a step to a row's; unknown if either time is missing or unsteady."""
    if ours is None or ours.latency.unsteady or row.latency.unsteady:
        return UNKNOWN
    return number_text(ours.latency.median_ms / row.latency.median_ms)


LOADING = ("weights", "MB", "verify, ms", "read and unpack, ms", "compile, ms", "all, ms")
"""Headings of the table of load times."""


def loading_cells(load: LoadTime) -> list[str]:
    """Texts of a row, in the order of LOADING; all times are medians."""
    stages = (load.verify, load.read, load.compile)
    times = [marked(timing.median_ms, timing) for timing in stages]
    return [
        load.weights,
        f"{load.size_bytes / 1e6:.2f}",
        *times,
        number_text(sum(timing.median_ms for timing in stages)),
    ]


def cold_headings(report: SpeedReport) -> tuple[str, ...]:
    """Headings of the table of cold starts."""
    first = "first call" if report.steps is None else "first image"
    return ("", f"ms to the {first}", "quartiles", RATIO, "MB at the peak", RATIO)


def cold_cells(report: SpeedReport, start: ColdStart) -> list[str]:
    """Texts of a row, in the order of `cold_headings`."""
    assert report.cold is not None
    image = start.image
    ours = next((row for row in report.cold.rows if row.name == report.ours), None)
    steady = ours is not None and not image.unsteady and not ours.image.unsteady
    return [
        start.name,
        marked(image.median_ms, image),
        f"{number_text(image.lower_quartile_ms)} - {number_text(image.upper_quartile_ms)}",
        number_text(ours.image.median_ms / image.median_ms) if ours is not None and steady else UNKNOWN,
        f"{start.peak_bytes / 1e6:.0f}",
        UNKNOWN if ours is None else number_text(ours.peak_bytes / start.peak_bytes),
    ]


def precisions_text(row: SpeedRow) -> str:
    """Number of convolutions and linear layers that executed in each precision, such as ``70 u8, 1 bf16``."""
    if not row.layers:
        return "f32" if row.name == REFERENCE else UNKNOWN
    counted = Counter(row.layers.values()).most_common()
    return ", ".join(f"{count} {precision}" for precision, count in counted)


def _ours(measurement: Measurement) -> SpeedRow | None:
    return next((row for row in measurement.rows if spec_of(row.name).deploys), None)
