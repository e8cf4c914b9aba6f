"""The stage `float-steps`: how many first sampling steps full precision computes in a quantized model's place.

Method: the model with quantized inputs and the widest weights of the ladder, calibrated and not trained, samples from
noise that no calibration trajectory begins with. Full precision computes its first k steps, for k = 0, 1, 2 and so on.
One step more is worth its time as long as it brings the images nearer to full precision's own by WORTH. Only the
rounding of inputs is judged so: training mends what narrow weights lose, but cannot give 8-bit inputs more digits.

This is asked in the steps of the sampler and in the steps of its student, which are longer; the larger demand decides.

No training reaches these steps, so what a student loses by making them twice as long is lost for good. Whether its
first ones are taken in steps as short as its teacher's is measured in full precision alone: each further denoiser call
has to bring the images nearer to those of all steps by WORTH. Under classifier-free guidance no step is taken in parts,
since one call of the denoiser does not know where the guided steps land.

Not here: why those steps need it, and which network computes a step (sampling/precision_by_time.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import takewhile

import torch
from rich.console import Console
from torch import Tensor

from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.machine.progress import working
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FLOAT_STEPS, VARIANTS, stages_of
from pqcad_qat.quality.fidelity import nearness_to
from pqcad_qat.quantization.conversion import frozen_weights
from pqcad_qat.report.record import FloatStepsTrial, StepsInPartsTrial
from pqcad_qat.sampling.ddpm_schedule import Walk
from pqcad_qat.sampling.precision_by_time import (
    NO_FLOAT_STEPS,
    StepsInFloat,
    float_from,
    float_steps,
    in_parts,
)
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
    if FLOAT_STEPS not in stages_of(policy.variants):
        return FloatStepsRecord()
    with run.stage(FLOAT_STEPS) as stage:
        if stage.new:
            stage.done(_chosen(policy, prepared, console, untrained))
    return run.read_always(FLOAT_STEPS, FloatStepsRecord)


def measured(policy: Policy, schedule: NoiseSchedule) -> bool:
    """Whether the number is measured: where the policy says auto, and an error of the prediction can grow in x_0.

    With v, x_0 or a velocity as the prediction, an error of x_0 is never larger than that of the prediction. A student
    that learns guidance needs one denoiser call a step, and in one call full precision would not be guided.
    """
    grows = schedule.prediction_type == "epsilon"
    return policy.sampler.float_steps == "auto" and grows and not policy.learns_guidance


def may_have_float_steps(policy: Policy, schedule: NoiseSchedule) -> bool:
    """Whether full precision may compute a step of the policy's quantized models."""
    return measured(policy, schedule) or policy.sampler.float_steps not in ("auto", 0)


def students_sampled(policy: Policy) -> bool:
    """Whether a quantized variant takes the student's steps."""
    return any(VARIANTS[name].quantized and VARIANTS[name].student_steps for name in policy.variants)


def parts_measured(policy: Policy, schedule: NoiseSchedule) -> bool:
    """Whether it is measured how many of the student's float steps are taken in parts."""
    unguided, epsilon = policy.sampler.guidance_scale == 1.0, schedule.prediction_type == "epsilon"
    return unguided and epsilon and policy.sampler.float_steps != 0 and students_sampled(policy)


def _chosen(policy: Policy, prepared: Prepared, console: Console, untrained: QuantizedModels) -> FloatStepsRecord:
    walk, count = prepared.schedule.walk(policy.sampler.steps), policy.sampler.float_steps
    start = NO_FLOAT_STEPS if count == "auto" else float_from(walk, count)
    trials: tuple[FloatStepsTrial, ...] = ()
    if measured(policy, prepared.schedule):
        start, trials = _measured_start(policy, prepared, console, untrained)
    if start == NO_FLOAT_STEPS:
        return FloatStepsRecord(trials=trials)
    record = FloatStepsRecord(float_steps(walk, start), start, trials)
    if not parts_measured(policy, prepared.schedule):
        return record
    stops, parts_trials = _measured_parts(policy, prepared, console, start)
    return replace(record, stops=stops, parts_trials=parts_trials)


def _measured_start(
    policy: Policy, prepared: Prepared, console: Console, untrained: QuantizedModels
) -> tuple[float, tuple[FloatStepsTrial, ...]]:
    """Return the time from which on full precision computes, and what was measured."""
    schedule = prepared.schedule
    walks = {schedule.walk(policy.sampler.steps): schedule}
    if students_sampled(policy):
        student = prepared.student_schedule(policy)
        walks[student.walk(policy.distillation.student_steps)] = student
    trials: list[FloatStepsTrial] = []
    start = NO_FLOAT_STEPS
    with working(console, "float-steps: ranges of the untrained model") as tell:
        denoisers = prepared.model.denoiser, untrained.at_first_widths()
        for taken, by in walks.items():
            full, ours = (fresh_follow(policy, prepared, denoiser.eval()) for denoiser in denoisers)
            noise, latent = fresh_noise(policy, prepared), prepared.model.latent
            with on_accelerator(*denoisers), frozen_weights(denoisers[1]):
                measurements = list(_trials(noise, full, ours, (taken, by), latent=latent, tell=tell))
            trials += measurements
            start = min(start, float_from(taken, wanted([trial.psnr for trial in measurements])))
    return start, tuple(trials)


@torch.no_grad()
def _measured_parts(
    policy: Policy, prepared: Prepared, console: Console, start: float
) -> tuple[tuple[tuple[int, ...], ...], tuple[StepsInPartsTrial, ...]]:
    """Return the times of the student's float steps that are taken in parts, and what was measured."""
    steps, student_steps = policy.sampler.steps, policy.distillation.student_steps
    factor, student = steps // student_steps, prepared.student_schedule(policy)
    walk = student.walk(student_steps)
    # every step up to its own end, as the sampler makes it; a step of too few times has no parts
    divided = [student.finer((step,), factor)[0] for step in walk[: float_steps(walk, start)]]
    whole = takewhile(lambda parts: len(parts) > 1, divided)
    stops = tuple(tuple(int(t) for t in (parts[0][0], *(end for _, end in parts))) for parts in whole)
    denoiser, noise = prepared.model.denoiser.eval(), fresh_noise(policy, prepared)
    follow = fresh_follow(policy, prepared, denoiser)
    trials = []
    with working(console, "float-steps: images in all steps") as tell, on_accelerator(denoiser):
        wanted_images = landing(prepared.schedule.walk(steps), follow, noise, prepared.schedule)
        for count in range(len(stops) + 1):
            tell(f"float-steps: images in {student_steps} steps, the first {count} of them in {factor} parts")
            taken = in_parts(follow, student, StepsInFloat(start, stops[:count]).parts)
            images = landing(walk, taken, noise, student)
            trials.append(StepsInPartsTrial(count, nearness_to(wanted_images, images, latent=prepared.model.latent)))
    return stops[: wanted([trial.psnr for trial in trials], calls=factor - 1)], tuple(trials)


def wanted(psnrs: list[float], calls: int = 1) -> int:
    """Return the number of steps that is worth its time, from the PSNR with 0, 1, 2 ... of them.

    A step counts if it, or a later one, brings WORTH for each of the `calls` of the denoiser that it costs. Two steps
    may help together where one does not.
    """
    best = 0
    for count, psnr in enumerate(psnrs):
        if min(psnr, ENOUGH) - min(psnrs[best], ENOUGH) >= WORTH * calls * (count - best):
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
