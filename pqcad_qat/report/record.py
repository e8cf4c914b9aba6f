"""What a run found, as data: the dataclasses behind report.json, each field with its unit.

Not here: writing, reading or drawing them (report_files.py, page.py, figures.py), or how any number was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from pqcad_qat.policy.variants import VARIANTS
from pqcad_qat.quality.fid_protocol import FidProtocol
from pqcad_qat.training.transition import Transition

SCHEMA_VERSION = 1
Comparison = Literal["<=", ">=", "=="]


@dataclass(frozen=True)
class Hardware:
    """Where the timings were taken."""

    cpu: str  # model name, family and number, "unknown" where the system does not say
    isa: tuple[str, ...]  # of avx2, avx_vnni, avx512_vnni, avx512_bf16, amx_int8, amx_bf16: those that the CPU has
    cores: int  # usable by this process
    versions: Mapping[str, str]  # python and every library that decides a number
    native_bf16: bool | None = None  # bfloat16 arithmetic in hardware, after any cap of ONEDNN_MAX_CPU_ISA
    settings: Mapping[str, str] = field(default_factory=dict)  # environment variables set that change timings


WIDEST = 0.2
"""Quartiles of a measurement may lie as far apart as this share of its median; beyond, the machine was busy with
something else.

Calls of a third of a millisecond, too short to be interrupted, spread by 0.005 to 0.15 over thirty runs; calls of 18 ms
on two cores that fifteen other programs used spread by 0.13 to 0.35, and their medians were three to seven times too
long.
"""

UNSTEADY = "unsteady"
"""What stands beside such a figure."""

UNSTEADY_NOTE = (
    f"{UNSTEADY}: quartiles further apart than {WIDEST:.0%} of the median, as where other programs run "
    "meanwhile. No target is held against such a time: measure again on an idle machine."
)


@dataclass(frozen=True)
class Timing:
    """The distribution of one candidate's repeated runs, in milliseconds a call."""

    median_ms: float
    minimum_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    runs: int

    @property
    def unsteady(self) -> bool:
        """Whether it spreads too widely to mean something."""
        return self.upper_quartile_ms - self.lower_quartile_ms > WIDEST * self.median_ms


@dataclass(frozen=True)
class Throughput:
    """The distribution of one candidate's bursts, in images a second that are taken one denoising step further."""

    median: float
    maximum: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    calls: int  # of a burst
    in_flight: int  # calls at a time

    @property
    def unsteady(self) -> bool:
        """As of a Timing."""
        return self.upper_quartile - self.lower_quartile > WIDEST * self.median


@dataclass(frozen=True)
class VariantRow:
    """One row of the result. A number nobody measured is None, never 0."""

    name: str  # a key of policy.variants.VARIANTS
    runtime: str  # as there
    weight_bits: float | None  # mean over planned layers by parameters, or the one width
    activation_bits: float | None
    steps: int  # sampling steps of one image
    size_bytes: int | None = None  # every file needed to run the denoiser; the same files that were timed
    latency_ms_per_step: float | None = None  # median, of one image unless the policy's export batch says otherwise
    latency_ms_per_image: float | None = None
    fid_real: float | None = None  # Frechet distance to the real reference
    fid_fp: float | None = None  # Frechet distance to full precision's images
    psnr_fp: float | None = None  # dB, image by image against full precision on the same seeds
    ssim_fp: float | None = None  # 0 to 1, likewise
    passes: int = 1  # of the denoiser in a step: 2 under classifier-free guidance, and an image's time counts both
    did_not_run: str = ""  # why, of a baseline that could not be made or run: its figures are unknown


@dataclass(frozen=True)
class Parity:
    """Integers of OpenVINO against integers of PyTorch, layer by layer on equal inputs."""

    layers_checked: int
    layers_exact: int
    worst_layer: str | None = None
    worst_error: float | None = None  # largest absolute difference, in quantization steps
    end_to_end_psnr: float | None = None  # dB, whole network on the calibration set


@dataclass(frozen=True)
class Execution:
    """What the compiled model's execution graph says it ran."""

    planned: int  # layers planned for INT8
    executed_int8: int
    float_layers: tuple[
        str, ...
    ] = ()  # layers that executed in floating point: left so by the plan, or listed exceptions
    needs_vnni: tuple[str, ...] = ()  # layers whose sums may overflow on CPUs without VNNI
    # attention planned for INT8 -> what its products executed in
    attention: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A promise, what was measured, and whether it holds (None: not measured here)."""

    name: str
    measured: float | None
    comparison: Comparison
    bound: float
    holds: bool | None
    unit: str = ""  # "x", "%", "layers", "" ...
    note: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One layer of the plan and what became of it."""

    layer: str
    kind: str  # "Conv2d" or "Linear"
    rule: str  # name of the policy's rule that matched
    weight_bits: int | None  # None: stays floating point
    activation_bits: int | None
    ladder: tuple[int, ...] = ()  # widths of the weights over training, first to target
    parameters: int = 0
    planned_execution: str = "int8"  # "int8" or "float"
    executed: str | None = None  # precision in the execution graph: "i8", "u8", "bf16", "f32"
    exact: bool | None = None  # integers equal to PyTorch's


@dataclass(frozen=True)
class ProfileRow:
    """Time spent in one kind of node at one precision, for one call of the network."""

    kind: str  # OpenVINO's layerType: Convolution, FullyConnected, Subgraph, MVN, Reorder, ...
    precision: str  # "i8", "u8", "bf16", "f32", ...
    milliseconds: float
    nodes: int


@dataclass(frozen=True)
class StorageRow:
    """Bytes on disk of one group of layers in the shipped file."""

    group: str
    weights_bytes: int  # integer weights
    scales_bytes: int  # their scales and zero points
    float_bytes: int  # everything else: biases, normalization, layers left in floating point


@dataclass(frozen=True)
class PartRow:
    """A part of the deployed folder beside the denoiser."""

    part: str  # its folder: vae_decoder, text_encoder, ...
    format: str  # "float", "int8-weights", "int8"
    size_bytes: int
    # dB against full precision: of pictures from the set's latents, of the last hidden state of random tokens
    psnr: float | None


@dataclass(frozen=True)
class Reproduction:
    """How to get these numbers again."""

    command: str
    policy_text: str  # YAML, as resolved
    version: str = ""  # of pqcad_qat


@dataclass(frozen=True)
class Series:
    """One quantity over training steps; a value that was not finite is None."""

    stage: str  # the stage, named as the variant that was being trained
    name: str  # "loss", "teacher", "calibration", "loss_momentum", "perturbation", "mean_bits", ...
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Curves:
    """What training logged."""

    losses: tuple[Series, ...] = ()  # one for each stage and term; drawn on a log scale
    momenta: tuple[
        Series, ...
    ] = ()  # of progressive quantization: "loss_momentum", "perturbation" (mean over layers), "mean_bits"
    distances: tuple[
        Series, ...
    ] = ()  # of quantization-aware training: mean || Q(W) - W_0 || / || W_0 ||, W_0 at full precision
    plateau: float | None = None  # the policy's bounds, drawn beside the momenta
    perturbation_bound: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything report.json holds, its keys in this order; a pipeline adds parts by dataclasses.replace."""

    policy: Mapping[str, JsonValue]
    seed: int
    hardware: Hardware
    variants: tuple[VariantRow, ...] = ()
    fid_protocol: FidProtocol | None = None
    bit_schedule: tuple[Transition, ...] = ()
    parity: Parity | None = None
    execution: Execution | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)  # wall seconds by stage, in order
    targets: tuple[Target, ...] = ()
    warnings: tuple[str, ...] = ()
    quality_note: str = ""  # what was left out of the figures of quality, and why; what they are of where not of images
    latency: Mapping[str, Timing] = field(default_factory=dict)  # variant -> distribution of one step
    layers: tuple[LayerRow, ...] = ()
    profiles: Mapping[str, tuple[ProfileRow, ...]] = field(
        default_factory=dict
    )  # variant -> where its step's time went
    storage: tuple[StorageRow, ...] = ()  # of the deployed variant
    parts: tuple[PartRow, ...] = ()  # of the deployed folder, beside the denoiser
    reproduction: Reproduction | None = None
    created: str = ""  # ISO 8601, UTC
    schema_version: int = SCHEMA_VERSION

    @property
    def unsteady(self) -> frozenset[str]:
        """The variants whose times spread too widely to mean something."""
        return unsteady_variants(self.latency)


def unsteady_variants(latency: Mapping[str, Timing]) -> frozenset[str]:
    """The variants that were timed so, and those that have the time of one of them."""
    found = {name for name, timing in latency.items() if timing.unsteady}
    return frozenset(found | {name for name, spec in VARIANTS.items() if spec.timed_as in found})


def target(
    name: str, measured: float | None, comparison: Comparison, bound: float, *, unit: str = "", note: str = ""
) -> Target:
    """A Target whose ``holds`` follows from the numbers; a missing or non-finite measurement gives None."""
    holds = None
    if measured is not None and math.isfinite(measured):
        holds = {"<=": measured <= bound, ">=": measured >= bound, "==": measured == bound}[comparison]
    return Target(name, measured, comparison, bound, holds, unit, note)
