"""The stage `widths`: a width for every layer by what the policy asks for, a quality in dB or a size.

Method: each layer's error is measured at every width of its ladder, with all else in floating point. These errors order
all choices of widths by size, so that each has one layer at a larger width than the one before. Beyond the last, with
all layers at their best width, layers stay in floating point, those with the largest error first. RobuQ (arXiv
2509.23582) measures the errors after a short training; here that left the order of the layers as it was (NOTES.md).

For a size, the choice of least error within it is taken. For a quality, the smallest choice that has it is searched: a
choice is rounded as post-training quantization rounds it, trained shortly, and its images from held-out noise are
compared with full precision's own. The errors tell where to look, and what counts is what was measured.

Not here: the order of choices (quantization/mixed_precision.py), and the training of the chosen one (train.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text
from torch import nn

from pqcad_qat.data.calibration import CalibrationSet
from pqcad_qat.errors import DivergedError, PlanError
from pqcad_qat.machine.content_store import content_digest
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import agreed, exchanged, is_first
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FLOAT_STEPS, PQ, STEP_COSTS, WIDTHS, stages_of
from pqcad_qat.quantization.layer_sensitivity import LayerSensitivity, layer_sensitivities
from pqcad_qat.quantization.mixed_precision import (
    Option,
    choices_by_size,
    choose_bits,
    limit_in_bytes,
    weight_costs,
    with_bits,
)
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.plan_facts import expected_bytes
from pqcad_qat.quantization.trained_part import load_changing
from pqcad_qat.report.width_choice import WidthChoice, WidthTrial, choice_text
from pqcad_qat.stages.asked_widths import STEPS, trains, widths_measured
from pqcad_qat.stages.held_out_images import MeasuredImages, measured_images
from pqcad_qat.stages.post_train import round_as_asked
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_records import FloatStepsRecord, StepCostsRecord, TrainingRecord, WidthsRecord
from pqcad_qat.stages.train import matched_states
from pqcad_qat.stages.width_search import Plan, left_float, search
from pqcad_qat.training.callback import BatchSource
from pqcad_qat.training.quantization_aware import FullPrecisionMatching
from pqcad_qat.training.short_training import train_shortly
from pqcad_qat.training.trainer import LoopSettings

STATES = 16
"""Number of states on which a layer's error is measured."""

RATE = 1e-4
"""Learning rate of the short training of a choice, whose weights lie on their levels."""

Errors = Mapping[str, Mapping[int, float]]
"""Mapping from a layer to the error that it makes at each width of its ladder."""

_ERRORS = TypeAdapter(tuple[LayerSensitivity, ...])


@dataclass(frozen=True)
class Trials:
    """The measurement of choices, each trained shortly first.

    Attributes:
        policy, prepared: what is quantized.
        models: quantized copies, with the ranges of one calibration.
        calibration: states by which their weights are rounded.
        batches: batches of the trained trajectories.
        figures: measure of held-out images.
        steps: number of training steps; 0 for a run that trains nothing.
        folder: folder of what was measured before an interruption.
        tell: function called with what is being done.
        done: choices measured so far, by the digest of their widths.
    """

    policy: Policy
    prepared: Prepared
    models: QuantizedModels
    calibration: CalibrationSet
    batches: BatchSource
    figures: MeasuredImages
    steps: int
    folder: Path
    tell: Callable[[str], None]
    done: dict[str, WidthTrial]

    @property
    def packed(self) -> bool:
        """Whether narrow weights take less in the deployed folder."""
        return self.policy.export.weights == "packed"

    def measure(self, plan: Plan) -> WidthTrial:
        """Measure a choice: the better one of before and after the training, as a stage keeps it.

        Images without finite values have 0 dB.
        """
        key = content_digest({layer.name: layer.weights.bits for layer in plan})
        if key in self.done:
            return self.done[key]
        size = expected_bytes(self.prepared.split, plan, self.packed)
        parameters = sum(layer.parameters for layer in plan)
        bits = sum(layer.weights.bits * layer.parameters for layer in plan) / parameters
        in_float = len(self.prepared.plan) - len(plan)
        left = f", {in_float} layers in floating point" if in_float else ""
        self.tell(f"widths: {bits:.2f} bits on average, {size / 1e6:.2f} MB{left}")
        self.done[key] = WidthTrial(size, bits, in_float, self._psnr(key, plan))
        return self.done[key]

    def _psnr(self, key: str, plan: Plan) -> float:
        file = self.folder / "trials.json"
        known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        psnr = known.get(key)
        if psnr is None:
            model = self.models.of(plan).at_targets()
            round_as_asked(self.policy, model, self.calibration, full=self.prepared.split)
            psnrs = [self.figures(model).psnr, *([self.figures(self.trained(model)).psnr] if self.steps else [])]
            psnr = max((psnr for psnr in psnrs if math.isfinite(psnr)), default=0.0)
        psnr = exchanged(psnr)[0][0]  # all processes go on with the first one's measurement
        if is_first() and key not in known:
            write_file(file, json.dumps({**known, key: psnr}))
        return psnr

    def trained(self, model: nn.Module) -> nn.Module:
        """The model after a short training at its present widths; unchanged where that diverges."""
        training = self.policy.training
        before = {name: value.clone() for name, value in model.state_dict().items()}
        settings = LoopSettings(
            self.steps,
            RATE if training.learning_rate == "auto" else training.learning_rate,
            warmup=self.steps // 10,
        )
        try:
            train_shortly(model, [FullPrecisionMatching()], self.batches, loop=settings, training=training)
        except DivergedError:
            load_changing(model, before, ())
        return model.cpu()


def choose_widths(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    calibration: CalibrationSet,
    untrained: QuantizedModels,
) -> Prepared:
    """Stage `widths`: measure and choose; return what was prepared, with the plan at the chosen widths.

    Raises:
        PlanError: the quality is out of reach of INT8, even with FLOAT_SHARE of the layers in floating point.
    """
    if not widths_measured(policy):
        return prepared
    with run.stage(WIDTHS, together=True) as stage:
        if stage.new:
            in_float = run.read_always(FLOAT_STEPS, FloatStepsRecord).of(PQ)
            costs = run.read_always(STEP_COSTS, StepCostsRecord).costs
            with working(console, "widths: each layer's error at each width") as tell:
                trials = Trials(
                    policy,
                    prepared,
                    untrained,
                    calibration,
                    matched_states(policy, calibration, costs)[0],
                    measured_images(policy, prepared, calibration, variant=PQ, in_float=in_float),
                    steps=STEPS if trains(policy) else 0,
                    folder=run.unfinished(measurements(run)),
                    tell=tell,
                    done={},
                )
                record = _chosen(trials, calibration)
            stage.done(record)
            if is_first() and record.choice is not None:
                console.print(Text(choice_text(record.choice)), soft_wrap=True)
    if is_first():
        run.drop_unfinished(measurements(run))
    return with_chosen_widths(policy, prepared, run)


def measurements(run: RunFolder) -> str:
    """Name under which a run keeps what the stage has measured so far, until it is done.

    It depends on all that the stage depends on but for what is asked: a run that goes on with a quality within reach
    measures nothing again.
    """
    asked = ("quantization.quality", "quantization.max_size")
    decides = {key: value for key, value in run.decides(WIDTHS).items() if key not in asked}
    return f"{WIDTHS}-{content_digest(decides)}"


def with_chosen_widths(policy: Policy, prepared: Prepared, run: RunFolder) -> Prepared:
    """What was prepared, with the plan at the widths that the run has chosen, or else at the rules' own."""
    if not widths_measured(policy) or (record := run.read(WIDTHS, WidthsRecord)) is None:
        return prepared
    kept = [layer for layer in prepared.plan if layer.name in record.bits]
    return replace(prepared, plan=with_bits(kept, record.bits))


def warn_of_lost_quality(policy: Policy, run: RunFolder, console: Console) -> None:
    """Warn where the trained model of `pq` has less than the quality that its widths were chosen for."""
    end = run.read_always(PQ, TrainingRecord).end
    reached, asked = (None if end is None else end.images.get(end.kept)), policy.quantization.quality
    if PQ not in stages_of(policy.variants) or reached is None or asked is None or reached >= asked:
        return
    with agreed() as first:
        if first:
            run.warn(
                f"{PQ}: it has {reached:.1f} dB after its training, and {asked:g} dB were asked for "
                f"(quantization.quality), which the short training of the stage {WIDTHS} had reached; allowed in a new "
                "run more training.minutes, or a quality a little higher",
                console,
            )


def _chosen(trials: Trials, calibration: CalibrationSet) -> WidthsRecord:
    """Measure the errors of layers, then choose by what the policy asks for."""
    prepared, section = trials.prepared, trials.policy.quantization
    layers = {layer.name: layer for layer in _sensitivities(trials, calibration)}
    errors = {layer.name: {bits: layers[layer.name].error(bits) for bits in layer.ladder} for layer in prepared.plan}
    costs = weight_costs(prepared.split, prepared.plan, widths(prepared.plan), packed=trials.packed)
    options = {
        name: [Option(bits, costs.layers[name][bits], error) for bits, error in by_width.items()]
        for name, by_width in errors.items()
    }
    limit = None if section.max_size is None else limit_in_bytes(section.max_size, costs.whole)
    if limit is not None:
        plan = with_bits(prepared.plan, choose_bits(options, limit - costs.fixed))
    else:
        assert section.quality is not None
        plans = [with_bits(prepared.plan, bits) for bits in choices_by_size(options)]
        plan = _smallest(trials, plans, errors, section.quality)
    chosen, bits = trials.measure(plan), {layer.name: layer.weights.bits for layer in plan}
    choice = WidthChoice(
        quality=section.quality,
        max_bytes=limit,
        training_steps=trials.steps,
        bits=tuple(bits.values()),
        float_layers=tuple(layer.name for layer in prepared.plan if layer.name not in bits),
        chosen=chosen,
        trials=tuple(trials.done.values()),
    )
    return WidthsRecord(bits, choice)


def widths(plan: Sequence[LayerPlan]) -> list[int]:
    """All widths that layers may get: those of their ladders."""
    return sorted({bits for layer in plan for bits in layer.ladder})


def _sensitivities(trials: Trials, calibration: CalibrationSet) -> tuple[LayerSensitivity, ...]:
    """Errors of every layer at every width, without training."""
    file, plan = trials.folder / "errors.json", trials.prepared.plan
    with agreed() as first:
        if first and not file.exists():
            trials.tell(f"widths: the errors of {len(plan)} layers at each width")
            batches = tuple(calibration.inputs(STATES, trials.policy.calibration.batch_size))
            errors = layer_sensitivities(trials.models.at_targets(), widths(plan), batches)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, _ERRORS.dump_json(errors))
    return _ERRORS.validate_json(file.read_bytes())


def _smallest(trials: Trials, by_width: Sequence[Plan], errors: Errors, quality: float) -> Plan:
    """The smallest plan that has the quality: one of these, or their last with some layers in floating point.

    Raises:
        PlanError: none has it.
    """
    widest = by_width[-1]
    at_widest = {layer.name: errors[layer.name][layer.weights.bits] for layer in widest}
    for plans in (by_width, [widest, *left_float(widest, at_widest)]):
        predicted = [sum(errors[layer.name][layer.weights.bits] for layer in plan) for plan in plans]
        if (place := search(partial(_nearness_of, trials, plans), predicted, quality)) is not None:
            return plans[place]
    best = max(trials.done.values(), key=lambda trial: trial.psnr)
    raise PlanError(
        f"quantization.quality: got {quality:g} dB; allowed at most {best.psnr:.1f} dB, the best that was measured, "
        f"with {best.float_layers} of {len(widest)} planned layers in floating point"
    )


def _nearness_of(trials: Trials, plans: Sequence[Plan], place: int) -> float:
    return trials.measure(plans[place]).psnr
