"""The command `benchmark`: the speed of a denoiser by every way to run it. All candidates take turns in one process;
each smaller instruction set gets a process of its own.

Not here: how a call is timed (timing/latency.py, timing/throughput.py), what is timed (benchmark_subject.py), or how it
looks (report/benchmark_page.py).
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from torch import nn

from pqcad_qat.commands.benchmark_subject import Candidates, Subject, candidates, open_subject
from pqcad_qat.errors import ModelError
from pqcad_qat.export.execution import (
    INT8,
    MATRIX_NODES,
    ExecutedNode,
    attention_precisions,
    executed_nodes,
    layer_precisions,
)
from pqcad_qat.export.traceable_modules import traced_path
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.models.model_loading import DEFAULT_SCHEDULER, shapes_of_configs
from pqcad_qat.models.untrained import random_denoiser
from pqcad_qat.policy.variants import FLOAT_STEPS, REFERENCE
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.report.benchmark_record import ColdStarts, LoadTime, Measurement, SpeedReport, SpeedRow
from pqcad_qat.report.record import Hardware, Throughput
from pqcad_qat.serving.compiled_graph import shared_core
from pqcad_qat.serving.deployed_folder import MANIFEST, read_manifest
from pqcad_qat.timing.baseline_trials import NNCF_SETTINGS, Inputs, reasons, try_out
from pqcad_qat.timing.cold_start import Graph, cold_starts
from pqcad_qat.timing.graph_sources import FixedBatchError, read_source
from pqcad_qat.timing.hardware import CAPS, NATIVE, hardware, lacking
from pqcad_qat.timing.latency import (
    F32,
    PRECISIONS,
    PROFILING,
    compile_for_latency,
    float_graphs,
    native,
    precision_hint,
    size_bytes,
    time_denoisers,
    torch_threads_kept,
    ways_of,
)
from pqcad_qat.timing.load_time import load_times
from pqcad_qat.timing.node_profile import profile_rows
from pqcad_qat.timing.throughput import ROUNDS, openvino_load, throughput_in_turns, torch_load

PROFILED_CALLS = 20
"""Largest number of calls in which the nodes of a candidate are profiled."""

LOADS = 5
"""Largest number of timed loads of a deployed folder, and of cold starts of each candidate."""


def measure_speed(
    source: str,
    policy: Path,
    batches: Sequence[int],
    isas: Sequence[str],
    *,
    nncf: Sequence[str] = NNCF_SETTINGS[:1],
    runs: int,
    throughput: bool,
    command: str,
    console: Console,
) -> SpeedReport:
    """Time a deployed folder, or an architecture, against the baselines that a user would run instead.

    Args:
        source, policy: same as for `benchmark_subject.open_subject`.
        batches: batch sizes in images a call.
        isas: instruction sets from hardware.INSTRUCTION_SETS; those that the CPU lacks are left out, and the report
            says so.
        nncf: settings of NNCF, each of which gets a row.
        runs: number of timed calls of every candidate, and of calls in all its bursts together.
        throughput: whether candidates are also timed with several simultaneous calls.

    Raises:
        ModelError: the source has nothing to time, or the CPU has none of the instruction sets.
        PolicyError, PlanError: as for `open_subject`.
    """
    left_out = {isa: why for isa in isas if (why := lacking(isa, hardware()))}
    timed = [isa for isa in isas if isa not in left_out]
    if not timed:
        lacks = "; ".join(f"{isa}: {why}" for isa, why in left_out.items())
        raise ModelError(f"--isa: got none that can be timed here ({lacks}); allowed native, or one that the CPU has")
    with tempfile.TemporaryDirectory() as temporary, progress_bar(console, quiet=True, lines=False) as bar:
        total = 2 + len(batches) * (1 + len(timed)) + (NATIVE in timed)
        task = bar.add_task("benchmark", total=total, note=f"reading {source}")
        bar.refresh()

        def tell(note: str) -> None:
            bar.update(task, note=note)
            bar.refresh()
            if bar.disable:
                console.print(f"benchmark: {note}", soft_wrap=True)

        subject = open_subject(source, policy, Path(temporary))
        bar.advance(task)
        tell("loading ours")
        loading = load_times(subject.folder, Path(temporary) / "formats", min(runs, LOADS))
        bar.advance(task)
        measurements, cold = list[Measurement](), None
        for batch in batches:
            tell(f"batch {batch}: making the baselines")
            prepared = candidates(subject, batch, Path(temporary) / f"batch-{batch}", nncf)
            bar.advance(task)
            if NATIVE in timed and cold is None:
                tell(f"batch {batch}: starting each in a process of its own")
                images = _images(subject, prepared)
                calls = max(sum(count for _, _, count in graphs) for graphs in images.values())
                # one start alone where an image takes more calls than are asked for
                cold = cold_starts(images, prepared.inputs(), max(1, min(runs // calls, LOADS)))
                bar.advance(task)
            for isa in timed:
                tell(f"batch {batch}, {isa}: timing")
                measurements.append(measure(prepared, isa, runs, throughput))
                bar.advance(task)
    return _report(subject, measurements, loading, left_out, cold=cold, command=command)


def _images(subject: Subject, prepared: Candidates) -> dict[str, list[Graph]]:
    """The graphs that make an image, and how often each is called: by all of a candidate's own steps, or once where
    they are not known.
    """
    machine = hardware()
    files, _ = _runnable(prepared, machine)
    images: dict[str, list[Graph]] = {}
    for name, file in files.items():
        ours = name == subject.ours
        calls = subject.steps if ours else subject.full_precision_steps
        in_float = [(graph, F32, subject.float_calls) for graph in float_graphs({name: file}).values() if calls]
        own = 1 if calls is None else calls - (subject.float_steps if in_float else 0)
        images[name] = [(file, precision_hint(name, machine), own), *in_float]
    return images


def _report(
    subject: Subject,
    measurements: Sequence[Measurement],
    loading: tuple[LoadTime, ...],
    left_out: Mapping[str, str],
    *,
    cold: ColdStarts | None,
    command: str,
) -> SpeedReport:
    shapes = shapes_of_configs(subject.config, DEFAULT_SCHEDULER, subject.source)
    return SpeedReport(
        source=subject.source,
        weights=subject.weights,
        parameters=sum(parameter.numel() for parameter in shapes.denoiser.parameters()),
        sample_shape=subject.sample_shape,
        steps=subject.steps,
        full_precision_steps=subject.full_precision_steps,
        float_steps=subject.float_steps,
        float_calls=subject.float_calls,
        ours=subject.ours,
        measurements=tuple(measurements),
        loading=loading,
        cold=cold,
        left_out=left_out,
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def measure(timed: Candidates, isa: str, runs: int, throughput: bool) -> Measurement:
    """Time the candidates in this process, or in a process of its own that is restricted to a smaller instruction set.

    Raises:
        ModelError: a candidate cannot be run, or its process died.
    """
    if isa == NATIVE:
        return measure_here(timed, isa, runs, throughput)
    try:
        with _environment(CAPS[isa]), ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(measure_here, timed, isa, runs, throughput).result()
    except BrokenProcessPool:
        raise ModelError(
            f"--isa {isa}: got a process that died while it timed, out of memory perhaps; allowed smaller "
            "--batches, which need less"
        ) from None


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started inside the block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def measure_here(timed: Candidates, isa: str, runs: int, throughput: bool) -> Measurement:
    """Measure latency, throughput and execution details of every candidate that runs on this machine at this batch
    size.
    """
    machine, inputs = hardware(), timed.inputs()
    files, left_out = _runnable(timed, machine)
    if isa != NATIVE:  # for the native instruction set they were tried out when they were made
        died = reasons(
            {
                name: partial(try_out, file, inputs, ways_of(name, machine))
                for name, file in files.items()
                if name != timed.ours
            }
        )
        # A baseline that fails under this instruction set is left out with its reason; the other candidates are timed.
        files = {name: file for name, file in files.items() if name not in died}
        left_out |= died
    denoiser = random_denoiser(timed.config, "config.json")
    latencies = time_denoisers(denoiser, files, inputs, runs)
    rates = _throughputs(denoiser, files, inputs, -(-runs // ROUNDS)) if throughput else {}
    of_float_steps = latencies.pop(FLOAT_STEPS, None), rates.pop(FLOAT_STEPS, None)
    known = list(quantizable_layers(denoiser))
    sizes = {REFERENCE: 4 * sum(parameter.numel() for parameter in denoiser.parameters())}
    sizes |= {name: size_bytes(file.parent if file.suffix else file) for name, file in files.items()}
    rows = {name: SpeedRow(name, latency, rates.get(name), sizes[name]) for name, latency in latencies.items()}
    for name, file in files.items():
        hint, calls = precision_hint(name, machine), min(runs, PROFILED_CALLS)
        rows[name] = _with_execution(rows[name], file, hint, inputs, known=known, calls=calls)
    if timed.ours in rows:
        latency, rate = of_float_steps
        rows[timed.ours] = replace(rows[timed.ours], float_latency=latency, float_throughput=rate)
    return Measurement(isa, timed.batch, machine, tuple(rows.values()), left_out)


def _throughputs(denoiser: nn.Module, files: Mapping[str, Path], inputs: Inputs, calls: int) -> dict[str, Throughput]:
    machine = hardware()
    with torch_threads_kept():
        loads = {name: openvino_load(file, precision_hint(name, machine), inputs) for name, file in files.items()}
        loads |= {name: openvino_load(file, F32, inputs) for name, file in float_graphs(files).items()}
        return throughput_in_turns({REFERENCE: torch_load(denoiser, inputs), **loads}, len(inputs["sample"]), calls)


def _runnable(timed: Candidates, machine: Hardware) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files that can be timed, and the reasons why the others cannot."""
    files, left_out = dict(timed.files), dict(timed.died)
    for name in [name for name in PRECISIONS if not native(name, machine)]:
        left_out[name] = "bfloat16 is emulated here"
        files.pop(name, None)
    for name, file in list(files.items()):
        try:
            read_source(file, shared_core(), timed.batch)
        except FixedBatchError as error:
            left_out[name] = str(error).removeprefix(f"{file}: ")
            del files[name]
    return files, left_out


def _with_execution(
    row: SpeedRow, file: Path, hint: Mapping[str, str], inputs: Inputs, *, known: Sequence[str], calls: int
) -> SpeedRow:
    """Add to a row what the execution graph of the timed file says about the known layers."""
    compiled = compile_for_latency(file, {**PROFILING, **hint}, len(inputs["sample"]))
    nodes = executed_nodes(compiled)
    row = replace(
        row,
        layers=_layers(nodes, known),
        inference_precision=compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
        kernels=dict(Counter(node.kernel for node in nodes if node.kind in MATRIX_NODES)),
        profile=profile_rows(compiled, inputs, calls),
    )
    if not (file / MANIFEST).is_file():
        return row
    manifest = read_manifest(file)
    attention = attention_precisions(compiled, manifest.get("attention", {}))
    planned = layer_precisions(nodes, manifest["layers"]) | attention
    missed = tuple(name for name, precision in planned.items() if precision not in INT8)
    return replace(row, layers={**row.layers, **planned}, planned=len(planned), planned_float=missed)


def _layers(nodes: Sequence[ExecutedNode], known: Sequence[str]) -> dict[str, str]:
    """Precision of every layer that a matrix node is named after, by its module path in the converted graph or
    alone.
    """
    precisions = {}
    for node in nodes:
        path = traced_path(node.names[0])
        if node.kind in MATRIX_NODES and path in known:
            precisions[path] = node.precision
    return precisions
