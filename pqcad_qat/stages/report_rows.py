"""Conversion of the records of a run's stages into its report: variants, layers, storage, curves.

Not here: measuring (timing/, quality/), the report's definition (report/record.py), targets (report/targets.py) or its
looks (report/page.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from torch import nn

import pqcad_qat
from pqcad_qat.export.execution import INT8
from pqcad_qat.policy.loading import dump_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import (
    DEPLOYED,
    PQ,
    PQCAD,
    QUANTIZATION_AWARE,
    TRAINED,
    VARIANTS,
    stages_of,
)
from pqcad_qat.quality.fidelity import FidelityFigures
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.plan_facts import executes_int8, float_layers, stored_bits
from pqcad_qat.quantization.quantizable_layers import float_kind, parameter_count
from pqcad_qat.report.record import (
    HELD_OUT,
    Curves,
    Execution,
    LayerRow,
    Parity,
    Proof,
    Report,
    Reproduction,
    Series,
    StorageRow,
    VariantRow,
)
from pqcad_qat.report.targets import targets_of
from pqcad_qat.sampling.ddpm_schedule import Walk
from pqcad_qat.sampling.precision_by_time import float_steps
from pqcad_qat.serving.packing import PACKED_WIDTHS
from pqcad_qat.stages.stage_records import (
    BaselinesRecord,
    BenchmarkRecord,
    EvaluationRecord,
    ExportRecord,
    FloatStepsRecord,
    SamplesRecord,
    TrainingRecord,
    WidthsRecord,
)
from pqcad_qat.training.metrics_log import read_metrics
from pqcad_qat.training.stage_end import StageEnd

OF_IMAGES = tuple({f.name for f in fields(FidelityFigures)} & {f.name for f in fields(VariantRow)})
"""Fields that a row of the report has from the record of evaluation, under the same names."""

_NOT_MEASURED = FidelityFigures(0, None, None, None, None, identical_to_fp=False, rank_deficient=False)


@dataclass(frozen=True)
class RunFacts:
    """Everything that a report is made from.

    Attributes:
        policy: resolved policy.
        plan: one entry for every quantized layer.
        model: denoiser that the plan was made for.
        walks: sampling steps of the full number, and of the student's.
        float_steps: first steps that full precision computes.
        evaluation, widths, progressive, baselines, benchmark: records of these stages; None for stages that the run
            does not take.
        samples: records of the stages that sampled images, by variant.
        exports: records of what was deployed, by the variant that it was made from, in the policy's order.
        ends: what each training stage came to.
        seconds: wall time by stage, in order.
        warnings: warnings shown while the run worked.
        command: command that repeats the run.
    """

    policy: Policy
    plan: Sequence[LayerPlan]
    model: nn.Module
    walks: tuple[Walk, Walk]
    float_steps: FloatStepsRecord
    evaluation: EvaluationRecord
    widths: WidthsRecord | None
    progressive: TrainingRecord | None
    exports: Mapping[str, ExportRecord]
    baselines: BaselinesRecord | None
    benchmark: BenchmarkRecord | None
    samples: Mapping[str, SamplesRecord]
    ends: Mapping[str, StageEnd]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    command: str

    @property
    def export(self) -> ExportRecord | None:
        """Record of the first deployed variant; None where nothing is deployed."""
        return next(iter(self.exports.values()), None)

    def sampled_by(self, variant: str) -> str:
        """What computed a variant's images."""
        own = self.samples[variant].runtime if variant in self.samples else ""
        return own or VARIANTS[variant].runtime

    def walk(self, variant: str) -> Walk:
        """Sampling steps of a variant."""
        return self.walks[VARIANTS[variant].student_steps]


def report_of(facts: RunFacts) -> Report:
    """Build the whole report; rows, targets and parts that belong to stages that did not run are absent."""
    variants = tuple(_variants(facts))
    policy, benchmark, export = facts.policy, facts.benchmark, facts.export
    report = Report(
        policy=policy.model_dump(mode="json"),
        seed=policy.training.seed,
        hardware=(benchmark or facts.evaluation).hardware,
        variants=variants,
        fid_protocol=facts.evaluation.protocol,
        bit_schedule=facts.progressive.transitions if facts.progressive else (),
        ours=DEPLOYED[next(iter(facts.exports), PQCAD)],
        parity=_parity(export) if export else None,
        execution=_execution(facts, export) if export else None,
        also_deployed={
            DEPLOYED[name]: Proof(policy.folder_of(name), _execution(facts, record), _parity(record))
            for name, record in islice(facts.exports.items(), 1, None)
        },
        timings_s=facts.seconds,
        warnings=facts.warnings,
        quality_note=facts.evaluation.note,
        clip=facts.evaluation.clip,
        latency=benchmark.timings if benchmark else {},
        layers=tuple(_layers(facts)),
        profiles=benchmark.profiles if benchmark else {},
        storage=tuple(_storage(facts)) if export else (),
        float_steps=facts.float_steps.trials,
        steps_in_parts=facts.float_steps.parts_trials,
        parts=export.parts if export else (),
        nncf=facts.baselines.nncf if facts.baselines else {},
        widths=None if facts.widths is None else facts.widths.choice,
        training=facts.ends,
        reproduction=Reproduction(facts.command, dump_policy(policy), pqcad_qat.__version__),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return replace(
        report,
        targets=tuple(targets_of(report, policy.targets, policy.variants, export.packed_bytes if export else None)),
    )


def _variants(facts: RunFacts) -> Iterator[VariantRow]:
    policy, benchmark = facts.policy, facts.benchmark
    timings, sizes = (benchmark.timings, benchmark.sizes) if benchmark else ({}, {})
    planned = _mean_bits(facts.plan, weights=True), _mean_bits(facts.plan, weights=False)
    died = facts.baselines.died if facts.baselines else {}
    for name in policy.variants:
        spec = VARIANTS[name]
        weight_bits, input_bits = spec.bits or planned
        steps = policy.sampling_steps(name)
        if name in died:
            yield VariantRow(name, spec.runtime, weight_bits, input_bits, steps, did_not_run=died[name])
            continue
        if spec.precision == "bf16" and name not in timings:
            continue
        timing = timings.get(spec.timed_as)
        step = timing.median_ms / policy.export.batch_size if timing else None
        quality = facts.evaluation.figures.get(name, _NOT_MEASURED)
        passes = 1 if policy.guidance_scale(name) == 1.0 else 2
        walk, first = facts.walk(name), facts.float_steps.of(name)
        in_float, float_calls = float_steps(walk, first.start), first.calls(walk)
        image = _image_ms(facts, step, steps - in_float, float_calls)
        yield VariantRow(
            name=name,
            runtime=facts.sampled_by(name),
            weight_bits=weight_bits,
            activation_bits=input_bits,
            steps=steps,
            size_bytes=sizes.get(spec.timed_as),
            latency_ms_per_step=step,
            latency_ms_per_image=None if image is None else image * passes,
            float_steps=in_float,
            float_calls=float_calls,
            passes=passes,
            **{figure: getattr(quality, figure) for figure in OF_IMAGES},
        )


def _image_ms(facts: RunFacts, step: float | None, steps: int, float_calls: int) -> float | None:
    """Milliseconds of one image's denoiser calls; None where the time of one of them is unknown."""
    if step is None or not float_calls:
        return None if step is None else step * steps
    timing = None if facts.benchmark is None else facts.benchmark.float_step
    return None if timing is None else step * steps + timing.median_ms / facts.policy.export.batch_size * float_calls


def _mean_bits(plan: Sequence[LayerPlan], weights: bool) -> float:
    """Mean width in bits over the planned layers, weighted by their numbers of parameters."""
    widths = [(layer.weights.bits if weights else layer.inputs.bits, layer.parameters) for layer in plan]
    return round(sum(bits * count for bits, count in widths) / sum(count for _, count in widths), 2)


def _parity(export: ExportRecord) -> Parity:
    shown = {name: value for name, value in vars(export.parity).items() if name != "exact"}
    return Parity(**shown, end_to_end_psnr=export.end_to_end_psnr)


def _execution(facts: RunFacts, export: ExportRecord) -> Execution:
    integer = [name for name, precision in export.precisions.items() if precision in INT8]
    in_float = (*(name for name in export.precisions if name not in integer), *float_layers(facts.model, facts.plan))
    return Execution(
        planned=len(export.precisions),
        executed_int8=len(integer),
        float_layers=in_float,
        needs_vnni=export.needs_vnni,
        attention=export.attention,
        any_size_int8=export.any_size_int8,
    )


def _layers(facts: RunFacts) -> Iterator[LayerRow]:
    precisions, exact = (facts.export.precisions, facts.export.parity.exact) if facts.export else ({}, {})
    for layer in facts.plan:
        yield LayerRow(
            layer=layer.name,
            kind=layer.kind,
            rule=layer.rule,
            weight_bits=layer.weights.bits,
            activation_bits=layer.inputs.bits,
            ladder=layer.ladder,
            parameters=layer.parameters,
            planned_execution="int8" if executes_int8(layer) else "float",
            executed=precisions.get(layer.name),
            exact=exact.get(layer.name),
        )
    for name in float_layers(facts.model, facts.plan):
        module = facts.model.get_submodule(name)
        yield LayerRow(name, float_kind(module), "-", None, None, (), parameter_count(module), "float")


def _storage(facts: RunFacts) -> Iterator[StorageRow]:
    """Bytes of the shipped weights by the model's top-level modules: integers, scales, and what stays in float32."""
    planned = {layer.name: layer for layer in facts.plan}
    widths = PACKED_WIDTHS[facts.policy.export.weights]
    for group, part in facts.model.named_children():
        integers = scales = rest = 0
        for name, parameter in part.named_parameters():
            owner, _, kind = f"{group}.{name}".rpartition(".")
            if owner in planned and kind == "weight":
                layer = planned[owner]
                integers += math.ceil(parameter.numel() * stored_bits(layer.weights, widths) / 8)
                scales += 4 * (parameter.shape[0] if layer.weights.per_channel else 1)
            else:
                rest += 4 * parameter.numel()
        if integers + rest:
            yield StorageRow(group, integers, scales, rest)
    if own := sum(4 * parameter.numel() for parameter in facts.model.parameters(recurse=False)):
        yield StorageRow("its own", 0, 0, own)


def curves_of(policy: Policy, logs: Path, ends: Mapping[str, StageEnd] | None = None) -> Curves:
    """Series of the training logs for the report's charts; the held-out losses begin with those of the start."""
    losses, paces, distances = [], [], []
    for stage in TRAINED:
        if stage not in stages_of(policy.variants):
            continue
        rows = read_metrics(logs / f"{stage}.jsonl")
        losses += [
            _series(stage, key.removeprefix("loss/"), key, rows) for key in (rows or [{}])[0] if key.startswith("loss/")
        ]
        losses += _held_out(stage, rows, (ends or {}).get(stage))
        if stage in QUANTIZATION_AWARE:
            distances.append(_series(stage, "weight_distance", "weight_distance", rows))
        if stage == PQ:
            paces = [_series(stage, key, key, rows) for key in ("pace", "weight_change", "mean_bits", "blend_lambda")]
    return Curves(tuple(losses), tuple(paces), tuple(distances), policy.progressive.perturbation)


def _held_out(stage: str, rows: Sequence[Mapping[str, float]], end: StageEnd | None) -> Iterator[Series]:
    measured = [(int(row["step"]), row["held_out"]) for row in rows if "held_out" in row]
    if measured:
        steps, values = zip(*([] if end is None else [(0, end.held_out.get("start"))]), *measured, strict=True)
        yield Series(stage, HELD_OUT, steps, values)


def _series(stage: str, name: str, key: str, rows: Sequence[Mapping[str, float]]) -> Series:
    return Series(stage, name, tuple(int(row["step"]) for row in rows), tuple(row.get(key) for row in rows))
