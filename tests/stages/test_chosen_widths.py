"""Widths that a run chooses: the quality or the size that was asked for, against the models that they make.

Not here: the order of choices (quantization/test_mixed_precision.py), and the search among them (test_width_search.py).
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import POLICIES, tiny_overrides, without_images, without_page

from pqcad_qat.commands.report import report
from pqcad_qat.commands.run import preview, run
from pqcad_qat.data.calibration import calibration_set
from pqcad_qat.errors import PlanError, PolicyError
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FLOAT_STEPS, PQ, PTQ, STEP_COSTS, WIDTHS
from pqcad_qat.quantization.mixed_precision import with_bits
from pqcad_qat.quantization.plan_facts import expected_bytes
from pqcad_qat.report.report_files import read_report
from pqcad_qat.report.width_choice import WidthChoice
from pqcad_qat.sampling.precision_by_time import StepsInFloat
from pqcad_qat.stages import chosen_widths
from pqcad_qat.stages.held_out_images import measured_images
from pqcad_qat.stages.prepared import CALIBRATION, Prepared, calibration_recipe, prepare
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.recipe import Recipe, reason_to_repeat, record_of
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_dependencies import recipes
from pqcad_qat.stages.stage_records import TrainingRecord, WidthsRecord
from pqcad_qat.training.stage_end import StageEnd

QUICK = (
    "export.weights=packed",
    "evaluation.images=2",
    "evaluation.features=none",
    "quantization.layers.body.weights.bits=2",
    "progressive.ladder=[8, 2]",
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # for networks as small as this
    monkeypatch.setattr(chosen_widths, "STATES", 2)
    monkeypatch.setattr(chosen_widths, "STEPS", 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs that share one calibration set."""
    return tmp_path_factory.mktemp("runs")


def asked(model: Path, *overrides: str, variants: str = PTQ) -> Policy:
    return load_policy(
        POLICIES / "smoke.yaml", tiny_overrides(model, *QUICK, f"evaluation.variants=[{variants}]", *overrides)
    )


def ended(policy: Policy, path: Path, resume: bool = False) -> tuple[WidthChoice, WidthsRecord, str]:
    console = Console(file=io.StringIO(), width=400)
    run(policy, path, "command", console, resume=resume)
    record = RunFolder(path).read_always(WIDTHS, WidthsRecord)
    assert record.choice is not None
    assert isinstance(console.file, io.StringIO)
    return record.choice, record, console.file.getvalue()


def nearness(policy: Policy, prepared: Prepared, record: WidthsRecord, runs: Path) -> float:
    """PSNR of held-out images of the model at the chosen widths, measured apart from the run."""
    recipe = calibration_recipe(policy, prepared)
    calibration, _ = calibration_set(prepared.model, recipe, 4, runs / CALIBRATION, conditions=prepared.conditions)
    kept = [layer for layer in prepared.plan if layer.name in record.bits]
    model = QuantizedModels(policy, prepared, calibration).of(with_bits(kept, record.bits)).at_targets()
    return measured_images(policy, prepared, calibration, variant=PQ, in_float=StepsInFloat())(model).psnr


@pytest.fixture(scope="module")
def bounds(tiny_folder: Path, runs: Path) -> tuple[float, float]:
    """PSNR of held-out images with all layers at their narrowest widths, and at 8 bits."""
    policy = asked(tiny_folder)
    prepared = prepare(policy)
    narrow, wide = (
        WidthsRecord({layer.name: bits or layer.weights.bits for layer in prepared.plan}) for bits in (None, 8)
    )
    reached = nearness(policy, prepared, narrow, runs), nearness(policy, prepared, wide, runs)
    assert reached[0] + 6 < reached[1]
    return reached


@pytest.mark.slow
def test_a_quality_is_reached_by_the_smallest_widths_that_were_measured_to_have_it(
    tiny_folder: Path, runs: Path, bounds: tuple[float, float]
) -> None:
    quality = round(sum(bounds) / 2, 1)
    policy = asked(tiny_folder, f"quantization.quality={quality}")
    with without_page():
        choice, record, told = ended(policy, runs / "quality")
    prepared = prepare(policy)
    assert set(record.bits) == {layer.name for layer in prepared.plan}
    assert set(record.bits.values()) == {2, 8}
    assert choice.chosen.psnr >= quality
    assert choice.chosen.psnr == pytest.approx(nearness(policy, prepared, record, runs))
    assert all(trial.psnr < quality for trial in choice.trials if trial.size_bytes < choice.chosen.size_bytes)
    assert choice.chosen.size_bytes == expected_bytes(prepared.split, with_bits(prepared.plan, record.bits), True)
    written = json.loads((runs / "quality" / "plan.json").read_text())
    assert {layer["name"]: layer["weights"]["bits"] for layer in written["layers"]} == record.bits
    assert written["expected_bytes"]["packed"] == choice.chosen.size_bytes
    assert read_report(runs / "quality").widths == choice
    with without_page():
        report(runs / "quality")  # the report made again is of the same plan
    rows = {row.layer: row.weight_bits for row in read_report(runs / "quality").layers if row.weight_bits is not None}
    assert rows == record.bits
    assert f"Widths for quantization.quality {quality:g} dB: " in told
    assert f"{choice.chosen.psnr:.1f} dB to full precision without training" in told


@pytest.mark.long
def test_layers_that_8_bits_cannot_serve_stay_in_float_and_are_listed(
    tiny_folder: Path, runs: Path, bounds: tuple[float, float]
) -> None:
    quality = round(bounds[1] + 1, 1)
    choice, record, told = ended(asked(tiny_folder, f"quantization.quality={quality}"), runs / "float")
    assert set(record.bits.values()) == {8}
    assert choice.float_layers
    assert choice.chosen.psnr >= quality
    assert not set(choice.float_layers) & set(record.bits)
    written = json.loads((runs / "float" / "plan.json").read_text())
    assert set(choice.float_layers) <= set(written["float_layers"])
    page = (runs / "float" / "report.html").read_text()
    for layer in choice.float_layers:
        assert layer in told.split("Left in floating point")[1]
        assert layer in page


@pytest.mark.slow
def test_a_quality_out_of_reach_is_refused_with_the_best_that_was_measured(
    tiny_folder: Path, runs: Path, bounds: tuple[float, float]
) -> None:
    with pytest.raises(PlanError, match=r"quantization\.quality: got 90 dB; allowed at most (\d+\.\d) dB") as error:
        ended(asked(tiny_folder, "quantization.quality=90"), runs / "unreachable")
    assert bounds[1] < float(str(error.value).split("at most ")[1].split()[0]) < 90


@pytest.mark.slow
def test_an_interrupted_search_goes_on_with_what_was_measured(
    tiny_folder: Path, runs: Path, bounds: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = asked(tiny_folder, f"quantization.quality={round(sum(bounds) / 2, 1)}")
    whole = chosen_widths.measured_images
    calls: list[int] = []

    def counted(*arguments: object, **named: object) -> object:
        measure = whole(*arguments, **named)  # type: ignore[arg-type]

        def stopping(model: torch.nn.Module) -> object:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("the power went")
            return measure(model)

        return stopping

    monkeypatch.setattr(chosen_widths, "measured_images", counted)
    with pytest.raises(RuntimeError, match="the power went"):
        ended(policy, runs / "again")
    monkeypatch.setattr(chosen_widths, "layer_sensitivities", None)  # they were kept
    with without_images():
        choice, record, _ = ended(policy, runs / "again", resume=True)
    uninterrupted = RunFolder(runs / "quality").read_always(WIDTHS, WidthsRecord)
    assert record == uninterrupted
    assert len(calls) == len(choice.trials) + 1


def test_another_quality_asks_for_the_same_measurements_and_another_seed_for_others(
    tiny_folder: Path, tmp_path: Path
) -> None:
    names = []
    for key in ("quantization.quality=30", "quantization.quality=20", "training.seed=5"):
        policy = asked(tiny_folder, *dict.fromkeys(("quantization.quality=30", key)))
        names.append(chosen_widths.measurements(RunFolder(tmp_path, recipes(policy, prepare(policy)))))
    assert names[0] == names[1] != names[2]


@pytest.mark.long
def test_the_widths_within_a_size_are_trained_and_told(
    tiny_folder: Path, runs: Path, bounds: tuple[float, float]
) -> None:
    policy = asked(tiny_folder, "quantization.max_size=0.15x", "progressive.steps=2", variants=PQ)
    with without_page():
        choice, record, told = ended(policy, runs / "size")
    prepared = prepare(policy)
    whole = expected_bytes(prepared.split, (), packed=False)
    assert 0.14 * whole < choice.chosen.size_bytes <= choice.max_bytes == int(0.15 * whole)
    assert {2, 8} == set(record.bits.values())
    assert (choice.training_steps, choice.float_layers, len(choice.trials)) == (2, (), 1)
    assert choice.chosen.psnr >= nearness(policy, prepared, record, runs)
    assert f"Widths for quantization.max_size {0.15 * whole / 1e6:.2f} MB: " in told
    layers = {row.layer: row.weight_bits for row in read_report(runs / "size").layers if row.weight_bits is not None}
    assert layers == record.bits


def test_a_model_that_lost_the_quality_in_its_training_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path)
    kept = StageEnd(9, "steps", "last", {"last": 0.1}, {"last": 29.4}, {}, training_s=1.0)
    run_folder.finish(PQ, 1.0, TrainingRecord((), kept))
    for quality in (29, 30):
        chosen_widths.warn_of_lost_quality(
            asked(tiny_folder, f"quantization.quality={quality}", variants=PQ), run_folder, Console(quiet=True)
        )
    (warning,) = run_folder.warnings()
    assert warning.startswith("pq: it has 29.4 dB after its training, and 30 dB were asked for (quantization.quality)")


def test_a_size_under_that_of_the_narrowest_widths_is_refused_at_the_start(tiny_folder: Path) -> None:
    with pytest.raises(PlanError, match=r"max_size: got 0\.02x .* allowed at least 0\.\d\dMB \(0\.\d+x\)"):
        prepare(asked(tiny_folder, "quantization.max_size=0.02x"))
    with pytest.raises(PlanError, match=r"or export\.weights: packed"):
        prepare(asked(tiny_folder, "quantization.max_size=0.15x", "export.weights=int8"))


def test_quality_and_size_are_not_asked_for_together(tiny_folder: Path) -> None:
    with pytest.raises(PolicyError, match=r"quantization\.max_size: got '1MB'; allowed null, as quality is given"):
        asked(tiny_folder, "quantization.max_size=1MB", "quantization.quality=30")
    with pytest.raises(PolicyError, match=r"quantization\.max_size: got \"1GB\"; allowed text that matches"):
        asked(tiny_folder, "quantization.max_size=1GB")


def test_a_preview_says_what_will_be_measured(tiny_folder: Path, tmp_path: Path) -> None:
    shown = preview(
        asked(tiny_folder, "quantization.quality=30", "export.weights=int8", variants=PQ),
        tmp_path / "run",
        console=Console(quiet=True),
    )
    assert WIDTHS in [stage.name for stage in shown.stages]
    notes = "\n".join(shown.notes)
    assert "quantization.quality: this plan shows the narrowest widths" in notes
    assert "held-out images after up to 9 short trainings of 40 steps" in notes
    assert "export.weights: int8 stores every width in a byte" in notes
    without = preview(asked(tiny_folder, variants=PQ), tmp_path / "run", console=Console(quiet=True))
    assert WIDTHS not in [stage.name for stage in without.stages]


@cache
def recipes_of(model: Path, *overrides: str) -> dict[str, Recipe]:
    policy = asked(model, "quantization.quality=30", *overrides, variants=PQ)
    return recipes(policy, prepare(policy))


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("quantization.quality=31", {WIDTHS, PTQ, PQ}),
        ("export.weights=int8", {WIDTHS, PTQ, PQ}),
        ("post_training.rounding=gptq", {WIDTHS, PTQ, PQ}),
        ("training.learning_rate=0.01", {WIDTHS, PTQ, PQ}),
        ("progressive.steps=8", {PQ}),
        ("progressive.ladder=[8, 4, 2]", {WIDTHS, PTQ, PQ}),
        ("quantization.layers.body.weights.bits=3", {STEP_COSTS, WIDTHS, PTQ, PQ}),
        ("sampler.float_steps=1", {FLOAT_STEPS, WIDTHS, PTQ, PQ}),
    ],
)
def test_what_was_measured_is_measured_again_where_it_would_differ(
    override: str, again: set[str], tiny_folder: Path
) -> None:
    was, now = recipes_of(tiny_folder), recipes_of(tiny_folder, override)
    repeated = {stage for stage in now if reason_to_repeat(record_of(was, stage), record_of(now, stage)) is not None}
    assert repeated - {f"samples-{PQ}", "evaluation"} == again
