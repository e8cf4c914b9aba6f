"""The training loop on Hugging Face Accelerate.

A step calls the callbacks' `before_step`, computes the gradients of their summed loss terms over all micro-batches and
processes, makes one optimizer step, updates the averaged weights, and calls `after_step`. Then a checkpoint is written
where one is due.

Not here: what is learned (callbacks) and from which data (the batch source); neither is imported.
"""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pqcad_qat.errors import DivergedError, InterruptedByUserError, PolicyError
from pqcad_qat.machine.processes import agreed, all_alive, any_process, process_count, refuse_drift
from pqcad_qat.models.module_preparation import hold_statistics
from pqcad_qat.policy.value_types import Precision
from pqcad_qat.quantization.trained_part import ALL, TrainedPart, begin_training
from pqcad_qat.training.callback import Batch, BatchSource, Callback, StepReport, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, write_checkpoint
from pqcad_qat.training.rate_search import TRIAL_STEPS
from pqcad_qat.training.stage_end import Ending

SMALLEST_SCALE = 1.0
"""Loss scale of fp16 from which down gradients that are not finite no longer count as an overflow.

The scale starts at 65,536 and is halved at every overflow.
"""


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop.

    Attributes:
        steps: number of optimizer steps, or the largest number where the stage ends by itself.
        learning_rate: peak learning rate.
        warmup: training steps over which the rate rises linearly to its peak.
        shape: course after the warm-up; `cosine` falls to 0, and `constant` stays. `open`, for a stage whose end is not
            known, stays for `hold` steps and then falls with the square root of the steps; once the end is decided, it
            falls to 0 along a cosine as well.
        ema: decay of the Parameters' moving average, 0 for none. It starts lower, as min(ema, (1 + n) / (10 + n))
            after n steps.
        accumulation: number of micro-batches into which each process splits its part of a batch.
        max_grad_norm: norm down to which larger gradients are scaled.
        ending: end of the stage, where it is known before its first step and `open` needs it.
        hold: training steps for which `open` stays: as many as the trials had that found the rate.
        part: what of the model is trained.
    """

    steps: int
    learning_rate: float
    warmup: int = 0
    shape: Literal["cosine", "constant", "open"] = "cosine"
    ema: float = 0.0
    accumulation: int = 1
    max_grad_norm: float = 1.0
    ending: Ending | None = None
    hold: int = TRIAL_STEPS
    part: TrainedPart = ALL

    def learning_rate_at(self, step: int, setbacks: int = 0, ending: Ending | None = None) -> float:
        """The learning rate of a step, halved for every divergence overcome before it."""
        rate = self.learning_rate * 0.5**setbacks * min(1.0, (step + 1) / (self.warmup + 1))
        start, end = (ending.decay_from, ending.last) if self.shape == "open" and ending else (0, self.steps)
        if self.shape == "open":
            # The rate that is best for a few steps is too high for many, whose noise does not average out: for N steps
            # of stochastic gradient descent the best constant rate is proportional to 1 / sqrt(N).
            rate *= min(1.0, self.hold / (step + 1)) ** 0.5
        if self.shape == "constant" or (self.shape == "open" and (ending is None or step < start)):
            return rate
        return rate * 0.5 * (1.0 + math.cos(math.pi * (step - start) / (end - start)))

    def last_step(self, ending: Ending | None) -> int:
        """Number of training steps after which the stage is over, by what is decided so far."""
        return self.steps if ending is None else ending.last


def new_accelerator(precision: Precision) -> Accelerator:
    """A new Accelerator of this precision.

    Accelerate keeps the settings of the first one for the whole process, so they are reset here. Processes hold the
    same model and make the same decisions, so only gradients are exchanged. A Parameter may have none in a step.

    Raises:
        PolicyError: this machine does not support the precision.
    """
    AcceleratorState._reset_state()
    replicas = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Accelerate only has the older name
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=[replicas]
        )
    except ValueError as error:
        raise PolicyError(
            f"training.precision: got {precision}, which this machine does not have: {error}; allowed fp32"
        ) from error
    if precision == "fp16" and accelerator.scaler is None:
        raise PolicyError(
            f"training.precision: got fp16 on {accelerator.device.type}; allowed fp32 or bf16: fp16 needs a GPU"
        )
    return accelerator


def released(state: TrainState, accelerator: Accelerator) -> nn.Module:
    """The model as it was before Accelerate prepared it: with its own forward, in float32.

    Accelerate's marks are removed, so that it can prepare the model, or a copy of it, again.
    """
    model: nn.Module = accelerator.unwrap_model(state.network, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)  # Accelerate restores forward as an attribute, which hides the class's own
    vars(model).pop("_is_accelerate_prepared", None)  # Accelerate neither moves nor casts a model with this mark
    return model


def new_state(model: nn.Module, settings: LoopSettings, accelerator: Accelerator) -> TrainState:
    """A state before its first step, with AdamW over all trained Parameters, including scales, without weight decay.

    Where a part of the model is trained, the rest is frozen until `end_training`.

    Raises:
        PolicyError: the model has no such part.
    """
    frozen = begin_training(model, settings.part)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A fused AdamW skips a step whose fp16 gradients overflow by itself, and Accelerate would not notice.
    fused = accelerator.scaler is None
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=fused)
    network, prepared = accelerator.prepare(model, optimizer)
    state = TrainState(
        model=model,
        optimizer=prepared,
        network=network,
        ending=settings.ending,
        scaler=accelerator.scaler,
        frozen=frozen,
    )
    if settings.ema:
        state.ema = {}
        state.restart_ema()
    return state


def fit(
    state: TrainState,
    callbacks: Sequence[Callback],
    batches: BatchSource,
    settings: LoopSettings,
    *,
    accelerator: Accelerator,
    checkpoints: CheckpointFolder | None = None,
) -> None:
    """Train from state.step to settings.steps, or to the end that a callback decides; the state holds the result.

    Raises:
        DivergedError: the loss, a gradient or a weight is not finite. The message has the step, its loss terms, and
            the causes that callbacks see. The step has changed no weight.
        InterruptedByUserError: Ctrl-C; raised after the step under way and a checkpoint.
        CheckpointError: a checkpoint cannot be written.
    """
    with _interrupts() as interrupted:
        while state.step < settings.last_step(state.ending):
            for callback in callbacks:
                callback.before_step(state)
            report = _step(state, callbacks, batches(state.step), settings, accelerator=accelerator)
            state.step += 1
            _average(state, settings.ema)
            with agreed():
                for callback in callbacks:
                    callback.after_step(state, report)
            stop = any_process(interrupted.is_set())
            last = settings.last_step(state.ending)
            if checkpoints and (stop or state.step == last or state.step % checkpoints.every == 0):
                _checkpoint(checkpoints, state, callbacks)
            if stop:  # even after the last step, so that no further stage begins
                checkpoint_note = ": its checkpoint is kept" if checkpoints else ""
                raise InterruptedByUserError(f"interrupted at step {state.step} of {last}{checkpoint_note}")


def _step(
    state: TrainState, callbacks: Sequence[Callback], batch: Batch, settings: LoopSettings, *, accelerator: Accelerator
) -> StepReport:
    """Make one optimizer step, and report it.

    Under fp16, gradients may overflow because the loss scale is too high. The optimizer then skips the step, the
    scaler halves the scale, and the step is made again with the same batch. Once the scale is at its smallest,
    gradients that are not finite are a divergence.
    """
    rate = settings.learning_rate_at(state.step, state.setbacks, state.ending)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    micro_batches = _micro_batches(_share(batch, accelerator), settings.accumulation)
    while True:  # again, at half the loss scale, only where fp16 gradients have overflowed
        with all_alive():
            values = _gradients(state, callbacks, micro_batches, accelerator)
        accelerator.unscale_gradients(state.optimizer)
        gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
        total = get_total_norm(gradients)
        # The norm of the weights is checked too: quantizers clamp an infinite weight, so that neither the loss nor the
        # gradients would show it.
        norm, size = torch.stack([total, get_total_norm(state.parameters.values())]).tolist()
        loss = sum(values.values())
        overflow = not math.isfinite(norm) and math.isfinite(loss) and _may_overflow(state.scaler)
        if not overflow and not all(map(math.isfinite, (loss, norm, size))):
            raise DivergedError(state.step, _divergence(state, callbacks, values, norm), stepped=False)
        clip_grads_with_norm_(state.parameters.values(), settings.max_grad_norm, total)
        state.optimizer.step()
        state.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            return StepReport(
                loss=loss, terms=values, gradient_norm=norm, learning_rate=rate, samples=len(next(iter(batch.values())))
            )


def _gradients(
    state: TrainState, callbacks: Sequence[Callback], micro_batches: Sequence[Batch], accelerator: Accelerator
) -> dict[str, float]:
    """Run forward and backward passes of all micro-batches.

    It returns the loss terms, as means over all micro-batches of all processes.
    """
    sums: dict[str, Tensor] = {}
    if not state.model.training:  # the model, since a wrapper's own flag is True from the start
        state.network.train()
        hold_statistics(state.network)
    for index, micro_batch in enumerate(micro_batches):
        # Gradients are exchanged between processes only in the backward pass of the last micro-batch.
        last = index == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(state.network):
            terms: dict[str, Tensor] = {}
            for callback in callbacks:
                terms.update(callback.loss_terms(state, micro_batch))
            accelerator.backward(torch.stack(list(terms.values())).sum() / len(micro_batches))
        for name, term in terms.items():
            sums[name] = sums.get(name, torch.zeros_like(term.detach())) + term.detach() / len(micro_batches)
    means: Tensor = accelerator.reduce(torch.stack(list(sums.values())), "mean")
    return dict(zip(sums, means.tolist(), strict=True))


def _may_overflow(scaler: torch.amp.GradScaler | None) -> bool:
    """Whether gradients that are not finite may be due to a loss scale of fp16 that is still too high.

    The scaler halves it each time.
    """
    return scaler is not None and scaler.get_scale() > SMALLEST_SCALE


def _divergence(state: TrainState, callbacks: Sequence[Callback], values: dict[str, float], norm: float) -> str:
    """The message that says what is not finite and why, made before the gradients are changed."""
    terms = ", ".join(f"{name} {value:g}" for name, value in values.items())
    causes = [cause for callback in callbacks for cause in callback.explain(state)]
    return f"step {state.step}: training diverged: loss terms {terms}, gradient norm {norm:g}" + "".join(
        f"; {cause}" for cause in causes
    )


def _share(batch: Batch, accelerator: Accelerator) -> Batch:
    """This process's part of the batch, on its device."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return {name: value[rank::world].to(accelerator.device) for name, value in batch.items()}


def _micro_batches(batch: Batch, count: int) -> list[Batch]:
    """The batch in equal parts, so that the mean of their means is the batch's mean."""
    size = len(next(iter(batch.values())))
    assert size % count == 0, f"a process's batch of {size} is not {count} equal micro-batches"
    return [{name: value.chunk(count)[index] for name, value in batch.items()} for index in range(count)]


@torch.no_grad()
def _average(state: TrainState, decay: float) -> None:
    """Move the averaged weights towards the present ones, with a decay that starts low."""
    if state.ema is None:
        return
    since = state.step - state.ema_since
    weight = 1.0 - min(decay, (1 + since) / (10 + since))
    torch._foreach_lerp_(list(state.ema.values()), [state.parameters[name].detach() for name in state.ema], weight)


def _checkpoint(folder: CheckpointFolder, state: TrainState, callbacks: Sequence[Callback]) -> None:
    """Write a checkpoint in the first process, after making sure that all processes hold the same weights."""
    if process_count() > 1:
        refuse_drift(
            f"step {state.step}",
            {name: float(value.double().sum()) for name, value in state.model.state_dict().items()},
        )
    with agreed() as first:
        if first:
            write_checkpoint(folder, state, callbacks)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event set by the first Ctrl-C or request to terminate; a second one ends the program at once.

    Outside the main thread, where Python allows no signal handlers, it is never set.
    """
    interrupted = threading.Event()

    def note(_signal: int, _frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if interrupted.is_set():  # set after the loop last looked, so not handled there
        raise KeyboardInterrupt
