"""The table of variants: which stages they take, that no other file spells their names, and that a row more is all
that one more variant takes.

Not here: runs of all of them (test_run.py).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import POLICIES, QUIET, REPOSITORY, environment, tiny_overrides

from pqcad_qat.policy.variants import (
    DEPLOYED,
    EVERY_RUN,
    FIXED_BIT,
    FLOAT_STEPS,
    FP32,
    FP32_HALF,
    NNCF_INT8,
    PQ,
    PQ_DISTILLED,
    PQCAD,
    PQCAD_OPENVINO,
    PTQ,
    REFERENCE,
    STAGES,
    STEP_COSTS,
    TRAINED,
    VARIANTS,
    default_variants,
    exporting,
    run_variants,
    stages_of,
)


def test_by_default_a_run_makes_all_but_what_takes_no_training_and_deploys_the_student() -> None:
    assert set(default_variants((PQCAD,))) == set(VARIANTS) - {*DEPLOYED.values()} | {PQCAD_OPENVINO}


@pytest.mark.parametrize(
    ("deployed", "trains"),
    [
        ((PTQ,), []),
        ((FIXED_BIT,), [FIXED_BIT]),
        ((PQ,), [PQ]),
        ((PQ_DISTILLED,), [PQ, PQ_DISTILLED]),
        ((PTQ, FIXED_BIT), [FIXED_BIT]),
        ((PQCAD,), [PQ, FIXED_BIT, PQ_DISTILLED, PQCAD]),
    ],
)
def test_what_is_deployed_decides_what_is_trained(deployed: tuple[str, ...], trains: list[str]) -> None:
    rows = default_variants(deployed)
    stages = stages_of(rows)
    assert [stage for stage in stages if stage in TRAINED] == trains
    assert [stage for stage in stages if stage.startswith("export")] == [*map(exporting, deployed)]
    assert {*deployed, *(DEPLOYED[name] for name in deployed)} < {*rows}


def test_no_stage_is_of_no_run_and_every_stage_that_leaves_weights_runs() -> None:
    for spec in VARIANTS.values():
        stages = stages_of((spec.name,))
        assert set(spec.stages) <= set(STAGES)
        assert spec.weights_from is None or spec.weights_from in stages


def test_by_default_every_stage_runs_and_a_stage_follows_what_it_needs() -> None:
    assert stages_of(default_variants((PQCAD,))) == (
        *("calibration", FLOAT_STEPS, STEP_COSTS, PTQ, PQ, FIXED_BIT, "teacher", PQ_DISTILLED, PQCAD),
        *(exporting(PQCAD), "baselines", "benchmark", "samples", "evaluation"),
    )


@pytest.mark.parametrize(
    ("listed", "stages"),
    [
        ((FP32, FP32_HALF), ()),
        ((PTQ,), (FLOAT_STEPS, PTQ)),
        ((FIXED_BIT,), (FLOAT_STEPS, STEP_COSTS, PTQ, FIXED_BIT)),
        ((PQ,), (FLOAT_STEPS, STEP_COSTS, PTQ, PQ)),
        ((PQ_DISTILLED,), (FLOAT_STEPS, STEP_COSTS, PTQ, PQ, "teacher", PQ_DISTILLED)),
        ((FIXED_BIT, PQCAD), (FLOAT_STEPS, STEP_COSTS, PTQ, PQ, FIXED_BIT, "teacher", PQCAD)),
        ((PQCAD_OPENVINO,), (FLOAT_STEPS, STEP_COSTS, PTQ, PQ, "teacher", PQCAD, exporting(PQCAD), "benchmark")),
        ((NNCF_INT8,), (FLOAT_STEPS, "baselines", "benchmark")),
    ],
)
def test_a_run_takes_only_the_stages_of_what_is_listed(listed: tuple[str, ...], stages: tuple[str, ...]) -> None:
    assert [stage for stage in stages_of(listed) if stage not in EVERY_RUN] == list(stages)


def test_full_precision_is_always_made_and_nothing_else_that_is_not_listed() -> None:
    assert run_variants((PQ, PTQ)) == (REFERENCE, PTQ, PQ)


def test_a_stage_that_trains_is_named_as_the_variant_that_it_makes() -> None:
    assert all(name in stages_of((name,)) for name in VARIANTS if name in TRAINED)
    assert set(TRAINED) <= set(VARIANTS)


ELSEWHERE = re.compile("|".join(re.escape(name) for name in sorted(VARIANTS, key=len, reverse=True) if "-" in name))
"""Names that say nothing but a variant, wherever in a text they stand."""

LISTED = re.compile(r"variants=\[(.*)\]")
"""Where a policy lists them."""

ARITHMETIC = {
    FP32: (
        "weight_files.py",
        "training_sections.py",
        "value_types.py",
        "trainer.py",
        "test_policy_schema.py",
        "two_processes.py",
    )
}
"""Where a name is that of a floating-point format; tests of training have it too."""


def spelled(file: Path) -> set[str]:
    """The variants that the strings of a file name, its docstrings aside."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose
    ]
    listed = {name for text in texts for names in LISTED.findall(text) for name in re.findall(r"[\w-]+", names)}
    alone = {text for text in texts if text in VARIANTS} | (listed & VARIANTS.keys())
    return alone | {name for text in texts for name in ELSEWHERE.findall(text)}


def test_no_other_file_spells_the_name_of_a_variant() -> None:
    files = [file for room in ("pqcad_qat", "tests") for file in (REPOSITORY / room).rglob("*.py")]
    found = {file.relative_to(REPOSITORY): spelled(file) for file in files if file.name != "variants.py"}
    for name, allowed in ARITHMETIC.items():
        for file in found:
            if file.name in allowed or file.parent.name == "training":
                found[file].discard(name)
    assert {str(file): names for file, names in found.items() if names} == {}


ANOTHER = """
import sys, types
from pathlib import Path

import pqcad_qat.policy

row = 'VariantSpec("another", "one row more", SIMULATED, FIXED_BIT, student_steps=True, stages=(FIXED_BIT,)),'
head = "for spec in (  # in the order of the tables"
source = Path(pqcad_qat.policy.__path__[0], "variants.py").read_text(encoding="utf-8")
assert source.count(head) == 1
module = sys.modules["pqcad_qat.policy.variants"] = types.ModuleType("pqcad_qat.policy.variants")
exec(source.replace(head, f"{head}\\n{row}"), vars(module))

from pqcad_qat.cli import main
from pqcad_qat.policy.loading import json_schema
from pqcad_qat.report.comparison import compare_runs, named_runs
from pqcad_qat.report.comparison_page import figure_chart
from pqcad_qat.report.report_files import read_report

assert '"another"' in str(json_schema()).replace("'", '"')
folder = Path(sys.argv[2]) / "run"
try:
    main(["run", sys.argv[1], "--out", str(folder), *sys.argv[3:]])
except SystemExit as ended:
    assert not ended.code
first, *others = read_report(folder).variants
assert (first.name, first.steps) == ("another", 2) and first.psnr_fp, first
page = (folder / "report.html").read_text(encoding="utf-8")
assert "one row more" in page and "images by another" in page
comparison = compare_runs("one", named_runs({"one": read_report(folder)}), "")
assert "another" in figure_chart(comparison.parts[0])
"""
"""A program that reads the table with a row more, and makes a run of it."""


@pytest.mark.long
@pytest.mark.slow
def test_a_row_more_is_in_the_schema_in_a_run_and_in_its_report_and_charts(tiny_folder: Path, tmp_path: Path) -> None:
    few = ("progressive.steps=2", "evaluation.images=2", "evaluation.features=none", *QUIET)
    overrides = tiny_overrides(tiny_folder, "evaluation.variants=[another]", *few)
    command = [sys.executable, "-c", ANOTHER, POLICIES / "smoke.yaml", tmp_path]
    command += [text for override in overrides for text in ("--set", override)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
