"""Tables that commands show on a terminal: plans, results, cells of a study, costs of training steps and of rehearsals.

Not here: tables that a page shows too (comparison_page.py, benchmark_page.py, sensitivity_page.py), the table of
policies (policies_table.py), and how a table fits a terminal (terminal_table.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.text import Text
from torch import nn

from pqcad_qat.export.execution import INT8
from pqcad_qat.policy.variants import FIXED_BIT, PQ
from pqcad_qat.quality.fid_protocol import error_text
from pqcad_qat.quantization.plan import LayerPlan, quantizer_words
from pqcad_qat.quantization.plan_facts import executes_int8, expected_bytes, float_layers
from pqcad_qat.quantization.quantizable_layers import float_kind, parameter_count
from pqcad_qat.report.record import UNSTEADY, UNSTEADY_NOTE, Report
from pqcad_qat.report.rehearsal_record import Rehearsal
from pqcad_qat.report.run_preview import KEPT, RunPreview, bytes_wanted, time_ahead
from pqcad_qat.report.terminal_table import TerminalTable
from pqcad_qat.report.width_choice import choice_text
from pqcad_qat.training.step_profile import PARTS, StepProfile

PROFILED = {
    "float": "floating point",
    FIXED_BIT: "target widths",
    PQ: "between two widths",
}
"""Mapping from a candidate of the command `profile` to what its layers compute with."""


@dataclass(frozen=True)
class CellState:
    """One cell of a study: its work and its progress.

    Attributes:
        name: name of the cell.
        variants: variants that it makes.
        trains: its training stages.
        steps: number of training steps of all its stages.
        state: progress, one of new, begun and finished.
        automatic: whether a stage finds its number of steps by itself, so that `steps` is the largest number.
    """

    name: str
    variants: tuple[str, ...]
    trains: tuple[str, ...]
    steps: int
    state: str
    automatic: bool = False


def plan_table(plan: Sequence[LayerPlan], model: nn.Module) -> TerminalTable:
    """Table of every layer with its rule, widths and parameters, and below it the rules in words and the
    model's sizes.
    """
    table = TerminalTable(
        title=f"{len(plan)} layers quantized",
        caption=_plan_caption(plan, model),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("layer", "rule", "weights", "inputs", "runs in"):
        table.add_column(heading)
    table.add_column("parameters", justify="right")
    for layer in plan:
        shared = "" if layer.input_group == layer.name else f" of {layer.input_group.rpartition('.')[2]}"
        runs = "INT8" if executes_int8(layer) else ("float, exception" if layer.int8_exception else "float, simulated")
        widths = ">".join(map(str, layer.ladder))
        cells = (layer.name, layer.rule, widths, f"{layer.inputs.bits}{shared}", runs, f"{layer.parameters:,}")
        table.add_row(*map(Text, cells))
    for name in float_layers(model, plan):
        module = model.get_submodule(name)
        runs, count = f"float, {float_kind(module)}", f"{parameter_count(module):,}"
        table.add_row(*map(Text, (name, "-", "float", "float", runs, count)), style="dim")
    return table


def plan_text(plan: Sequence[LayerPlan], model: nn.Module) -> str:
    """Return the table of `plan_table` as plain text."""
    console = Console(file=io.StringIO(), width=160, markup=False)
    with console.capture() as captured:
        console.print(plan_table(plan, model))
    return captured.get()


def _plan_caption(plan: Sequence[LayerPlan], model: nn.Module) -> str:
    lines = []
    for name, pattern, weights, inputs in dict.fromkeys((p.rule, p.pattern, p.weights, p.inputs) for p in plan):
        lines.append(f"rule {name}, {pattern}: weights {quantizer_words(weights)}; inputs {quantizer_words(inputs)}")
    full = expected_bytes(model, (), False)
    sizes = ((label, expected_bytes(model, plan, packed)) for label, packed in (("int8", False), ("packed", True)))
    lines.append(
        f"float32 {full / 1e6:.2f} MB; "
        + "; ".join(f"{label} {size / 1e6:.2f} MB ({size / full:.3f}x)" for label, size in sizes)
    )
    if simulated := sum(not executes_int8(layer) for layer in plan):
        lines.append(f"{simulated} layers do not run in INT8 on an Intel CPU")
    return "\n".join(lines)


def result_table(report: Report, folder: Path) -> TerminalTable:
    """Short table of the variants in a run's report."""
    title = f"{report.policy['name']}: {folder}"
    kernel = any(row.kid_real is not None for row in report.variants)
    coverage = any(row.precision is not None for row in report.variants)
    distances = [
        f"{report.distance} {report.against}",
        *(["KID"] if kernel else []),
        *(["prec/rec"] if coverage else []),
        *(["CLIP"] if report.clip else []),
    ]
    table = TerminalTable("variant", "bits", "steps", *distances, "PSNR dB", "ms/image", "MB", title=title)
    for row in report.variants:
        bits = "" if row.weight_bits is None else f"W{row.weight_bits:g}A{row.activation_bits:g}"
        megabytes = None if row.size_bytes is None else row.size_bytes / 1e6
        figures = [row.fid_real, row.psnr_fp, row.latency_ms_per_image, megabytes]
        distance, psnr, time, size = ("" if figure is None else f"{figure:.2f}" for figure in figures)
        kid = "" if row.kid_real is None else error_text(row.kid_real, row.kid_real_error)
        covered = "" if row.precision is None else f"{row.precision:.2f}/{row.recall:.2f}"
        scored = "" if row.clip_score is None else error_text(row.clip_score, row.clip_score_error, 2)
        measured = ((distance, True), (kid, kernel), (covered, coverage), (scored, report.clip))
        distances = [text for text, shown in measured if shown]
        time += f" {UNSTEADY}" if time and row.name in report.unsteady else ""
        table.add_row(row.name, bits, row.steps_text, *distances, psnr, time, size)
    return table


def result_remarks(report: Report) -> Iterator[Text]:
    """Remarks below the table: what did not run, what the figures mean, what stayed in floating point, and the
    targets.
    """
    for row in report.variants:
        if row.did_not_run:
            yield Text(f"{row.name} did not run: {row.did_not_run}")
    if report.unsteady:
        yield Text(UNSTEADY_NOTE)
    if report.fid_protocol is not None and (floor := report.fid_protocol.floor_text):
        yield Text(floor)
    if report.quality_note:
        yield Text(report.quality_note)
    if report.widths is not None:
        yield Text(choice_text(report.widths))
    if floating := [f"{row.layer} ({row.kind})" for row in report.layers if row.weight_bits is None]:
        yield Text(f"in floating point: {', '.join(floating)}")
    for goal in report.targets:
        mark = {True: ("holds", "green"), False: ("does not hold", "red"), None: ("not measured", "")}[goal.holds]
        measured = "-" if goal.measured is None else f"{goal.measured:.4g}"
        why = f" ({goal.note})" if goal.holds is None and goal.note else ""
        yield Text.assemble("  ", mark, f": {goal.name}: {measured} {goal.comparison} {goal.bound:g}{why}")


def stages_ahead(preview: RunPreview) -> TerminalTable:
    """Table of what a run would do in each stage, and whether its disk has enough space."""
    ahead = [stage for stage in preview.stages if stage.state != KEPT]
    wanted = bytes_wanted([stage.size for stage in ahead])
    caption = (
        f"{time_ahead(stage.seconds for stage in ahead)}\n"
        f"about {_megabytes(wanted)} MB are wanted at most, {_megabytes(preview.free_bytes)} MB are free"
    )
    table = TerminalTable(
        title=f"{len(ahead)} of {len(preview.stages)} stages to do",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("stage", "is"):
        table.add_column(heading)
    for heading in ("training steps", "minutes", "MB"):
        table.add_column(heading, justify="right")
    for stage in preview.stages:
        state = f"{stage.state}: {stage.reason}" if stage.reason else stage.state
        steps = "" if stage.training_steps is None else _steps(stage.training_steps, stage.automatic)
        size = "" if stage.state == KEPT or not stage.size.working else f"{stage.size.working / 1e6:,.1f}"
        minutes = "" if stage.state == KEPT else f"{stage.seconds.expected / 60:.1f}"
        table.add_row(*map(Text, (stage.name, state, steps, minutes, size)))
    return table


def cells_table(cells: Sequence[CellState], title: str) -> TerminalTable:
    """Table of the work and the progress of every cell of a study."""
    table = TerminalTable("cell", "variants", "trains", "steps", "is", title=title)
    for cell in cells:
        table.add_row(
            cell.name, " ".join(cell.variants), " ".join(cell.trains), _steps(cell.steps, cell.automatic), cell.state
        )
    return table


def _steps(steps: int, automatic: bool) -> str:
    return f"auto, at most {steps}" if automatic else str(steps)


def costs_table(costs: Mapping[str, StepProfile], states: int, title: str) -> TerminalTable:
    """Table of the cost of a training step of ``states`` states, part by part."""
    table = TerminalTable("milliseconds a step", *(f"{name}: {PROFILED[name]}" for name in costs), title=title)
    for part in PARTS:
        table.add_row(part, *(f"{cost.milliseconds[part]:.1f}" for cost in costs.values()))
    table.add_section()
    table.add_row("all", *(f"{cost.total:.1f}" for cost in costs.values()))
    if "float" in costs:
        table.add_row("times float", *(f"{cost.total / costs['float'].total:.2f}" for cost in costs.values()))
    table.add_row("states a second", *(f"{1e3 * states / cost.total:.1f}" for cost in costs.values()))
    table.add_row("MB kept for the backward pass", *(f"{cost.kept_bytes / 1e6:.0f}" for cost in costs.values()))
    table.add_row("MB held from step to step", *(f"{cost.held_bytes / 1e6:.0f}" for cost in costs.values()))
    table.add_row("MB more at the peak of a step", *(f"{cost.peak_bytes / 1e6:.0f}" for cost in costs.values()))
    return table


def stages_table(rehearsal: Rehearsal) -> TerminalTable:
    """Table of the cost of each stage of a rehearsal, and below it the results."""
    title = f"{rehearsal.model}: {rehearsal.parameters / 1e6:,.1f} million parameters, {rehearsal.policy}"
    table = TerminalTable("stage", title=title, box=box.SIMPLE_HEAD)
    for heading in ("seconds", "MB at the peak", "MB kept"):
        table.add_column(heading, justify="right")
    for cost in rehearsal.stages:
        bytes_of_stage = (_megabytes(value) for value in (cost.peak_bytes, cost.kept_bytes))
        table.add_row(cost.name, f"{cost.seconds:.1f}", *bytes_of_stage)
    table.add_row("all", f"{sum(cost.seconds for cost in rehearsal.stages):.1f}", _megabytes(rehearsal.peak_bytes), "")
    sizes = ", ".join(f"{name} {_megabytes(size)} MB" for name, size in rehearsal.sizes.items())
    layers = (
        f"{rehearsal.executed_int8} of {rehearsal.planned} planned layers ran in INT8, {rehearsal.exact} with exactly "
        "PyTorch's integers"
    )
    if rehearsal.attention:
        integer = sum(each in INT8 for each in rehearsal.attention.values())
        layers += f"; both products of attention in {integer} of {len(rehearsal.attention)}"
    table.caption, table.caption_justify = f"{layers}\n{sizes}", "left"
    return table


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f}"
