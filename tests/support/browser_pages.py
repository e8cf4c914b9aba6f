"""A program that writes the pages that `browser` looks at, of invented numbers: a run's report, a study of many cells
with their pictures, a benchmark, and sensitivities.

    python browser_pages.py FOLDER

Not here: any test.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from benchmark_fixture import record
from report_fixture import fixture_curves, fixture_report, fixture_samples

from pqcad_qat.policy.variants import PQCAD
from pqcad_qat.quantization.layer_sensitivity import LayerSensitivity
from pqcad_qat.report.benchmark_page import write_speed
from pqcad_qat.report.comparison import Run, compare_runs
from pqcad_qat.report.comparison_page import write_comparison
from pqcad_qat.report.report_files import PAGE_FILE, write_report
from pqcad_qat.report.sensitivity_page import Assignment, SensitivityReport, write_sensitivity

WIDTHS = (8, 4, 3, 2)


def main(folder: Path) -> None:
    study(folder)
    write_speed(record(), folder / "benchmark")
    write_sensitivity(sensitivities(), folder / "sensitivity")


def study(folder: Path) -> None:
    """A study of three widths and two seeds, whose cells are reports."""
    runs, report = [], fixture_report()
    for bits in WIDTHS:
        for seed in (0, 1):
            cell = folder / "study" / f"w{bits}a8-momentum-0.9-seed{seed}"
            rows = tuple(
                replace(row, fid_real=8.0 + 10 / bits + seed / 10, latency_ms_per_image=4000.0 / bits)
                if row.name == PQCAD
                else row
                for row in report.variants
            )
            policy = {**report.policy, "name": f"w{bits}a8", "training": {"seed": seed}}
            of_cell = replace(report, policy=policy, seed=seed, variants=rows)
            write_report(cell, of_cell, fixture_curves(), fixture_samples())
            labels = {"policy": f"w{bits}a8", "momentum": "0.9"}
            runs.append(Run(str(cell), labels, of_cell))
    write_comparison(compare_runs("widths", runs, "python -m pqcad_qat sweep widths.yaml"), folder / "study/study.html")
    assert (folder / "study" / "w8a8-momentum-0.9-seed0" / PAGE_FILE).is_file()


def sensitivities() -> SensitivityReport:
    names = [f"up_blocks.{level}.resnets.{part}.conv1" for level in range(6) for part in range(3)]
    layers = tuple(
        LayerSensitivity(name, 1e-5 * (1 + place), {bits: 10.0 ** (-bits / 2) * (1 + place) for bits in WIDTHS})
        for place, name in enumerate(names)
    )
    own, chosen = (Assignment(dict.fromkeys(names, bits), bits * 1000, 0.1 / bits, 0.1 / bits) for bits in (8, 4))
    return SensitivityReport(
        policy="w4a8",
        model="embedded:invented",
        states=64,
        layers=layers,
        parameters=dict.fromkeys(names, 1000),
        full_bytes=72_000,
        budget_bytes=None,
        assignments={"own": own, "chosen": chosen},
        command="python -m pqcad_qat sensitivity w4a8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
