"""A table of runs on the terminal, as Markdown, and as a self-contained page; and the files that hold it.

Not here: the content of the table (comparison.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.axes import Axes

from pqcad_qat.errors import UsageError
from pqcad_qat.machine.files import write_file
from pqcad_qat.policy.variants import REFERENCE, VARIANTS
from pqcad_qat.quality.fid_protocol import FD, MANY_IMAGES, FidProtocol
from pqcad_qat.report.canvas import COLOURS, Canvas, canvas
from pqcad_qat.report.comparison import ALL, Comparison, Part, Row, Spread
from pqcad_qat.report.page import UNKNOWN, number_text, page_template
from pqcad_qat.report.record import UNSTEADY, UNSTEADY_NOTE
from pqcad_qat.report.report_files import SAMPLES_FILE
from pqcad_qat.report.sample_sheets import file_uri
from pqcad_qat.report.terminal_table import TerminalTable

SCHEMA_VERSION = 2

LARGEST_PICTURES = 8_000_000
"""Most bytes of pictures that are put into a page."""

HEADINGS = {
    "fid_real": "{distance} to {against}",
    "kid_real": "KID to {against}",
    "fid_fp": "{distance} to full precision",
    "clip_score": "CLIP score",
    "psnr_fp": "PSNR to full precision, dB",
    "latency_ms_per_image": "ms an image",
    "size_bytes": "MB",
}
TIME, SIZE = "latency_ms_per_image", "size_bytes"
PANELS = ("fid_real", "psnr_fp")


def write_comparison(comparison: Comparison, page: Path) -> None:
    """Write the page, and beside it the same table as JSON and as Markdown, each completely or not at all."""
    document = {"schema_version": SCHEMA_VERSION, **asdict(comparison)}
    write_file(page.with_suffix(".json"), json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False).encode())
    write_file(page.with_suffix(".md"), markdown(comparison).encode())
    write_file(page, render(comparison, page.parent).encode())


def headings(comparison: Comparison) -> list[str]:
    """Headings of the columns: labels, then what every row has, then the figures that at least one row has."""
    return [
        *comparison.headings,
        "variant",
        "bits W/A",
        "steps",
        "seeds",
        *(heading(figure, comparison.parts) for figure in measured(comparison)),
    ]


def heading(figure: str, parts: Sequence[Part]) -> str:
    """Heading of a figure, which names the Frechet distance if it is the same one in all parts."""
    protocols = [part.protocol for part in parts if part.protocol is not None]
    distances = list(dict.fromkeys(protocol.distance for protocol in protocols)) or [FD]
    against = list(dict.fromkeys(protocol.against for protocol in protocols)) or ["real"]
    return HEADINGS[figure].format(
        distance=distances[0] if len(distances) == 1 else "Frechet distance",
        against=against[0] if len(against) == 1 else "reference",
    )


def measured(comparison: Comparison) -> list[str]:
    return [figure for figure in HEADINGS if any(figure in row.figures for row in comparison.rows)]


def cells(comparison: Comparison, row: Row) -> list[str]:
    """Texts of a row, in the order of `headings`."""
    bits = (
        "" if row.weight_bits is None or row.activation_bits is None else f"{row.weight_bits:g}/{row.activation_bits:g}"
    )
    figures = {figure: spread_text(_shown(figure, row.figures.get(figure))) for figure in measured(comparison)}
    if row.unsteady and figures.get(TIME):
        figures[TIME] += f" {UNSTEADY}"
    variant = f"{row.variant} (did not run)" if row.did_not_run else row.variant
    return [*row.labels.values(), variant, bits, str(row.steps), str(len(row.seeds)), *figures.values()]


def _shown(figure: str, spread: Spread | None) -> Spread | None:
    """A figure in the unit of its heading: sizes are in megabytes."""
    if spread is None or figure != SIZE:
        return spread
    return replace(spread, mean=spread.mean / 1e6, deviation=spread.deviation and spread.deviation / 1e6)


def remarks(part: Part) -> list[str]:
    """Remarks below a table: what did not run and why, and the meaning of unsteady."""
    lines = [f"{_label(row)} did not run: {why}" for row in part.rows for why in row.did_not_run]
    return lines + [UNSTEADY_NOTE] * any(row.unsteady and TIME in row.figures for row in part.rows)


def spread_text(spread: Spread | None) -> str:
    """Text such as ``3.74 ± 0.05``, with as many decimals in the deviation as in the mean."""
    if spread is None:
        return ""
    mean = number_text(spread.mean)
    if spread.deviation is None:
        return mean
    if "e" in mean:
        return f"{mean} ± {spread.deviation:.1e}"
    return f"{mean} ± {spread.deviation:.{len(mean.partition('.')[2])}f}"


def protocol_text(protocol: FidProtocol | None) -> str:
    """Sentences on how Frechet distances were measured."""
    if protocol is None:
        return "No Frechet distance was measured."
    few = (
        f" Fewer than the customary {MANY_IMAGES:,} images: they compare with one another only."
        if protocol.under_10000
        else ""
    )
    text = (
        f"{protocol.distance}: Frechet distance of {protocol.images:,} images (noise seed {protocol.seed}, sampler "
        f"{protocol.sampler}) to "
        f"{protocol.reference or 'nothing real'}, through the feature network {protocol.features} (sha256 "
        f"{protocol.features_sha256}).{few} PSNR: against the full-precision images of the same noise. "
        "±: standard deviation over training seeds."
    )
    text += f" {protocol.floor_text}" if protocol.floor else ""
    return re.sub(r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1", text)


def part_title(comparison: Comparison, part: Part) -> str:
    """Title of the comparison, with the model's name if there are several models."""
    return comparison.title if len(comparison.parts) == 1 else f"{comparison.title}: {part.model}"


def comparison_tables(comparison: Comparison) -> Iterator[TerminalTable | str]:
    """For every part, its table for the terminal, then its remarks and protocol."""
    for part in comparison.parts:
        table = TerminalTable(*headings(comparison), title=part_title(comparison, part))
        for row in part.rows:
            table.add_row(*cells(comparison, row))
        yield table
        yield " ".join([*remarks(part), protocol_text(part.protocol)])


def markdown(comparison: Comparison) -> str:
    """Markdown of the comparison: the command that made it, then the table and protocol of each part."""
    titles = headings(comparison)
    texts = [f"From `{comparison.command}`:"]
    for part in comparison.parts:
        lines = [titles, ["---"] * len(titles), *(cells(comparison, row) for row in part.rows)]
        texts += ["\n".join(f"| {' | '.join(line)} |" for line in lines), *remarks(part), protocol_text(part.protocol)]
    return "\n\n".join(texts) + "\n"


def with_section(text: str, name: str, section: str) -> str:
    """Replace the section between the markers of this name in a Markdown page, or append it at the end.

    Raises:
        UsageError: the page has one marker without the other, or has one twice.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    if begin not in text and end not in text:
        return f"{text.rstrip()}\n\n## {name}\n\n{begin}{section}{end}".lstrip()
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise UsageError(
            f"got a page with one of the lines {begin.strip()} and {end.strip()}; allowed both once, or none"
        )
    before, rest = text.split(begin)
    return before + begin + section + end + rest.split(end)[1]


def render(comparison: Comparison, beside: Path = Path()) -> str:
    """Render the page, which will lie in the folder `beside`, with the pictures that the runs have left.

    It needs no other file, unless the pictures are so large that it refers to them instead.
    """
    return page_template("comparison_template.html").render(
        comparison=comparison,
        headings=_figures_first(headings(comparison), comparison),
        labels=len(comparison.headings) + 1,
        count=len(comparison.rows),
        parts=[_part_context(comparison, part) for part in comparison.parts],
        variants={
            name: spec.summary for name, spec in VARIANTS.items() if any(row.variant == name for row in comparison.rows)
        },
        pictures=_pictures(comparison, beside),
        unknown=UNKNOWN,
    )


def _pictures(comparison: Comparison, beside: Path) -> dict[str, str]:
    """Run -> address of its pictures, for the runs that have some."""
    files = {run: file for run in comparison.runs if (file := Path(run) / SAMPLES_FILE).is_file()}
    if sum(file.stat().st_size for file in files.values()) <= LARGEST_PICTURES:
        return {run: file_uri(file) for run, file in files.items()}
    return {run: quote(os.path.relpath(file, beside)) for run, file in files.items()}


def _figures_first(texts: list[str], comparison: Comparison) -> list[str]:
    """Put the figures of a row before its widths, steps and seeds: on a narrow screen the first columns are seen."""
    labels = len(comparison.headings) + 1
    facts = len(texts) - len(measured(comparison)) - labels
    return [*texts[:labels], *texts[labels + facts :], *texts[labels : labels + facts]]


def _part_context(comparison: Comparison, part: Part) -> dict[str, object]:
    """Values that the page's template reads for a part."""
    return {
        "model": part.model,
        "rows": [_figures_first(cells(comparison, row), comparison) for row in part.rows],
        "remarks": remarks(part),
        "protocol": protocol_text(part.protocol),
        "distance": FD if part.protocol is None else part.protocol.distance,
        "few_images": part.protocol is not None and part.protocol.under_10000,
        "chart": Markup(figure_chart(part) or ""),  # this package's own SVG, whose texts canvas.py has escaped
    }


def figure_chart(part: Part) -> str | None:
    """Chart of Frechet distance and PSNR of every row, as means with their spread; None if neither was measured."""
    rows = part.rows
    panels = [figure for figure in PANELS if any(figure in row.figures for row in rows)]
    if not panels:
        return None
    with canvas("runs", 9.6, 1.1 + 0.24 * len(rows)) as drawn:
        axes = drawn.figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, figure in zip(axes, panels, strict=True):
            _draw_figure(drawn, panel, figure, part)
        telling = [key for key in rows[0].labels if len({row.labels[key] for row in rows} - {ALL}) > 1]
        axes[0].set_yticks(range(len(rows)), [_label(row, telling) for row in rows])
        axes[0].tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        return drawn.svg(
            f"{' and '.join(heading(figure, [part]) for figure in panels)}: {'; '.join(_told(rows, panels[0]))}"
        )


def _draw_figure(drawn: Canvas, axes: Axes, figure: str, part: Part) -> None:
    rows, title = part.rows, heading(figure, [part])
    reference = next(
        (row.figures[figure].mean for row in rows if row.variant == REFERENCE and figure in row.figures), None
    )
    if reference is not None:
        axes.axvline(reference, color=COLOURS["muted"], lw=0.9, ls=(0, (4, 3)))
    for place, row in enumerate(rows):
        if figure not in row.figures:
            continue
        spread = row.figures[figure]
        colour = COLOURS[VARIANTS[row.variant].colour if row.variant in VARIANTS else "grey"]
        axes.plot(
            [spread.mean - (spread.deviation or 0), spread.mean + (spread.deviation or 0)],
            [place, place],
            color=colour,
            lw=2,
        )
        (point,) = axes.plot([spread.mean], [place], "o", ms=6, color=colour)
        drawn.tip(point, f"{_label(row)}: {title} {spread_text(spread)}, n = {spread.count}")
    axes.set_title(title)


def _label(row: Row, keys: Collection[str] | None = None) -> str:
    """Variant and labels of a row, or only the labels in ``keys``, since labels shared by all rows are useless beside
    an axis.
    """
    labels = [label for key, label in row.labels.items() if keys is None or key in keys]
    return ", ".join([*([ALL] if labels and set(labels) == {ALL} else labels), row.variant])


def _told(rows: Sequence[Row], figure: str) -> Iterator[str]:
    return (f"{_label(row)} {spread_text(row.figures[figure])}" for row in rows if figure in row.figures)
