"""FIXTURE, not results: an invented but plausible report, for rendering and for tests.

Not here: any test.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from pqcad_qat.policy.variants import (
    FIXED_BIT,
    FP32,
    FP32_HALF,
    NNCF_INT8,
    OV_BF16,
    OV_FP32,
    PQ,
    PQ_DISTILLED,
    PQCAD,
    PQCAD_OPENVINO,
)
from pqcad_qat.quality.fid_protocol import FidProtocol
from pqcad_qat.report.record import (
    Curves,
    Execution,
    Hardware,
    LayerRow,
    Parity,
    ProfileRow,
    Report,
    Reproduction,
    Series,
    StorageRow,
    Timing,
    VariantRow,
    target,
)
from pqcad_qat.training.transition import Transition

BLOCKS = ("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2")
PQ_STEPS = 600


def fixture_report() -> Report:
    """An invented report with every part filled."""
    layers = fixture_layers()
    return Report(
        policy={
            "name": "w4a8 (FIXTURE, invented numbers)",
            "model": {"source": "embedded:invented"},
            "sampler": {"name": "ddim", "steps": 20},
        },
        seed=0,
        hardware=Hardware(
            "Invented CPU 9000 @ 2.40GHz",
            ("avx2", "avx512_vnni", "avx512_bf16"),
            2,
            {
                "python": "3.11.7",
                "torch": "2.13.0",
                "openvino": "2026.4.1",
                "nncf": "3.4.0",
                "brevitas": "0.13.4",
                "diffusers": "0.42.1",
            },
            native_bf16=True,
        ),
        variants=fixture_variants(),
        fid_protocol=FidProtocol(
            2000, "invented-classifier", "ab" * 32, "60,000 training images (invented)", "ddim", 20, 0
        ),
        bit_schedule=fixture_schedule(layers),
        parity=Parity(len(planned(layers)), len(planned(layers)), "mid_block.resnets.0.conv1", 0.0, 41.7),
        execution=Execution(len(planned(layers)), len(planned(layers)), ("conv_in", "conv_out")),
        timings_s={
            "calibrate": 41.2,
            PQ: 212.0,
            FIXED_BIT: 171.3,
            PQCAD: 96.4,
            "export": 18.8,
            "evaluate": 122.0,
            "benchmark": 24.9,
        },
        targets=(
            target("planned layers that executed in INT8", 55, "==", 55, unit="layers"),
            target(f"milliseconds an image: {PQCAD_OPENVINO} / {OV_BF16}", 0.431, "<=", 0.45, unit="x"),
            target(
                f"milliseconds an image: {PQCAD_OPENVINO} / {OV_FP32}",
                0.243,
                "<=",
                0.20,
                unit="x",
                note="8 % of the step is reorders",
            ),
            target(f"milliseconds an image: {PQCAD_OPENVINO} / fp32", 0.071, "<=", 0.10, unit="x"),
            target("Frechet distance to real: pqcad / fp32", 1.058, "<=", 1.10, unit="x"),
            target("bytes packed / float32 weights", None, "<=", 0.16, unit="x", note="this export keeps int8"),
        ),
        warnings=("up_blocks.2.resnets.1.conv2 oscillates between two levels",),
        latency={FP32: Timing(21.7, 20.4, 21.2, 22.9, 60), PQCAD_OPENVINO: Timing(3.02, 2.91, 2.98, 3.11, 60)},
        layers=layers,
        profiles={
            NNCF_INT8: (
                ProfileRow("Convolution", "i8", 1.31, 38),
                ProfileRow("Subgraph", "bf16", 0.72, 31),
                ProfileRow("MVN", "f32", 0.55, 18),
                ProfileRow("Reorder", "bf16", 0.31, 22),
                ProfileRow("FullyConnected", "i8", 0.30, 12),
                ProfileRow("FullyConnected", "bf16", 0.11, 3),
                ProfileRow("Convolution", "bf16", 0.09, 1),
            ),
            PQCAD_OPENVINO: (
                ProfileRow("Convolution", "u8", 1.22, 36),
                ProfileRow("Subgraph", "bf16", 0.64, 30),
                ProfileRow("MVN", "bf16", 0.51, 18),
                ProfileRow("FullyConnected", "i8", 0.26, 14),
                ProfileRow("Reorder", "bf16", 0.21, 16),
                ProfileRow("Transpose", "bf16", 0.08, 4),
                ProfileRow("Convolution", "bf16", 0.07, 2),
            ),
        },
        storage=(
            *(
                StorageRow(block, 60_000 + 37_000 * i % 170_000, 2_400 + 300 * i, 4_100 + 700 * i)
                for i, block in enumerate(BLOCKS)
            ),
            StorageRow("conv_in", 0, 0, 1_280),
            StorageRow("time_embedding", 20_480, 1_024, 1_024),
        ),
        reproduction=Reproduction("python -m pqcad_qat run policies/w4a8.yaml", "name: w4a8\nseed: 0\n", "0.1.0"),
        created="2000-01-01T00:00:00+00:00",
    )


def fixture_variants() -> tuple[VariantRow, ...]:
    """One invented row for each variant."""
    simulated = "PyTorch, simulated"
    return (
        VariantRow(FP32, "PyTorch", 32, 32, 20, 6_540_000, 21.7, 434.0, 8.31, None, None, None),
        VariantRow(FP32_HALF, "PyTorch", 32, 32, 10, 6_540_000, 21.7, 217.0, 12.92, 3.1, 21.9, 0.861),
        VariantRow(OV_FP32, "OpenVINO", 32, 32, 20, 6_900_000, 6.21, 124.2),
        VariantRow(OV_BF16, "OpenVINO", 16, 16, 20, 6_900_000, 3.5, 70.0),
        VariantRow(NNCF_INT8, "OpenVINO", 8, 8, 20, 2_050_000, 3.39, 67.8, 9.88, 0.61, 27.4, 0.942),
        VariantRow(FIXED_BIT, simulated, 4.18, 8, 20, None, None, None, 8.74, 0.33, 28.1, 0.951),
        VariantRow(PQ, simulated, 4.18, 8, 20, None, None, None, 8.52, 0.29, 28.9, 0.957),
        VariantRow(PQ_DISTILLED, simulated, 4.18, 8, 10, None, None, None, 10.6, 1.2, 24.0, 0.9),
        VariantRow(PQCAD, simulated, 4.18, 8, 10, None, None, None, 8.79, 0.41, 25.6, 0.921),
        VariantRow(PQCAD_OPENVINO, "OpenVINO", 4.18, 8, 10, 1_690_000, 3.02, 30.2, 8.81, 0.42, 25.5, 0.920),
    )


def fixture_layers() -> tuple[LayerRow, ...]:
    """55 planned layers, and two that stay in floating point."""
    rows = [LayerRow("conv_in", "Conv2d", "conv_in", None, None, (), 320, "float", "bf16")]
    for index, block in enumerate(BLOCKS):
        for conv in range(8 if index else 7):
            name = f"{block}.resnets.{conv // 3}.{('conv1', 'conv2', 'time_emb_proj')[conv % 3]}"
            rows.append(LayerRow(name, "Conv2d", "*", 4, 8, (8, 6, 4), 9_216 * (1 + index), "int8", "u8", True))
    rows.append(LayerRow("conv_out", "Conv2d", "conv_out", None, None, (), 289, "float", "bf16"))
    return tuple(rows)


def planned(layers: tuple[LayerRow, ...]) -> list[LayerRow]:
    return [row for row in layers if row.weight_bits is not None]


def fixture_schedule(layers: tuple[LayerRow, ...]) -> tuple[Transition, ...]:
    """Transitions from 8 to 6 to 4 bits, a quarter of the layers at a time, the last ones by the deadline."""
    generator, moves = np.random.default_rng(0), []
    for rung, (start, first, second) in enumerate(((40, 8, 6), (190, 6, 4))):
        for place, index in enumerate(generator.permutation(len(planned(layers)))):
            step = start + 34 * (place // 14) + 7 * rung
            late = rung == 1 and place >= 50
            perturbation = float((0.03 if rung == 0 else 0.09) * generator.lognormal(0, 0.2))
            cause = "deadline" if late else "momentum"
            moves.append(
                Transition(
                    400 if late else step, planned(layers)[index].layer, first, second, perturbation, cause, step - 9
                )
            )
    return tuple(sorted(moves, key=lambda move: move.step))


def fixture_curves() -> Curves:
    """Invented losses that fall, and paces."""
    generator = np.random.default_rng(1)

    def series(stage: str, name: str, steps: int, start: float, end: float) -> Series:
        values = [
            end + (start - end) * math.exp(-6 * step / steps) * float(generator.lognormal(0, 0.12))
            for step in range(steps)
        ]
        return Series(stage, name, tuple(range(steps)), tuple(values))

    losses = (
        series(PQ, "loss", PQ_STEPS, 0.02, 0.0016),
        series(FIXED_BIT, "loss", PQ_STEPS, 0.05, 0.0021),
        series(PQ_DISTILLED, "teacher", 300, 0.03, 0.006),
        series(PQCAD, "teacher", 300, 0.03, 0.007),
        series(PQCAD, "calibration", 300, 0.035, 0.004),
    )
    paces = (
        series(PQ, "pace", PQ_STEPS, 0.004, 0.005),
        series(PQ, "weight_change", PQ_STEPS, 0.004, 0.005),
        series(PQ, "mean_bits", PQ_STEPS, 8, 4),
    )
    steps = tuple(range(1, 401, 5))
    distances = tuple(
        Series(stage, "weight_distance", steps, tuple(0.1 + scale * n / 400 for n in steps))
        for stage, scale in ((PQ, 0.1), (FIXED_BIT, 0.2))
    )
    return Curves(losses, paces, distances, 0.005)


def fixture_samples(count: int = 12) -> dict[str, np.ndarray]:
    """Invented blobs (K, 1, 32, 32) in [-1, 1], the same for all variants except for noise."""
    generator = np.random.default_rng(2)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    centres = generator.uniform(-0.3, 0.3, (count, 2))
    blobs = np.stack([2 * np.exp(-6 * ((x - a) ** 2 + (y - b) ** 4)) - 1 for a, b in centres])[:, None]
    names = (FP32, FP32_HALF, NNCF_INT8, FIXED_BIT, PQ, PQ_DISTILLED, PQCAD, PQCAD_OPENVINO)
    return {
        name: np.clip(blobs + generator.normal(0, 0.03 * i, blobs.shape), -1, 1).astype(np.float32)
        for i, name in enumerate(names)
    }


def minimal_report() -> Report:
    """A report with only the required fields."""
    full = fixture_report()
    return Report(
        policy={"model": {"source": "embedded:invented"}}, seed=1, hardware=replace(full.hardware, native_bf16=None)
    )
