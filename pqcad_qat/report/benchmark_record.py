"""Result of a benchmark as data: the dataclasses behind benchmark.json, each field with its unit.

Not here: how a number was measured (commands/benchmark.py), or how it looks (benchmark_page.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pqcad_qat import __version__
from pqcad_qat.policy.variants import PQCAD_OPENVINO
from pqcad_qat.report.record import Hardware, ProfileRow, Throughput, Timing

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SpeedRow:
    """One candidate at one batch size."""

    name: str  # of a variant, and its setting where there are several rows of one (policy.variants.spec_of)
    latency: Timing  # time of one denoiser call: one denoising step of the batch
    throughput: Throughput | None
    # bytes of all files of what was timed; for PyTorch, which has no files here, of its parameters as float32
    size_bytes: int
    inference_precision: str | None = None  # OpenVINO's INFERENCE_PRECISION_HINT in use
    layers: Mapping[str, str] = field(default_factory=dict)  # convolution or linear layer -> precision it executed in
    planned: int | None = None  # number of our layers and attentions planned for INT8
    planned_float: tuple[str, ...] = ()  # the planned ones that did not execute in INT8
    # OpenVINO's kernel name of a matrix node -> number of nodes
    kernels: Mapping[str, int] = field(default_factory=dict)
    profile: tuple[ProfileRow, ...] = ()
    # of one call of the graph that computes the folder's float steps, where it has such steps
    float_latency: Timing | None = None
    float_throughput: Throughput | None = None


@dataclass(frozen=True)
class Measurement:
    """One instruction set and batch size, timed in one process."""

    isa: str
    batch: int
    hardware: Hardware  # hardware as seen by that process, with its settings
    rows: tuple[SpeedRow, ...]
    left_out: Mapping[str, str]  # candidate -> reason why it could not be timed


@dataclass(frozen=True)
class LoadTime:
    """Time until a deployed folder can predict, with its files in the page cache."""

    weights: str  # format of the weights on disk, as the manifest names it
    size_bytes: int  # bytes of all files of the folder
    verify: Timing  # time to read every file and compute its SHA-256
    read: Timing  # time to read the graph and unpack its weights
    compile: Timing


@dataclass(frozen=True)
class ColdStart:
    """A candidate started in a process of its own, with its files in the page cache."""

    name: str  # as that of its SpeedRow
    image: Timing  # from the start of the process to its first image, or one call where no steps are known
    peak_bytes: int  # largest resident memory of such a process


@dataclass(frozen=True)
class ColdStarts:
    """Cold starts of all candidates, on the native instruction set."""

    batch: int
    rows: tuple[ColdStart, ...]
    left_out: Mapping[str, str]  # candidate -> reason why it has no row


@dataclass(frozen=True)
class SpeedReport:
    """Everything benchmark.json holds."""

    source: str
    weights: str  # origin of our weights, "of the folder" or "random"; the baselines always have random weights
    parameters: int
    sample_shape: tuple[int, int, int]  # (C, H, W)
    steps: int | None  # number of sampling steps that our model was distilled for, if the folder states it
    full_precision_steps: int | None  # number of sampling steps of full precision, also used for the other candidates
    measurements: tuple[Measurement, ...]
    # load times of our folder, on the machine and native instruction set of the first measurement
    loading: tuple[LoadTime, ...]
    cold: ColdStarts | None  # None where the native instruction set is not timed
    left_out: Mapping[str, str]  # instruction set -> reason why nothing was timed under it
    command: str
    created: str  # ISO 8601, UTC
    float_steps: int = 0  # number of our sampling steps that full precision computes
    float_calls: int = 0  # calls of the denoiser in these steps
    ours: str = PQCAD_OPENVINO  # name of our folder's row
    version: str = __version__
    schema_version: int = SCHEMA_VERSION
