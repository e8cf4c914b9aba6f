"""Records that the stages of a run write for later stages and for the report: one frozen dataclass a stage.

Each record is stored in the run's folder when its stage is done, and read back by its type. Not here: the storing
(run_folder.py), and the report made from them (report_rows.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pqcad_qat.export.part_parity import PartParity
from pqcad_qat.policy.variants import VARIANTS
from pqcad_qat.quality.fid_protocol import FidProtocol
from pqcad_qat.quality.fidelity import FidelityFigures
from pqcad_qat.report.record import FloatStepsTrial, Hardware, ProfileRow, StepsInPartsTrial, Timing
from pqcad_qat.report.width_choice import WidthChoice
from pqcad_qat.sampling.precision_by_time import NO_FLOAT_STEPS, StepsInFloat
from pqcad_qat.stages.run_folder import StageRecord
from pqcad_qat.training.stage_end import StageEnd
from pqcad_qat.training.transition import Transition


@dataclass(frozen=True)
class CalibrationRecord(StageRecord):
    """Record of the stage `calibration`."""

    set: str  # name of the shared folder


@dataclass(frozen=True)
class FloatStepsRecord(StageRecord):
    """Record of the stage `float-steps`."""

    count: int = 0  # steps of the sampler that full precision computes
    start: float | None = None  # time of the last of them; None for no step
    trials: tuple[FloatStepsTrial, ...] = ()  # what was measured; none where nothing had to be
    stops: tuple[tuple[int, ...], ...] = ()  # the student's steps that are taken in parts: times of each
    parts_trials: tuple[StepsInPartsTrial, ...] = ()  # what decided how many of them are

    @property
    def time(self) -> float:
        """The time from which on full precision computes; infinity for no step."""
        return NO_FLOAT_STEPS if self.start is None else self.start

    def of(self, variant: str) -> StepsInFloat:
        """The steps of a variant that full precision computes: none of one that is full precision itself."""
        spec = VARIANTS[variant]
        if not spec.quantized:
            return StepsInFloat()
        return StepsInFloat(self.time, self.stops if spec.student_steps else ())


@dataclass(frozen=True)
class StepCostsRecord(StageRecord):
    """Record of the stage `step-costs`."""

    costs: tuple[tuple[float, float], ...] = ()  # (time, squared change of the image for one of the prediction)


@dataclass(frozen=True)
class WidthsRecord(StageRecord):
    """Record of the stage `widths`."""

    bits: Mapping[str, int] = field(default_factory=dict)  # layer -> width, without those in floating point
    choice: WidthChoice | None = None


@dataclass(frozen=True)
class TrainingRecord(StageRecord):
    """Record of a training stage."""

    transitions: tuple[Transition, ...] = ()  # in the order in which they began
    end: StageEnd | None = None  # None for a stage of an earlier version


@dataclass(frozen=True)
class IntegerParity:
    """Comparison of the integers of OpenVINO with those of PyTorch, over all planned layers."""

    layers_checked: int
    layers_exact: int
    worst_layer: str
    worst_error: int  # largest difference of two accumulators
    exact: Mapping[str, bool]  # layer -> whether all its integers equal PyTorch's


@dataclass(frozen=True)
class ExportRecord(StageRecord):
    """Record of the stage `export`."""

    precisions: Mapping[str, str]  # planned layer -> precision it executed in
    inference_precision: str  # precision of the layers that execute in floating point
    needs_vnni: tuple[str, ...]  # layers whose sums may overflow on CPUs without VNNI
    parity: IntegerParity
    end_to_end_psnr: float  # PSNR in dB
    packed_bytes: int = 0  # size of the same model in packed format; 0 where it was not written
    # planned attention -> precision its matrix products executed in
    attention: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[PartParity, ...] = ()  # pipeline parts of the deployed folder
    # planned layers that execute in INT8 where a runtime compiles the graph for any size; None for one of one size
    any_size_int8: int | None = None


@dataclass(frozen=True)
class BaselinesRecord(StageRecord):
    """Record of the stage `baselines`."""

    died: Mapping[str, str] = field(default_factory=dict)  # variant that could not be made or run -> reason
    # setting of NNCF -> mean squared error of its output on held-out states, None where it failed
    nncf: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkRecord(StageRecord):
    """Record of the stage `benchmark`."""

    timings: Mapping[str, Timing]  # variant -> timing of one denoiser call
    profiles: Mapping[str, tuple[ProfileRow, ...]]  # variant -> time of one denoiser call by kind of node
    sizes: Mapping[str, int]  # variant -> bytes on disk; for full precision, bytes in memory
    hardware: Hardware
    float_step: Timing | None = None  # one call of the full-precision graph that the deployed folder holds


@dataclass(frozen=True)
class SamplesRecord(StageRecord):
    """Record of a stage that samples a variant."""

    steps: int = 0  # number of sampling steps
    runtime: str = ""  # what computed it, where that is not the runtime of the variant


@dataclass(frozen=True)
class EvaluationRecord(StageRecord):
    """Record of the stage `evaluation`."""

    figures: Mapping[str, FidelityFigures]  # variant -> figures of quality of its images
    protocol: FidProtocol | None  # None without a feature network
    hardware: Hardware
    note: str = ""  # reason for figures that are missing
    clip: str = ""  # CLIP model of the CLIP scores; empty for none
