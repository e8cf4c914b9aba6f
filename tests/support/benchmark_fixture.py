"""FIXTURE, not results: an invented benchmark, for rendering and for tests.

Not here: any test.
"""

from __future__ import annotations

from report_fixture import fixture_report

from pqcad_qat.policy.variants import FP32, OV_BF16, OV_FP32, PQCAD_OPENVINO
from pqcad_qat.report.benchmark_record import ColdStart, ColdStarts, LoadTime, Measurement, SpeedReport, SpeedRow
from pqcad_qat.report.record import ProfileRow, Throughput, Timing

FULL = SpeedRow(FP32, Timing(20, 19, 19.5, 21, 9), Throughput(60, 62, 59, 61, 5, 8, 1), 4_000_000)
OURS = SpeedRow(
    PQCAD_OPENVINO,
    Timing(5, 4, 4.6, 5.5, 9),
    Throughput(300, 310, 290, 305, 5, 8, 2),
    1_050_000,
    "bf16",
    {"a": "u8", "b": "i8", "c": "u8", "d": "bf16"},
    3,
    (),
    {"brgconv_avx512_I8": 3},
    (ProfileRow("Convolution", "u8", 3.5, 3), ProfileRow("MVN", "bf16", 0.5, 2)),
)


LOADED = LoadTime("packed", 600_000, Timing(1, 1, 1, 1, 3), Timing(20, 20, 20, 20, 3), Timing(300, 300, 300, 300, 3))

COLD = ColdStarts(
    2,
    (
        ColdStart(OV_FP32, Timing(2000, 1900, 1950, 2100, 5), 400_000_000),
        ColdStart(PQCAD_OPENVINO, Timing(1000, 990, 995, 1010, 5), 100_000_000),
    ),
    {OV_BF16: "its process died of SIGKILL <here>"},
)


def record(steps: int | None = 10, *rows: SpeedRow, batch: int = 2) -> SpeedReport:
    measurement = Measurement(
        "native", batch, fixture_report().hardware, rows or (FULL, OURS), {OV_BF16: "bfloat16 is emulated <here>"}
    )
    left_out = {"avx2_vnni": "this CPU has no avx_vnni"}
    full = steps and 2 * steps
    return SpeedReport(
        "runs/mine",
        "of the folder",
        1_000_000,
        (1, 8, 8),
        steps,
        full,
        (measurement,),
        (LOADED,),
        COLD,
        left_out,
        "again",
        "2000-01-01",
    )
