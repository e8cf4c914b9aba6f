"""The charts of a report, drawn from its record alone; a function returns None if there is nothing to draw.

Not here: how a figure becomes part of a page (canvas.py), the page (page.py), sample images (sample_sheets.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pqcad_qat.policy.variants import OPENVINO, PQ
from pqcad_qat.report.canvas import COLOURS, Canvas, canvas
from pqcad_qat.report.record import HELD_OUT, Curves, ProfileRow, Report, Series, StorageRow
from pqcad_qat.training.transition import Transition

_PRECISIONS = {"i8": "accent", "u8": "accent", "i4": "accent", "bf16": "amber", "f16": "amber", "f32": "violet"}
_PRECISION_NAMES = {"i8": "INT8", "u8": "INT8", "i4": "INT4", "bf16": "BF16", "f16": "FP16", "f32": "FP32"}
_CAUSES = (("momentum", "o", "amber"), ("deadline", "D", "rose"), ("fixed", "s", "violet"))  # cause, marker, colour
_SERIES = ("blue", "accent", "amber", "violet", "rose", "grey")


def quality_latency(report: Report) -> str | None:
    """Chart of the distance to the reference against milliseconds an image; None if it would have one point."""
    rows = [row for row in report.variants if row.fid_real is not None and row.latency_ms_per_image]
    if len(rows) < 2:
        return None
    with canvas("quality", 5.4, 3.5) as drawn:
        axes = drawn.figure.subplots()
        for row in rows:
            ours = row.name == report.ours
            colour = COLOURS["accent" if ours else "blue" if row.runtime == OPENVINO else "grey"]
            x, y = row.latency_ms_per_image or 0.0, row.fid_real or 0.0
            (point,) = axes.plot([x], [y], "o", ms=11 if ours else 8, color=colour, mec=COLOURS["surface"], mew=1.2)
            drawn.tip(point, f"{row.name}: {x:.1f} ms an image, {report.distance} {y:.2f}, {row.steps} steps")
            axes.annotate(
                row.name,
                (x, y),
                xytext=(8, 5),
                textcoords="offset points",
                fontsize=9,
                weight="bold" if ours else "normal",
            )
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
        axes.margins(x=0.18, y=0.22)
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("milliseconds an image, logarithmic (left is faster)")
        axes.set_ylabel(f"{report.distance} to {report.against} images (lower is better)")
        values = [f"{row.name} {row.latency_ms_per_image:.1f} ms, {report.distance} {row.fid_real:.2f}" for row in rows]
        return drawn.svg(f"Quality against latency: {'; '.join(values)}")


def _plain_log(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def bit_timeline(report: Report, curves: Curves) -> str | None:
    """Chart of each planned layer's weight width over progressive training, the mean width, and what each training
    step changes of the weights; None without transitions.
    """
    if not report.bit_schedule:
        return None
    layers, end = _timeline_layers(report), _timeline_end(report, curves)
    with canvas("timeline", 9.6, 3.4 + min(len(layers), 90) * 0.055) as drawn:
        heights = [1.1 + len(layers) * 0.05, 1.0, 1.0]
        heat, mean, change = drawn.figure.subplots(3, 1, sharex=True, height_ratios=heights)
        _draw_widths(drawn, heat, report.bit_schedule, layers, end=end)
        _draw_mean(mean, report.bit_schedule, layers, end)
        paces = {series.name: series for series in curves.paces}
        _draw_change(change, paces.get("weight_change"), curves.perturbation)
        change.set_xlabel("training step of progressive quantization")
        change.set_xlim(0, end)
        causes = {t.cause for t in report.bit_schedule}
        counted = ", ".join(f"{sum(t.cause == c for t in report.bit_schedule)} by {c}" for c in sorted(causes))
        return drawn.svg(
            f"Bit-width timeline of {len(layers)} layers over {end} steps: {len(report.bit_schedule)} "
            f"transitions, {counted}"
        )


def _timeline_layers(report: Report) -> dict[str, tuple[int, int]]:
    """Planned layer -> (first width in bits, number of parameters), in the order of the model."""
    layers = {row.layer: (row.ladder[0], row.parameters) for row in report.layers if row.ladder}
    for transition in report.bit_schedule:
        layers.setdefault(transition.layer, (transition.from_bits, 1))
    return layers


def _timeline_end(report: Report, curves: Curves) -> int:
    trained = [s.steps[-1] for s in (*curves.losses, *curves.paces) if s.stage == PQ and s.steps]
    return max([*trained, *(t.step + 1 for t in report.bit_schedule)])


def _draw_widths(
    drawn: Canvas, axes: Axes, schedule: Sequence[Transition], layers: Mapping[str, tuple[int, int]], *, end: int
) -> None:
    rows = {layer: index for index, layer in enumerate(layers)}
    for layer, (first, _) in layers.items():
        moves = [t for t in schedule if t.layer == layer]
        edges = [0, *(t.step for t in moves), end]
        for start, stop, bits in zip(edges, edges[1:], [first, *(t.to_bits for t in moves)], strict=False):
            bar = axes.broken_barh(
                [(start, stop - start)], (rows[layer] - 0.5, 1.0), color=COLOURS[f"bits{bits}"], lw=0
            )
            drawn.tip(bar, f"{layer}: {bits} bits, steps {start} to {stop}")
    for cause, marker, colour in _CAUSES:
        ended = [t for t in schedule if t.cause == cause]
        for transition in ended:
            (mark,) = axes.plot([transition.step], [rows[transition.layer]], marker, ms=3.4, color=COLOURS[colour])
            drawn.tip(mark, _transition_text(transition))
        if ended:
            axes.plot([], [], marker, ms=4.5, color=COLOURS[colour], label=f"time set by {cause}")
    for bits in sorted({first for first, _ in layers.values()} | {t.to_bits for t in schedule}, reverse=True):
        axes.plot([], [], "s", ms=8, color=COLOURS[f"bits{bits}"], label=f"{bits} bits")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=9, handletextpad=0.3, columnspacing=1.2, borderaxespad=0.1
    )
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.grid(False)
    axes.set_yticks(*_group_ticks(list(layers)))
    axes.tick_params(length=0)


def _group_ticks(names: Sequence[str]) -> tuple[list[float], list[str]]:
    """Ticks for an axis of layers, one in the middle of each group."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(layer_group(name), []).append(index)
    return [sum(rows) / len(rows) for rows in groups.values()], list(groups)


def layer_group(name: str) -> str:
    """Block that contains a layer: down_blocks.0.resnets.1.conv1 -> down_blocks.0; conv_in -> conv_in."""
    head, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    return f"{head}.{index}" if index.isdigit() else head


def _transition_text(t: Transition) -> str:
    move = f"step {t.step}: {t.layer} from {t.from_bits} to {t.to_bits} bits"
    return f"{move}, begun at step {t.began}, time set by {t.cause}; perturbation {t.perturbation:.3f}"


def _draw_mean(axes: Axes, schedule: Sequence[Transition], layers: Mapping[str, tuple[int, int]], end: int) -> None:
    widths = {layer: float(first) for layer, (first, _) in layers.items()}
    total = sum(weight for _, weight in layers.values()) or 1
    steps = [0]
    means = [sum(widths[layer] * layers[layer][1] for layer in layers) / total]
    for t in sorted(schedule, key=lambda item: item.step):
        widths[t.layer] = float(t.to_bits)
        steps.append(t.step)
        means.append(sum(widths[layer] * layers[layer][1] for layer in layers) / total)
    axes.step([*steps, end], [*means, means[-1]], where="post", color=COLOURS["bits3"])
    axes.set_title("mean weight bits, by parameters")
    axes.annotate(f"{means[-1]:.2f}", (end, means[-1]), xytext=(-4, 6), textcoords="offset points", ha="right")
    axes.set_ylim(min(means) - 1, max(means) + 1)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_change(axes: Axes, series: Series | None, bound: float | None) -> None:
    axes.set_title("largest relative change of a layer's weights by a step's move")
    if series is not None:
        axes.plot(*_points(series), color=COLOURS["violet"])
    if bound is not None:
        axes.axhline(bound, color=COLOURS["muted"], lw=0.9, ls=(0, (4, 3)))
        edge = axes.get_yaxis_transform()  # x is a fraction of the axes, y is in data coordinates
        axes.text(
            0.995,
            bound,
            f"bound {bound:g}",
            transform=edge,
            ha="right",
            va="bottom",
            fontsize=8,
            color=COLOURS["muted"],
        )


def _points(series: Series, most: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a series, with NaN for an unknown value.

    A long series is thinned to about ``most`` points, more than a page has pixels for.
    """
    stride = max(1, -(-len(series.steps) // most))
    values = [np.nan if value is None else value for value in series.values[::stride]]
    return np.array(series.steps[::stride]), np.array(values, dtype=np.float64)


def loss_curves(curves: Curves) -> str | None:
    """Chart of every loss term and of the held-out loss over the training steps of its stage, one logarithmic panel a
    stage; None without losses.
    """
    stages: dict[str, list[Series]] = {}
    for series in curves.losses:
        stages.setdefault(series.stage, []).append(series)
    if not stages:
        return None
    columns = min(2, len(stages))
    rows = -(-len(stages) // columns)
    with canvas("losses", 9.6, 2.9 * rows) as drawn:
        panels = drawn.figure.subplots(rows, columns, squeeze=False).flat
        for axes, (stage, terms) in zip(panels, stages.items(), strict=False):
            for colour, series in zip(_SERIES, terms, strict=False):
                steps, values = _points(series)
                shown, line = np.where(values > 0, values, np.nan), "o--" if series.name == HELD_OUT else "-"
                axes.plot(steps, shown, line, ms=2.5, color=COLOURS[colour], label=series.name, lw=1.4)
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
            axes.set_title(stage)
            axes.set_xlabel("training step")
            axes.legend()
        for axes in list(panels):
            axes.set_visible(False)
        return drawn.svg(
            "Loss curves, logarithmic: " + "; ".join(f"{k}: {', '.join(s.name for s in v)}" for k, v in stages.items())
        )


def weight_distance(curves: Curves) -> str | None:
    """Chart of the relative distance between the computing weights and full precision, one line a stage; None without
    data.
    """
    if not curves.distances:
        return None
    with canvas("distance", 9.6, 2.6) as drawn:
        axes = drawn.figure.subplots()
        for colour, series in zip(_SERIES, curves.distances, strict=False):
            axes.plot(*_points(series), color=COLOURS[colour], label=series.stage, lw=1.4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("training step")
        axes.legend()
        ends = (
            f"{series.stage} ends at {series.values[-1]:.3f}"
            for series in curves.distances
            if series.values[-1] is not None
        )
        return drawn.svg(f"Relative distance of the weights to full precision: {', '.join(ends)}")


def time_profile(profiles: Mapping[str, Sequence[ProfileRow]], name: str = "time") -> str | None:
    """Chart of the milliseconds of one step by kind of node, stacked by precision, one panel a variant on a common
    scale.

    ``name`` is the id of the chart in the page.
    """
    profiles = {variant: rows for variant, rows in profiles.items() if rows}
    if not profiles:
        return None
    kinds = largest_kinds(profiles)
    with canvas(name, 9.6, 1.2 + 0.27 * len(kinds)) as drawn:
        panels = drawn.figure.subplots(1, len(profiles), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (variant, rows) in zip(panels, profiles.items(), strict=True):
            _draw_profile(drawn, axes, rows, kinds)
            axes.set_title(f"{variant}: {sum(row.milliseconds for row in rows):.2f} ms")
            axes.set_xlabel("milliseconds a step")
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        drawn.figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=6)
        totals = "; ".join(f"{key}: {sum(row.milliseconds for row in rows):.2f} ms" for key, rows in profiles.items())
        return drawn.svg(f"Time of one step by kind of node and precision. {totals}")


def largest_kinds(profiles: Mapping[str, Sequence[ProfileRow]], most: int = 9) -> list[str]:
    """Kinds of node with the largest total time, in order; if there are more than ``most``, the last one is "other"."""
    spent: dict[str, float] = {}
    for rows in profiles.values():
        for row in rows:
            spent[row.kind] = spent.get(row.kind, 0.0) + row.milliseconds
    ordered = sorted(spent, key=lambda kind: -spent[kind])
    return ordered if len(ordered) <= most else [*ordered[: most - 1], "other"]


def _draw_profile(drawn: Canvas, axes: Axes, rows: Sequence[ProfileRow], kinds: Sequence[str]) -> None:
    ends = dict.fromkeys(kinds, 0.0)
    labelled: set[str] = set()
    for row in sorted(
        rows, key=lambda item: list(_PRECISIONS).index(item.precision) if item.precision in _PRECISIONS else 99
    ):
        kind = row.kind if row.kind in ends else "other"
        label = _PRECISION_NAMES.get(row.precision, "other")
        shown = "_" if label in labelled else label
        labelled.add(label)
        colour = COLOURS[_PRECISIONS.get(row.precision, "grey")]
        bars = axes.barh(
            [kinds.index(kind)], [row.milliseconds], left=[ends[kind]], color=colour, height=0.72, label=shown
        )
        drawn.tip(bars[0], f"{row.kind}, {row.precision}: {row.milliseconds:.3f} ms in {row.nodes} nodes")
        ends[kind] += row.milliseconds
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def storage_chart(rows: Sequence[StorageRow]) -> str | None:
    """Chart of the kilobytes of the shipped file by group of layers: integer weights, scales, and the floating-point
    rest.
    """
    if not rows:
        return None
    kinds = (
        ("integer weights", "weights_bytes", "accent"),
        ("scales, zero points", "scales_bytes", "amber"),
        ("floating point", "float_bytes", "violet"),
    )
    with canvas("storage", 9.6, 0.9 + 0.27 * len(rows)) as drawn:
        axes = drawn.figure.subplots()
        ends = np.zeros(len(rows))
        for label, key, colour in kinds:
            sizes = np.array([getattr(row, key) for row in rows]) / 1e3
            bars = axes.barh(np.arange(len(rows)), sizes, left=ends, color=COLOURS[colour], height=0.72, label=label)
            for bar, row, size in zip(bars, rows, sizes, strict=True):
                drawn.tip(bar, f"{row.group}, {label}: {size:.1f} kB")
            ends += sizes
        axes.set_yticks(range(len(rows)), [row.group for row in rows])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("kilobytes on disk")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.1)
        total = sum(ends)
        return drawn.svg(f"Bytes of the shipped file by group of layers, {total:.0f} kB in all")
