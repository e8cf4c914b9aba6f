"""Result of a run as data: the dataclasses behind report.json, each field with its unit.

Not here: writing, reading or drawing them (report_files.py, page.py, figures.py), or how a number was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from pqcad_qat.export.part_parity import PartParity
from pqcad_qat.policy.variants import PQCAD_OPENVINO, VARIANTS
from pqcad_qat.quality.fid_protocol import FD, FidProtocol
from pqcad_qat.report.width_choice import WidthChoice
from pqcad_qat.training.stage_end import StageEnd
from pqcad_qat.training.transition import Transition

SCHEMA_VERSION = 2
Comparison = Literal["<=", ">=", "=="]


@dataclass(frozen=True)
class Hardware:
    """Machine on which the timings were taken."""

    cpu: str  # model name, family and number; "unknown" if the system does not report it
    isa: tuple[str, ...]  # those of avx2, avx_vnni, avx512_vnni, avx512_bf16, amx_int8, amx_bf16 that the CPU has
    cores: int  # number of cores usable by this process
    versions: Mapping[str, str]  # versions of Python and of every library that affects a number
    native_bf16: bool | None = None  # whether bfloat16 arithmetic runs in hardware, after any cap of ONEDNN_MAX_CPU_ISA
    settings: Mapping[str, str] = field(default_factory=dict)  # environment variables that are set and change timings


WIDEST = 0.2
"""Largest distance of the quartiles of a steady measurement, as a share of its median. A wider spread means that the
machine was busy with something else.

Calls of a third of a millisecond, too short to be interrupted, spread by 0.005 to 0.15 over thirty runs. Calls of 18 ms
on two cores that fifteen other programs used spread by 0.13 to 0.35, and their medians were three to seven times too
long.
"""

UNSTEADY = "unsteady"
"""Mark beside a figure whose measurement spreads more widely than WIDEST."""

UNSTEADY_NOTE = (
    f"{UNSTEADY}: the quartiles lie further apart than {WIDEST:.0%} of the median, as happens while other programs "
    "run. No target is checked against such a time: measure again on an idle machine."
)


@dataclass(frozen=True)
class Timing:
    """Distribution of one candidate's repeated runs, in milliseconds a call."""

    median_ms: float
    minimum_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    runs: int

    @property
    def unsteady(self) -> bool:
        """Whether the quartiles are too far apart for the timing to be meaningful."""
        return self.upper_quartile_ms - self.lower_quartile_ms > WIDEST * self.median_ms


@dataclass(frozen=True)
class Throughput:
    """Distribution of one candidate's bursts of calls, in images a second that advance by one denoising step."""

    median: float
    maximum: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    calls: int  # number of calls in a burst
    in_flight: int  # number of simultaneous calls

    @property
    def unsteady(self) -> bool:
        """Whether the quartiles are too far apart, as for a Timing."""
        return self.upper_quartile - self.lower_quartile > WIDEST * self.median


@dataclass(frozen=True)
class FloatStepsTrial:
    """How near a quantized model comes to full precision if full precision computes its first steps."""

    steps: int  # sampling steps of an image
    float_steps: int  # number of first steps that full precision computed
    psnr: float  # dB, image by image against full precision in as many steps


@dataclass(frozen=True)
class StepsInPartsTrial:
    """How near full precision comes to its images in all steps if it takes the student's steps, the first in parts."""

    in_parts: int  # number of first steps that are taken in the teacher's shorter ones
    psnr: float  # dB, image by image against full precision in all steps


def steps_text(steps: int, float_steps: int, float_calls: int) -> str:
    """Number of sampling steps of an image, with how many of them full precision computes, in how many calls."""
    if float_calls == float_steps:
        return f"{steps} ({float_steps} float)" if float_steps else str(steps)
    return f"{steps} ({float_steps} float, {float_calls} calls)"


@dataclass(frozen=True)
class VariantRow:
    """One row of the result; a number that was not measured is None, never 0."""

    name: str  # a key of policy.variants.VARIANTS
    runtime: str  # what computed its images: the variant's in policy.variants.VARIANTS, or IN_INT8
    weight_bits: float | None  # bits; mean over planned layers by parameters, or the single width
    activation_bits: float | None
    steps: int  # number of sampling steps of one image
    size_bytes: int | None = None  # bytes of every file needed to run the denoiser, the same files that were timed
    latency_ms_per_step: float | None = None  # median for one image, unless the policy's export batch differs
    latency_ms_per_image: float | None = None
    fid_real: float | None = None  # Frechet distance to the reference, real or as the protocol says
    fid_fp: float | None = None  # Frechet distance to the full-precision images
    psnr_fp: float | None = None  # dB, image by image against full precision on the same seeds
    ssim_fp: float | None = None  # 0 to 1, image by image against full precision on the same seeds
    float_steps: int = 0  # how many of the steps full precision computes, the first ones
    float_calls: int = 0  # denoiser calls of these steps: more of them where one is taken in parts
    passes: int = 1  # denoiser calls a sampling step: 2 under classifier-free guidance, both counted in an image's time
    did_not_run: str = ""  # reason why a baseline could not be made or run; its figures are unknown
    kid_real: float | None = None  # kernel distance to the real reference, times 1,000
    kid_real_error: float | None = None  # its standard error
    precision: float | None = None  # share of its images that look like the reference's, 0 to 1
    recall: float | None = None  # share of the reference that its images cover, 0 to 1
    clip_score: float | None = None  # mean score of its images and their prompts by a CLIP model, 0 to 100
    clip_score_error: float | None = None  # its standard error

    @property
    def steps_text(self) -> str:
        return steps_text(self.steps, self.float_steps, self.float_calls)


@dataclass(frozen=True)
class Parity:
    """Comparison of the integers of OpenVINO with those of PyTorch, layer by layer on equal inputs."""

    layers_checked: int
    layers_exact: int
    worst_layer: str | None = None
    worst_error: float | None = None  # largest absolute difference, in quantization steps
    end_to_end_psnr: float | None = None  # dB, whole network on the calibration set


@dataclass(frozen=True)
class Execution:
    """Layers that executed in INT8, according to the execution graph of the compiled model."""

    planned: int  # number of layers planned for INT8
    executed_int8: int
    float_layers: tuple[str, ...] = ()  # layers in floating point, by the plan or as listed exceptions
    needs_vnni: tuple[str, ...] = ()  # layers whose sums may overflow on CPUs without VNNI
    # attention planned for INT8 -> precision its matrix products executed in
    attention: Mapping[str, str] = field(default_factory=dict)
    any_size_int8: int | None = None  # as executed_int8, compiled for any batch and size; None for one of one size


@dataclass(frozen=True)
class Proof:
    """What a deployed folder was proven to compute."""

    folder: str  # its name in the run's folder
    execution: Execution
    parity: Parity


@dataclass(frozen=True)
class Target:
    """A target, its measured value, and whether it holds (None: not measured here)."""

    name: str
    measured: float | None
    comparison: Comparison
    bound: float
    holds: bool | None
    unit: str = ""  # "x", "%", "layers", "" ...
    note: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One layer of the plan and its result."""

    layer: str
    kind: str  # "Conv2d" or "Linear"
    rule: str  # name of the policy's rule that matched
    weight_bits: int | None  # None: stays floating point
    activation_bits: int | None
    ladder: tuple[int, ...] = ()  # weight widths over training, from the first to the target
    parameters: int = 0
    planned_execution: str = "int8"  # "int8" or "float"
    executed: str | None = None  # precision in the execution graph: "i8", "u8", "bf16", "f32"
    exact: bool | None = None  # whether its integers equal PyTorch's


@dataclass(frozen=True)
class ProfileRow:
    """Time spent in one kind of node at one precision, for one denoiser call."""

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
class Reproduction:
    """Command and policy that reproduce the report."""

    command: str
    policy_text: str  # resolved policy as YAML
    version: str = ""  # version of pqcad_qat


HELD_OUT = "held_out"
"""Name of the series of the held-out loss, which is drawn dashed beside the terms of the training loss."""


@dataclass(frozen=True)
class Series:
    """One quantity over training steps; a value that was not finite is None."""

    stage: str  # name of the variant that the stage trains
    name: str  # "loss", "held_out", "teacher", "calibration", "pace", "weight_change", "mean_bits", ...
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Curves:
    """Series that training logged."""

    losses: tuple[Series, ...] = ()  # one series for each stage and loss term, drawn on a logarithmic scale
    # progressive quantization: "pace", "weight_change" (largest over the layers), "mean_bits"
    paces: tuple[Series, ...] = ()
    # quantization-aware training: mean || Q(W) - W_0 || / || W_0 ||, W_0 at full precision
    distances: tuple[Series, ...] = ()
    perturbation: float | None = None  # bound of the weights' change by a step, from the policy


@dataclass(frozen=True)
class Report:
    """Content of report.json, with its keys in this order; a caller may add parts by dataclasses.replace."""

    policy: Mapping[str, JsonValue]
    seed: int
    hardware: Hardware
    variants: tuple[VariantRow, ...] = ()
    fid_protocol: FidProtocol | None = None
    bit_schedule: tuple[Transition, ...] = ()
    parity: Parity | None = None
    execution: Execution | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)  # stage -> wall time in seconds, in order
    ours: str = PQCAD_OPENVINO  # deployed variant in openvino/, if there is one: `parity` and `execution` are its proof
    also_deployed: Mapping[str, Proof] = field(default_factory=dict)  # further deployed variants
    targets: tuple[Target, ...] = ()
    warnings: tuple[str, ...] = ()
    clip: str = ""  # name and SHA-256 of the CLIP model of the CLIP scores; empty for none
    quality_note: str = ""  # reason for missing figures of quality, and what the figures refer to if not to images
    # variant -> distribution of the time of one denoiser call
    latency: Mapping[str, Timing] = field(default_factory=dict)
    layers: tuple[LayerRow, ...] = ()
    # variant -> time of one denoiser call by kind of node
    profiles: Mapping[str, tuple[ProfileRow, ...]] = field(default_factory=dict)
    storage: tuple[StorageRow, ...] = ()  # storage of the deployed variant
    parts: tuple[PartParity, ...] = ()  # pipeline parts of the deployed folder
    float_steps: tuple[FloatStepsTrial, ...] = ()  # what decided how many first steps full precision computes
    steps_in_parts: tuple[StepsInPartsTrial, ...] = ()  # what decided how many of the student's it takes in parts
    nncf: Mapping[str, float | None] = field(default_factory=dict)  # setting of NNCF -> error on held-out states
    widths: WidthChoice | None = None  # layers' widths that were measured; None where the policy's rules give them
    training: Mapping[str, StageEnd] = field(default_factory=dict)  # training stage -> what it came to
    reproduction: Reproduction | None = None
    created: str = ""  # ISO 8601, UTC
    schema_version: int = SCHEMA_VERSION

    @property
    def distance(self) -> str:
        """Name of the Frechet distance between images, which depends on the feature network."""
        return FD if self.fid_protocol is None else self.fid_protocol.distance

    @property
    def against(self) -> str:
        """Short word for what the images are compared with."""
        return "real" if self.fid_protocol is None else self.fid_protocol.against

    @property
    def unsteady(self) -> frozenset[str]:
        """Variants whose times spread too widely to be meaningful."""
        return unsteady_variants(self.latency)


def unsteady_variants(latency: Mapping[str, Timing]) -> frozenset[str]:
    """Variants with an unsteady timing, and variants that share the timing of one of them."""
    unsteady = {name for name, timing in latency.items() if timing.unsteady}
    return frozenset(unsteady | {name for name, spec in VARIANTS.items() if spec.timed_as in unsteady})


def target(
    name: str, measured: float | None, comparison: Comparison, bound: float, *, unit: str = "", note: str = ""
) -> Target:
    """Build a Target whose ``holds`` follows from the numbers; it is None if the measurement is missing or not
    finite.
    """
    holds = None
    if measured is not None and math.isfinite(measured):
        holds = {"<=": measured <= bound, ">=": measured >= bound, "==": measured == bound}[comparison]
    return Target(name, measured, comparison, bound, holds, unit, note)
