"""The contents of report.html: texts and their order; the template only arranges them.

Not here: charts (figures.py), strips of samples (sample_sheets.py), or files (report_files.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from pqcad_qat.policy.variants import FP32, NNCF_INT8, REFERENCE, VARIANTS, summary_of
from pqcad_qat.quality.fid_protocol import error_text
from pqcad_qat.report import figures
from pqcad_qat.report.record import UNSTEADY, UNSTEADY_NOTE, Curves, Report, Target, Timing, VariantRow
from pqcad_qat.report.sample_sheets import STRIP_IMAGES, ordered, strip_uri
from pqcad_qat.report.stage_ends import end_sentence
from pqcad_qat.report.width_choice import choice_text

BASELINES = {spec.name: spec.baseline for spec in reversed(tuple(VARIANTS.values())) if spec.baseline}
UNKNOWN = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Headline:
    """One large number at the top of the page, such as "3.1x", with its meaning, the two figures behind it, and whether
    it is an improvement.
    """

    value: str
    meaning: str
    basis: str
    good: bool = True


@dataclass(frozen=True)
class Bar:
    """A labelled quantity, and its share of the largest one, from 0 to 1."""

    label: str
    text: str
    share: float
    ours: bool = False


def render_page(report: Report, curves: Curves, samples: Mapping[str, np.ndarray]) -> str:
    """Render the whole self-contained page; parts that the record lacks are left out.

    Raises the same errors about samples as `sample_sheets.ordered`.
    """
    template = page_template("report_template.html")
    charts = {
        "quality": figures.quality_latency(report),
        "timeline": figures.bit_timeline(report, curves),
        "distance": figures.weight_distance(curves),
        "losses": figures.loss_curves(curves),
        "time": figures.time_profile(report.profiles),
        "storage": figures.storage_chart(report.storage),
    }
    return template.render(
        report=report,
        name=str(report.policy.get("name") or "run"),
        summary=summary(report),
        headlines=headlines(report),
        verdict=verdict(report.targets),
        created=report.created.replace("T", " ").replace("+00:00", " UTC"),
        ends=[end_sentence(stage, end) for stage, end in report.training.items()],
        latencies=latency_bars(report),
        stages=time_bars(report.timings_s),
        rows=[(row, summary_of(row.name), report.latency.get(row.name)) for row in report.variants],
        float_step_trials=float_step_trials(report),
        nncf=nncf_note(report),
        widths="" if report.widths is None else choice_text(report.widths),
        best=best_values(report),
        unsteady=report.unsteady,
        unsteady_note=UNSTEADY_NOTE,
        strips=strips(report, samples),
        # this package's own SVG, whose texts canvas.py has escaped
        charts={name: Markup(svg or "") for name, svg in charts.items()},
        few_images=report.fid_protocol is not None and report.fid_protocol.under_10000,
        kernel_distances=any(row.kid_real is not None for row in report.variants),
        coverage=any(row.precision is not None for row in report.variants),
        error_text=error_text,
        target_text=target_text,
        spread=spread,
        ours=report.ours,
        unknown=UNKNOWN,
        float_kinds={row.layer: row.kind for row in report.layers if row.weight_bits is None},
        simulated=[
            row.layer for row in report.layers if row.weight_bits is not None and row.planned_execution != "int8"
        ],
    )


def page_template(name: str) -> Template:
    """Load a page's template, which can use the common style sheet as `style`, and the script as `script`."""
    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters.update(number=number_text, size=size, duration=duration, bits=bits)
    environment.globals["style"] = Markup(_text("page_style.css"))
    environment.globals["script"] = Markup(_text("page_script.js"))
    return environment.get_template(name)


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def summary(report: Report) -> str:
    """One sentence on the result: widths, sampling steps, runtime."""
    rows = {row.name: row for row in report.variants}
    simulated = VARIANTS[report.ours].deploys
    ours, full = rows.get(report.ours) or rows.get(simulated or ""), rows.get(FP32)
    if ours is None:
        return "No quantized model is part of this report."
    steps = f"{ours.steps} sampling steps" + (f" in place of {full.steps}" if full and full.steps != ours.steps else "")
    if ours.float_steps:
        steps += f" of which full precision computes the first {ours.float_steps}"
        steps += f" in {ours.float_calls} calls" if ours.float_calls > ours.float_steps else ""
    run = "executed by OpenVINO" if ours.name == report.ours else "simulated in PyTorch"
    return f"Weights of {bits(ours.weight_bits)} and activations of {bits(ours.activation_bits)} bits, {steps}, {run}."


def headlines(report: Report) -> list[Headline]:
    """Headlines on speed, size, quality and execution, each only if its numbers are known and steady.

    A deterioration is stated as plainly as an improvement.
    """
    rows = {row.name: row for row in report.variants}
    steady = {name: row for name, row in rows.items() if name not in report.unsteady}
    shown = [speed for name in BASELINES if (speed := _speed(steady, name, report.ours))]
    ours, full = rows.get(report.ours), rows.get(FP32)
    if ours and full and ours.size_bytes and full.size_bytes:
        basis = f"{size(full.size_bytes)} to {size(ours.size_bytes)}"
        ratio = ours.size_bytes / full.size_bytes
        shown.append(Headline(f"{ratio:.2f}{TIMES}", "the size of full precision", basis, ratio < 1))
    if quality := _quality(report, rows):
        shown.append(quality)
    if report.execution:
        done = f"{report.execution.executed_int8}/{report.execution.planned}"
        exact = (
            f"{report.parity.layers_exact} of {report.parity.layers_checked} layers give exactly PyTorch's integers"
            if report.parity
            else ""
        )
        if (free := report.execution.any_size_int8) is not None:
            exact += f"; {free} execute in INT8 where OpenVINO GenAI compiles them for any size"
        complete = report.execution.executed_int8 == report.execution.planned
        shown.append(Headline(done, "planned layers executed in INT8", exact, complete))
    return shown


def _speed(rows: Mapping[str, VariantRow], baseline: str, deployed: str) -> Headline | None:
    times = [rows[name].latency_ms_per_image if name in rows else None for name in (baseline, deployed)]
    theirs, ours = times
    if not theirs or not ours:
        return None
    ratio, word = (theirs / ours, "faster") if theirs >= ours else (ours / theirs, "slower")
    steps = rows[baseline].steps / rows[deployed].steps
    share = f"{steps:.3g}{TIMES} from the number of steps, {theirs / ours / steps:.2f}{TIMES} from the time of each"
    basis = f"{number_text(theirs)} to {number_text(ours)} ms an image: {share}"
    return Headline(f"{ratio:.1f}{TIMES}", f"{word} than {BASELINES[baseline]}", basis, word == "faster")


def _quality(report: Report, rows: Mapping[str, VariantRow]) -> Headline | None:
    full, forms = rows.get(FP32), (report.ours, VARIANTS[report.ours].deploys or "")
    name = next((name for name in forms if name in rows and rows[name].fid_real is not None), None)
    if full is None or not full.fid_real or name is None:
        return None
    ours = rows[name].fid_real or 0.0
    change = ours / full.fid_real - 1
    word = "better" if change < 0 else "worse"
    basis = f"{full.fid_real:.2f} to {ours:.2f}, {full.steps} to {rows[name].steps} steps ({name})"
    return Headline(f"{100 * change:+.1f} %", f"{report.distance}, {word} than full precision", basis, change <= 0)


def verdict(targets: Sequence[Target]) -> str:
    """Sentence on how many targets hold."""
    if not targets:
        return ""
    holding = sum(target.holds is True for target in targets)
    unmeasured = sum(target.holds is None for target in targets)
    missed = len(targets) - holding - unmeasured
    clauses = [f"{holding} of {len(targets)} targets hold"]
    clauses += [f"{missed} missed"] if missed else []
    clauses += [f"{unmeasured} not measured here"] if unmeasured else []
    return ", ".join(clauses)


def target_text(value: float | None, unit: str) -> str:
    """Text of a measured value or bound with its unit."""
    if value is None:
        return UNKNOWN
    shown = f"{value:.0f}" if unit == "layers" else f"{value:.4g}"
    return f"{shown}{TIMES}" if unit == "x" else f"{shown} {unit}".strip()


def latency_bars(report: Report) -> list[Bar]:
    """Bars of the milliseconds an image of every timed variant, in the order of the table."""
    timed = [(row, row.latency_ms_per_image) for row in report.variants if row.latency_ms_per_image]
    longest = max((value for _, value in timed), default=1.0)
    marks = dict.fromkeys(report.unsteady, f", {UNSTEADY}")
    return [
        Bar(row.name, f"{number_text(value, 3)} ms{marks.get(row.name, '')}", value / longest, row.name == report.ours)
        for row, value in timed
    ]


def time_bars(timings: Mapping[str, float]) -> list[Bar]:
    """Bars of the wall time of every stage of the run."""
    longest = max(timings.values(), default=1.0) or 1.0
    return [Bar(stage, duration(seconds), seconds / longest) for stage, seconds in timings.items()]


def best_values(report: Report) -> dict[str, float]:
    """Best measured value of each column; unsteady times do not count."""
    best: dict[str, float] = {}
    for key, choose in (
        ("size_bytes", min),
        ("latency_ms_per_image", min),
        ("latency_ms_per_step", min),
        ("fid_real", min),
        ("kid_real", min),
        ("clip_score", max),
    ):
        rows = [row for row in report.variants if not (key.startswith("latency") and row.name in report.unsteady)]
        values = [value for row in rows if (value := getattr(row, key)) is not None]
        if len(values) > 1:
            best[key] = choose(values)
    return best


def float_step_trials(report: Report) -> list[tuple[int, list[float]]]:
    """For each number of sampling steps, the PSNR with 0, 1, 2 ... first steps in full precision."""
    counts = dict.fromkeys(trial.steps for trial in report.float_steps)
    return [(steps, [trial.psnr for trial in report.float_steps if trial.steps == steps]) for steps in counts]


def nncf_note(report: Report) -> str:
    """Sentence on the setting of NNCF that its row has; empty where none were compared."""
    errors = {name: error for name, error in report.nncf.items() if error is not None}
    if not errors:
        return ""
    listed = ", ".join(f"{name} {number_text(report.nncf[name])}" for name in report.nncf)
    return (
        f"{NNCF_INT8} has the setting of NNCF that is nearest to full precision on held-out states: "
        f"{min(errors, key=errors.__getitem__)}. Mean squared errors of its predictions: {listed}."
    )


def strips(report: Report, samples: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One strip of images for each variant, all from the same seeds, with what is known of its quality."""
    rows = {row.name: row for row in report.variants}
    rendered = []
    for name, images in (ordered(samples) if samples else {}).items():
        row, count = rows.get(name), min(len(images), STRIP_IMAGES)
        facts = [] if row is None else [f"{row.steps_text} steps"]
        facts += [f"{report.distance} {row.fid_real:.2f}"] if row and row.fid_real is not None else []
        facts += [f"{row.psnr_fp:.1f} dB to {REFERENCE}"] if row and row.psnr_fp is not None else []
        alt = f"{count} images by {name} ({summary_of(name) or 'a variant'}), from the same seeds as the other rows"
        rendered.append(
            {
                "name": name,
                "summary": summary_of(name),
                "facts": ", ".join(facts),
                "uri": strip_uri(images),
                "alt": alt,
            }
        )
    return rendered


def spread(timing: Timing | None) -> str:
    """Text of a timing's distribution."""
    if timing is None:
        return ""
    quartiles = f"{number_text(timing.lower_quartile_ms, 3)} to {number_text(timing.upper_quartile_ms, 3)}"
    return (
        f"median of {timing.runs} runs {number_text(timing.median_ms, 3)} ms, quartiles {quartiles}, minimum "
        f"{number_text(timing.minimum_ms, 3)}"
    )


def number_text(value: float | None, digits: int = 3) -> str:
    """Text of a measurement with ``digits`` significant digits; an unknown value is a dash.

    Exponents are used only below 1e-3 and from 1e6.
    """
    if value is None:
        return UNKNOWN
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole)}f}"


def bits(value: float | None) -> str:
    """Text of a width in bits, without decimals if it is a whole number."""
    return "floating point" if value is None else f"{value:g}"


def size(value: int | None) -> str:
    """Text of a number of bytes in decimal units."""
    if value is None:
        return UNKNOWN
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """Text of a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
