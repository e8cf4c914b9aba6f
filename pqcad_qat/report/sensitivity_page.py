"""The record of the command `sensitivity`, and its display on the terminal, as JSON, and as a self-contained page.

Not here: the measurement (quantization/layer_sensitivity.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup
from matplotlib.patches import Rectangle

from pqcad_qat.machine.files import write_file
from pqcad_qat.quantization.layer_sensitivity import LayerSensitivity
from pqcad_qat.report.canvas import COLOURS, canvas
from pqcad_qat.report.page import TIMES, number_text, page_template
from pqcad_qat.report.terminal_table import TerminalTable

SCHEMA_VERSION = 1
JSON_FILE, PAGE_FILE = "sensitivity.json", "sensitivity.html"

SHADES = tuple(COLOURS[f"bits{bits}"] for bits in range(8, 1, -1))
"""Colours of errors, from the smallest error to the largest."""


@dataclass(frozen=True)
class Assignment:
    """Widths of all layers, with the size and the error that they lead to.

    Attributes:
        bits: layer -> width of its weights.
        bytes: bytes of the packed weights.
        predicted: sum of the layers' separate errors.
        error: error measured with all layers quantized at once.
    """

    bits: Mapping[str, int]
    bytes: int
    predicted: float
    error: float


@dataclass(frozen=True)
class SensitivityReport:
    """Everything that was measured.

    Attributes:
        policy, model: names of the policy and the model.
        states: number of states of the calibration set on which errors were measured.
        layers: sensitivity of each layer, in the model's order.
        parameters: layer -> number of parameters.
        full_bytes: bytes of the model in float32.
        budget_bytes: limit that the chosen widths had to keep; None without a limit.
        assignments: name -> assignment; the policy's own widths come first, the chosen ones last.
        command: command that made the report.
    """

    policy: str
    model: str
    states: int
    layers: tuple[LayerSensitivity, ...]
    parameters: Mapping[str, int]
    full_bytes: int
    budget_bytes: int | None
    assignments: Mapping[str, Assignment]
    command: str

    @property
    def widths(self) -> list[int]:
        """Widths in bits that were measured, widest first."""
        return sorted(self.layers[0].weights, reverse=True)

    @property
    def shown(self) -> Assignment:
        """Assignment that table and chart mark: the last one."""
        return list(self.assignments.values())[-1]


def write_sensitivity(report: SensitivityReport, folder: Path) -> Path:
    """Write sensitivity.json and sensitivity.html, each completely or not at all; return the path of the page."""
    document = {"schema_version": SCHEMA_VERSION, **asdict(report)}
    write_file(folder / JSON_FILE, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False).encode())
    write_file(folder / PAGE_FILE, render(report).encode())
    return folder / PAGE_FILE


def decibels(error: float) -> str:
    """Text of a relative squared error in decibels; an error of zero is a dash."""
    return f"{10 * math.log10(error):.1f}" if error > 0 else "\N{EN DASH}"


def headings(report: SensitivityReport) -> list[str]:
    return ["layer", "parameters", "inputs", *(f"{width} bits" for width in report.widths), "gets"]


def cells(report: SensitivityReport, layer: LayerSensitivity) -> list[str]:
    """Texts of a layer, in the order of `headings`; errors are in decibels relative to the output."""
    errors = (decibels(error) for error in (layer.inputs, *(layer.weights[width] for width in report.widths)))
    return [layer.name, f"{report.parameters[layer.name]:,}", *errors, str(report.shown.bits[layer.name])]


def sensitivity_table(report: SensitivityReport) -> TerminalTable:
    """Table of the layers' errors for the terminal."""
    table = TerminalTable(
        title=f"{report.policy}: error of the output in dB, one layer quantized alone", caption_justify="left"
    )
    for heading in headings(report):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in report.layers:
        table.add_row(*cells(report, layer))
    return table


def assignment_table(report: SensitivityReport) -> TerminalTable:
    """Table of the assignments for the terminal."""
    table = TerminalTable(*assignment_headings(report))
    for row in assignment_rows(report):
        table.add_row(*row)
    return table


def assignment_headings(report: SensitivityReport) -> list[str]:
    return ["widths", "mean bits", "MB", f"float32 {TIMES}", "errors summed, dB", "together, dB"]


def assignment_rows(report: SensitivityReport) -> list[list[str]]:
    return [
        [
            name,
            number_text(mean_bits(report, assignment)),
            f"{assignment.bytes / 1e6:.2f}",
            f"{assignment.bytes / report.full_bytes:.3f}",
            decibels(assignment.predicted),
            decibels(assignment.error),
        ]
        for name, assignment in report.assignments.items()
    ]


def mean_bits(report: SensitivityReport, assignment: Assignment) -> float:
    """Mean width in bits of the planned layers, weighted by their numbers of parameters."""
    weighted = sum(width * report.parameters[name] for name, width in assignment.bits.items())
    return weighted / sum(report.parameters[name] for name in assignment.bits)


def render(report: SensitivityReport) -> str:
    """Render the self-contained page."""
    return page_template("sensitivity_template.html").render(
        report=report,
        headings=headings(report),
        rows=[cells(report, layer) for layer in report.layers],
        assignment_headings=assignment_headings(report),
        assignments=assignment_rows(report),
        chart=Markup(sensitivity_chart(report)),  # this package's own SVG, whose texts canvas.py has escaped
    )


def sensitivity_chart(report: SensitivityReport) -> str:
    """Chart with a row for each layer and a column for each width; darker means a larger error, and the assigned width
    is framed.
    """
    errors = [error for layer in report.layers for error in layer.weights.values() if error > 0]
    low, high = (10 * math.log10(extreme) for extreme in (min(errors), max(errors)))
    with canvas("sensitivity", 9.6, 1.0 + 0.19 * len(report.layers)) as drawn:
        axes = drawn.figure.subplots()
        for row, layer in enumerate(report.layers):
            for column, width in enumerate(report.widths):
                error = layer.weights[width]
                share = _share(error, low, high)
                cell = Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, facecolor=SHADES[round(share * (len(SHADES) - 1))], lw=0
                )
                axes.add_patch(cell)
                drawn.tip(cell, f"{layer.name} at {width} bits: {decibels(error)} dB")
            place = report.widths.index(report.shown.bits[layer.name])
            axes.add_patch(Rectangle((place - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS["rose"], lw=1.6))
        axes.set_xlim(-0.5, len(report.widths) - 0.5)
        axes.set_ylim(len(report.layers) - 0.5, -0.5)
        axes.set_xticks(range(len(report.widths)), [f"{width} bits" for width in report.widths])
        axes.set_yticks(range(len(report.layers)), [layer.name for layer in report.layers])
        axes.tick_params(axis="both", length=0, labelsize=8)
        axes.xaxis.tick_top()
        axes.grid(visible=False)
        return drawn.svg(
            f"Error of the output by layer and width, from {low:.0f} dB (light) to {high:.0f} dB (dark), "
            "one layer at a time"
        )


def _share(error: float, low: float, high: float) -> float:
    """Position of an error between the extremes, from 0 to 1 on the decibel scale."""
    return 0.0 if error <= 0 or high <= low else (10 * math.log10(error) - low) / (high - low)
