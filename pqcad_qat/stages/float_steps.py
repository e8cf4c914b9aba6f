"""The stage `float-steps`: how many first sampling steps full precision computes in a quantized model's place.

Method: the model with quantized inputs and the widest weights of the ladder, calibrated and not trained, samples from
noise that no calibration trajectory begins with. Full precision computes its first k steps, for k = 0, 1, 2 and so on.
One step more is worth its time as long as it brings the images nearer to full precision's own by WORTH. Only the
rounding of inputs is judged so: training mends what narrow weights lose, but cannot give 8-bit inputs more digits.

This is asked in the steps of the sampler and in the steps of its student, which are longer; the larger demand decides.

Not here: why those steps need it, and which network computes a step (sampling/precision_by_time.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from torch import Tensor

from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FLOAT_STEPS, VARIANTS, stages_of
from pqcad_qat.quality.fidelity import nearness_to
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.report.record import FloatStepsTrial
from pqcad_qat.sampling.ddpm_schedule import Walk
from pqcad_qat.sampling.precision_by_time import float_from, float_steps
from pqcad_qat.sampling.trajectory import NoiseSchedule, along, landing
from pqcad_qat.stages.fresh_images import Follow, fresh_follow, fresh_noise
from pqcad_qat.stages.prepared import Prepared
from pqcad_qat.stages.quantized_models import QuantizedModels
from pqcad_qat.stages.run_folder import RunFolder
from pqcad_qat.stages.stage_records import FloatStepsRecord

WORTH = 1.0
"""Gain in dB for which one more step is computed in full precision."""

MOST = 0.5
"""Largest share of the sampling steps that full precision may compute."""

ENOUGH = 40.0
"""PSNR in dB from which on no step is worth its time: an eye sees no difference, and half the steps cost more."""


def choose_float_steps(
    policy: Policy,
    prepared: Prepared,
    run: RunFolder,
    console: Console,
    *,
    untrained: QuantizedModels,
) -> FloatStepsRecord:
    """Stage `float-steps`: the policy's number, or the one that is measured where the policy says auto."""
    if FLOAT_STEPS not in stages_of(policy.evaluation.variants):
        return FloatStepsRecord()
    with run.stage(FLOAT_STEPS) as stage:
        if stage.new:
            stage.done(_chosen(policy, prepared, console, untrained))
    return run.read_always(FLOAT_STEPS, FloatStepsRecord)


def measured(policy: Policy, schedule: NoiseSchedule) -> bool:
    """Whether the number is measured: where the policy says auto, and an error of the prediction can grow in x_0.

    With v, x_0 or a velocity as the prediction, an error of x_0 is never larger than that of the prediction.
    """
    return policy.sampler.float_steps == "auto" and schedule.prediction_type == "epsilon"


def may_have_float_steps(policy: Policy, schedule: NoiseSchedule) -> bool:
    """Whether full precision may compute a step of the policy's quantized models."""
    return measured(policy, schedule) or policy.sampler.float_steps not in ("auto", 0)


def _chosen(policy: Policy, prepared: Prepared, console: Console, untrained: QuantizedModels) -> FloatStepsRecord:
    schedule, steps = prepared.schedule, policy.sampler.steps
    walk, count = schedule.walk(steps), policy.sampler.float_steps
    if count != "auto":
        return _record(walk, float_from(walk, count), ())
    if not measured(policy, schedule):
        return FloatStepsRecord()
    student_steps = policy.distillation.student_steps
    walks = {walk: schedule}
    if any(VARIANTS[name].quantized and VARIANTS[name].student_steps for name in policy.evaluation.variants):
        student = prepared.student_schedule(policy)
        walks[student.walk(student_steps)] = student
    trials: list[FloatStepsTrial] = []
    start = math.inf
    with working(console, "float-steps: ranges of the untrained model") as tell:
        denoisers = prepared.model.denoiser, untrained.at_first_widths()
        for taken, by in walks.items():
            full, ours = (fresh_follow(policy, prepared, denoiser.eval()) for denoiser in denoisers)
            noise, latent = fresh_noise(policy, prepared), prepared.model.latent
            with on_accelerator(*denoisers), frozen_weights(denoisers[1]):
                measurements = list(_trials(noise, full, ours, (taken, by), latent=latent, tell=tell))
            trials += measurements
            start = min(start, float_from(taken, wanted([trial.psnr for trial in measurements])))
    return _record(walk, start, tuple(trials))


def _record(walk: Walk, start: float, trials: tuple[FloatStepsTrial, ...]) -> FloatStepsRecord:
    return FloatStepsRecord(float_steps(walk, start), None if math.isinf(start) else start, trials)


def wanted(psnrs: list[float]) -> int:
    """Return the number of float steps that is worth its time, from the PSNR with 0, 1, 2 ... of them.

    A step counts if it, or a later one, brings WORTH for each step: two steps may help together where one does not.
    """
    best = 0
    for count, psnr in enumerate(psnrs):
        if min(psnr, ENOUGH) - min(psnrs[best], ENOUGH) >= WORTH * (count - best):
            best = count
    return best


@torch.no_grad()
def _trials(
    noise: Tensor,
    full: Follow,
    quantized: Follow,
    sampler: tuple[Walk, NoiseSchedule],
    *,
    latent: bool,
    tell: Callable[[str], None],
) -> Iterator[FloatStepsTrial]:
    """Measure the PSNR with 0, 1, 2 ... float steps, up to two beyond the last that was worth its time.

    Full precision's own states are the starts: after k float steps the quantized model goes on from its k-th state.
    """
    walk, schedule = sampler
    states = [noise, *(step.x_s for step in along(walk, full, noise, schedule))]
    reached: list[float] = []
    for done in range(math.floor(MOST * len(walk)) + 1):
        tell(f"float-steps: images in {len(walk)} steps, the first {done} of them in full precision")
        reached.append(nearness_to(states[-1], landing(walk[done:], quantized, states[done], schedule), latent=latent))
        yield FloatStepsTrial(len(walk), done, reached[-1])
        if reached[-1] >= ENOUGH or done - wanted(reached) >= 2:
            return
