"""What a benchmark found, as data: the dataclasses behind benchmark.json, each field with its unit.

Not here: how any number was measured (benchmark.py), or how it looks (benchmark_page.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pqcad_qat import __version__
from pqcad_qat.report.record import Hardware, ProfileRow, Throughput, Timing

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SpeedRow:
    """One candidate at one batch size."""

    name: str  # a key of policy.variants.VARIANTS
    latency: Timing  # of one call: one denoising step of the batch
    throughput: Throughput | None
    size_bytes: int  # every file of what was timed; of PyTorch, which has none here, its parameters as float32
    inference_precision: str | None = None  # OpenVINO's INFERENCE_PRECISION_HINT in use
    layers: Mapping[str, str] = field(default_factory=dict)  # convolution or linear layer -> precision it executed in
    planned: int | None = None  # layers and attentions of ours that are to run in INT8
    planned_float: tuple[str, ...] = ()  # and those of them that did not execute in it
    kernels: Mapping[str, int] = field(default_factory=dict)  # OpenVINO's name of a matrix node's code -> nodes
    profile: tuple[ProfileRow, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One instruction set and batch size, timed in one process."""

    isa: str
    batch: int
    hardware: Hardware  # as that process saw it, with the settings it ran under
    rows: tuple[SpeedRow, ...]
    left_out: Mapping[str, str]  # candidate -> why it could not be timed


@dataclass(frozen=True)
class LoadTime:
    """What it takes until a deployed folder can predict, its files in the page cache."""

    weights: str  # format on disk, as the manifest names it
    size_bytes: int  # every file of the folder
    verify: Timing  # reading every file and its SHA-256
    read: Timing  # the graph, with its weights unpacked
    compile: Timing


@dataclass(frozen=True)
class SpeedReport:
    """Everything benchmark.json holds."""

    source: str
    weights: str  # "of the folder" or "random": of ours; those of the baselines are random always
    parameters: int
    sample_shape: tuple[int, int, int]  # (C, H, W)
    steps: int | None  # sampling steps of an image that ours was distilled for, where the folder says them
    full_precision_steps: int | None  # and those of full precision, with which the other candidates sample
    measurements: tuple[Measurement, ...]
    loading: tuple[LoadTime, ...]  # of ours, on the machine of the first measurement and its native instruction set
    left_out: Mapping[str, str]  # instruction set -> why nothing was timed under it
    command: str
    created: str  # ISO 8601, UTC
    version: str = __version__
    schema_version: int = SCHEMA_VERSION
