"""What each stage depends on: which are done again for a change of each kind, and that the end is that of a new run.

Not here: how recipes are recorded and compared (test_run_folder.py).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import POLICIES, tiny_overrides, without_page

from pqcad_qat.commands import run as pipeline
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import (
    DEPLOYED,
    FIXED_BIT,
    FLOAT_STEPS,
    FP32,
    FP32_HALF,
    NNCF_INT8,
    PQ,
    PQ_DISTILLED,
    PQ_HALF,
    PQCAD,
    PQCAD_OPENVINO,
    PTQ,
    STEP_COSTS,
    VARIANTS,
    default_variants,
    exporting,
)
from pqcad_qat.stages.prepared import Prepared, prepare
from pqcad_qat.stages.recipe import decides, reason_to_repeat, record_of
from pqcad_qat.stages.stage_dependencies import recipes

Records = dict[str, dict[str, object]]

OF_THE_FOLDER = {exporting(PQCAD), "benchmark", f"samples-{PQCAD_OPENVINO}", "evaluation"}
FLOATING = {f"samples-{FP32}", f"samples-{FP32_HALF}"}
IMAGES = {f"samples-{name}" for name in default_variants((PQCAD,)) if VARIANTS[name].sampled}
STUDENTS = {PQCAD, f"samples-{PQCAD}", *OF_THE_FOLDER}
DISTILLED = {PQ_DISTILLED, f"samples-{PQ_DISTILLED}", *STUDENTS}
QUANTIZED = {PQ, f"samples-{PQ}", f"samples-{PQ_HALF}", "teacher", *DISTILLED}
CONTROL = {FIXED_BIT, f"samples-{FIXED_BIT}"}
ROUNDED = {PTQ, f"samples-{PTQ}", *CONTROL, *QUANTIZED}
ALL = {"calibration", FLOAT_STEPS, STEP_COSTS, "baselines", *ROUNDED, *IMAGES}

AGAIN: dict[str, set[str]] = {  # an override -> the stages that it does again
    "training.samples_every=0": set(),
    "training.trackers=[]": set(),
    "training.checkpoint_every=2": set(),
    "training.keep_checkpoints=5": set(),
    "training.on_divergence=stop": set(),
    "training.max_steps=50": set(),  # of stages that find their number of steps
    "training.minutes=5": set(),
    "progressive.steps=auto": {*CONTROL, *QUANTIZED},
    "distillation.steps=auto": DISTILLED,
    "training.activation_checkpointing=true": set(),
    "calibration.batch_size=2": set(),
    "evaluation.features=none": {"evaluation"},
    f"evaluation.variants=[{FP32}, {PQ}]": {"evaluation"},
    "evaluation.seed=5": {*IMAGES, "evaluation"},
    "evaluation.images=4": {*IMAGES, "evaluation"},
    "evaluation.batch_size=4": {*IMAGES, "evaluation"},
    "export.latency_runs=9": {"benchmark"},
    "export.weights=packed": OF_THE_FOLDER,
    "export.batch_size=2": {*OF_THE_FOLDER, "baselines", f"samples-{NNCF_INT8}"},
    "quantization.attention=float": OF_THE_FOLDER,
    "name=other": OF_THE_FOLDER,
    "pipeline.vae=none": OF_THE_FOLDER,
    "distillation.calibration_weight=0.5": STUDENTS,
    "distillation.steps=8": DISTILLED,
    "distillation.teacher_weight=0.5": DISTILLED,
    "progressive.perturbation=0.1": QUANTIZED,
    "progressive.steps=8": {*CONTROL, *QUANTIZED},
    "training.learning_rate=0.01": {*CONTROL, *QUANTIZED},
    "training.seed=3": {*CONTROL, *QUANTIZED},
    "training.precision=bf16": {*CONTROL, *QUANTIZED},
    "training.trainable=low_rank": {*CONTROL, *QUANTIZED},
    "training.rank=3": set(),  # of low_rank
    "quantization.layers.body.weights.bits=3": {STEP_COSTS, *ROUNDED},
    "quantization.split_shortcuts=false": {STEP_COSTS, *ROUNDED},
    "post_training.rounding=gptq": ROUNDED,
    "post_training.rounding=learned": ROUNDED,
    "post_training.states=9": set(),  # of GPTQ and of learned rounding
    "post_training.passes=9": set(),  # of GPTQ
    "post_training.steps=9": set(),  # of learned rounding
    "calibration.seed=3": ALL - FLOATING,
    "calibration.trajectories=6": ALL - FLOATING,
    "sampler.float_steps=1": {FLOAT_STEPS, *ROUNDED, f"samples-{NNCF_INT8}"},
    "sampler.steps=8": ALL - {f"samples-{FP32_HALF}"},
    "distillation.student_steps=1": {*DISTILLED, "teacher", f"samples-{FP32_HALF}", f"samples-{PQ_HALF}"},
}


@pytest.fixture(scope="module")
def records(tiny_folder: Path) -> Callable[[str], Records]:
    """The records of every stage under an override. A model is prepared once for each of the sections that a plan is
    made of.
    """
    made: dict[str, Prepared] = {}

    @lru_cache
    def under(override: str) -> Records:
        policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, *([override] if override else [])))
        planned = policy.model_dump_json(include={"model", "conditions", "quantization", "pipeline"})
        if planned not in made:
            made[planned] = prepare(policy)
        table = recipes(policy, made[planned])
        return {stage: record_of(table, stage) for stage in table}

    return under


def test_a_run_has_a_recipe_of_every_stage(records: Callable[[str], Records]) -> None:
    assert set(records("")) == ALL


@pytest.mark.parametrize("override", AGAIN)
def test_a_change_of_the_policy_does_again_what_depends_on_it_and_nothing_else(
    override: str, records: Callable[[str], Records]
) -> None:
    was, now = records(""), records(override)
    assert {stage for stage in now if reason_to_repeat(was[stage], now[stage]) is not None} == AGAIN[override]


def test_what_is_deployed_too_does_nothing_again_but_its_times_and_the_evaluation(
    records: Callable[[str], Records],
) -> None:
    was, now = records(""), records(f"deploy=[{PQCAD}, {PTQ}]")
    assert {*now} - {*was} == {exporting(PTQ), f"samples-{DEPLOYED[PTQ]}"}
    again = {stage for stage in was if reason_to_repeat(was[stage], now[stage]) is not None}
    assert again == {"benchmark", "evaluation"}


def test_another_order_writes_both_folders_again(records: Callable[[str], Records]) -> None:
    first, second = (records(f"deploy=[{order}]") for order in (f"{PQCAD}, {PTQ}", f"{PTQ}, {PQCAD}"))
    again = {stage for stage in first if reason_to_repeat(first[stage], second[stage]) is not None}
    images = {f"samples-{DEPLOYED[name]}" for name in (PTQ, PQCAD)}
    assert again == {exporting(PTQ), exporting(PQCAD), *images, "benchmark", "evaluation"}


def test_every_key_of_a_policy_is_tried() -> None:
    """A key that is new must say here what depends on it; these sections decide which model is loaded, or are one
    recipe as a whole.
    """
    tried = {override.split("=")[0].split("[")[0] for override in AGAIN}
    # by test_reference_set.py, which has pictures, and by test_text_runs.py, which has prompts
    tried |= {"evaluation.reference", "evaluation.clip"}
    whole = load_policy(POLICIES / "smoke.yaml").model_dump()
    for section in ("post_training", "training", "evaluation", "export"):
        optimizer = {"batch_size", "gradient_accumulation", "ema", "max_grad_norm"} if section == "training" else set()
        assert {key for key in whole[section] if f"{section}.{key}" not in tried} == optimizer


def test_a_student_depends_on_the_other_one_where_that_finds_its_rate(tiny_folder: Path) -> None:
    read = {}
    for variants in ((PQ_DISTILLED, PQCAD), (PQCAD,)):
        for rate in ("auto", "0.001"):
            overrides = (f"evaluation.variants=[{', '.join(variants)}]", f"training.learning_rate={rate}")
            policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, *overrides))
            read[variants, rate] = PQ_DISTILLED in recipes(policy, prepare(policy))[PQCAD].after
    assert [key for key, found in read.items() if found] == [((PQ_DISTILLED, PQCAD), "auto")]


def test_rules_in_other_words_and_layers_that_may_run_in_float_are_trained_alike(tiny_folder: Path) -> None:
    """What an export refuses is listed as an exception, by a rule of its own before the others; nothing is trained
    again for it.
    """
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))
    rules = policy.quantization.layers
    excepted = rules["body"].model_copy(update={"match": ("mid_block.resnets.0.conv1",), "execution": "float"})
    listed = policy.quantization.model_copy(update={"layers": {"excepted": excepted, **rules}})
    was, now = (recipes(one, prepare(one)) for one in (policy, policy.model_copy(update={"quantization": listed})))
    again = {stage for stage in now if reason_to_repeat(record_of(was, stage), record_of(now, stage)) is not None}
    assert again == OF_THE_FOLDER


def test_what_runs_share_is_named_by_libraries_too(records: Callable[[str], Records], tiny_folder: Path) -> None:
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))
    table = recipes(policy, prepare(policy))
    assert {"torch", "brevitas", "training.checkpoint_every"} <= decides(table, PQ).keys()
    assert len({json.dumps(decides(table, stage)) for stage in table}) == len(table)


def run(model: Path, path: Path, *overrides: str, resume: bool = False) -> str:
    torch.set_num_threads(1)
    printed = io.StringIO()
    policy = load_policy(
        POLICIES / "smoke.yaml", tiny_overrides(model, f"evaluation.variants=[{FP32}, {PQ}, {PQCAD}]", *overrides)
    )
    with without_page():
        pipeline.run(policy, path, "command", Console(file=printed, width=300), resume=resume)
    return printed.getvalue()


@pytest.mark.long
def test_a_run_that_goes_on_under_another_policy_ends_as_a_new_one_under_it_bit_for_bit(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shorter = (
        "progressive.steps=3",
        "distillation.steps=3",
        "calibration.trajectories=2",
        "evaluation.images=2",
        "evaluation.features=none",
    )
    changes = (
        *shorter,
        "distillation.calibration_weight=0.5",
        "training.samples_every=0",
        "evaluation.seed=3",
    )
    run(tiny_folder, tmp_path / "one" / "run", *shorter)
    pq = (tmp_path / "one" / "run" / "stages" / "pq.json").stat().st_mtime_ns
    told = run(tiny_folder, tmp_path / "one" / "run", *changes, resume=True)
    assert "kept: calibration, float-steps, step-costs, ptq, pq, teacher" in told
    assert (
        f"again: pqcad (distillation.calibration_weight 1.0 -> 0.5), samples-{FP32} (evaluation.seed 1234 -> 3)" in told
    )
    assert (tmp_path / "one" / "run" / "stages" / "pq.json").stat().st_mtime_ns == pq
    run(tiny_folder, tmp_path / "two" / "run", *changes)
    names = [f"{folder}/{name}.safetensors" for folder in ("models", "samples") for name in (PQ, PQCAD)]
    for name in (
        *names,
        "samples/fp32.safetensors",
        "distillation/teacher.safetensors",
        "calibration/trajectories.safetensors",
    ):
        one, two = (load_file(tmp_path / root / "run" / name) for root in ("one", "two"))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == [], name
    reports = [json.loads((tmp_path / root / "run" / "report.json").read_text()) for root in ("one", "two")]
    assert reports[0]["variants"] == reports[1]["variants"]
    assert reports[0]["policy"] == reports[1]["policy"]
    assert (tmp_path / "one" / "run" / "superseded" / "pqcad-1" / "models" / "pqcad.safetensors").is_file()
