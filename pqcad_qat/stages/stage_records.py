"""What the stages of a run note for the stages after them and for the report: one frozen record a stage.

Each is stored in the run's folder when its stage is done, and read back by its type. Not here: the storing
(run_folder.py), and what becomes of them (report_rows.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pqcad_qat.quality.fid_protocol import FidProtocol
from pqcad_qat.quality.fidelity import FidelityFigures
from pqcad_qat.report.record import Hardware, PartRow, ProfileRow, Timing
from pqcad_qat.stages.run_folder import StageRecord
from pqcad_qat.training.transition import Transition


@dataclass(frozen=True)
class CalibrationRecord(StageRecord):
    """The stage `calibration`."""

    set: str  # name of the shared folder


@dataclass(frozen=True)
class TrainingRecord(StageRecord):
    """A stage that trains."""

    transitions: tuple[Transition, ...] = ()  # in the order in which they began


@dataclass(frozen=True)
class IntegerParity:
    """Integers of OpenVINO against integers of PyTorch, of all planned layers."""

    layers_checked: int
    layers_exact: int
    worst_layer: str
    worst_error: int  # largest difference of two accumulators
    exact: Mapping[str, bool]  # layer -> whether all its integers are equal


@dataclass(frozen=True)
class ExportRecord(StageRecord):
    """The stage `export`."""

    precisions: Mapping[str, str]  # planned layer -> what it executed in
    inference_precision: str  # of the layers that execute in floating point
    needs_vnni: tuple[str, ...]  # layers whose sums may overflow on CPUs without VNNI
    parity: IntegerParity
    end_to_end_psnr: float  # dB
    packed_bytes: int  # of the same model, packed
    attention: Mapping[str, str] = field(default_factory=dict)  # planned attention -> what its products executed in
    parts: tuple[PartRow, ...] = ()


@dataclass(frozen=True)
class BaselinesRecord(StageRecord):
    """The stage `baselines`."""

    died: Mapping[str, str] = field(default_factory=dict)  # variant that could not be made or run -> why


@dataclass(frozen=True)
class BenchmarkRecord(StageRecord):
    """The stage `benchmark`."""

    timings: Mapping[str, Timing]  # variant -> one step
    profiles: Mapping[str, tuple[ProfileRow, ...]]  # variant -> where its step's time went
    sizes: Mapping[str, int]  # variant -> bytes on disk, of full precision in memory
    hardware: Hardware


@dataclass(frozen=True)
class SamplesRecord(StageRecord):
    """A stage that samples a variant."""

    steps: int  # of its sampler


@dataclass(frozen=True)
class EvaluationRecord(StageRecord):
    """The stage `evaluation`."""

    figures: Mapping[str, FidelityFigures]  # variant -> what its images are worth
    protocol: FidProtocol | None  # None without a feature network
    hardware: Hardware
    note: str = ""  # what was left out of the figures, and why
