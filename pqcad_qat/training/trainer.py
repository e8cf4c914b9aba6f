"""The training loop, and nothing but the loop, on Hugging Face Accelerate.

Not here: what is learned (callbacks) or from what (the batch source); neither is imported.
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
from pqcad_qat.machine.processes import agreed, any_process, others_alive, process_count, refuse_drift
from pqcad_qat.models.own_modules import hold_statistics
from pqcad_qat.policy.schema import Precision
from pqcad_qat.training.callback import Batch, BatchSource, Callback, StepReport, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, write_checkpoint

SMALLEST_SCALE = 1.0
"""Scale of the loss in fp16 at which gradients that are not finite are no more an overflow: it starts at 65,536, and
halves.
"""


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs.

    Attributes:
        steps: optimizer steps in all.
        learning_rate: peak; warmed up linearly over `warmup` steps, then a cosine down to 0 (`constant`: kept).
        ema: decay of the Parameters' moving average, 0 for none; it starts low, as min(ema, (1 + n) / (10 + n)).
        accumulation: micro-batches that a process's part of one step's batch is split into.
        max_grad_norm: gradients are scaled down to this norm.
    """

    steps: int
    learning_rate: float
    warmup: int = 0
    shape: Literal["cosine", "constant"] = "cosine"
    ema: float = 0.0
    accumulation: int = 1
    max_grad_norm: float = 1.0

    def learning_rate_at(self, step: int, setbacks: int = 0) -> float:
        """The rate of a step, halved for every divergence overcome before it."""
        rate = self.learning_rate * 0.5**setbacks * min(1.0, (step + 1) / (self.warmup + 1))
        return rate if self.shape == "constant" else rate * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


def new_accelerator(precision: Precision) -> Accelerator:
    """An Accelerator of this precision. Accelerate keeps the first one's settings for the whole process: they are
    forgotten here.

    Processes hold the same model and compute the same decisions, so only gradients travel; Parameters may go without
    one.

    Raises:
        PolicyError: this machine does not have the precision.
    """
    AcceleratorState._reset_state()
    replicas = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Accelerate does not know the newer name
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=[replicas]
        )
    except ValueError as error:
        raise PolicyError(f"training.precision: got {precision}, which this machine does not have: {error}") from error
    if precision == "fp16" and accelerator.scaler is None:
        raise PolicyError(
            f"training.precision: got fp16 on {accelerator.device.type}; allowed fp32 or bf16: fp16 needs a GPU"
        )
    return accelerator


def released(state: TrainState, accelerator: Accelerator) -> nn.Module:
    """The model as it was before Accelerate took it: its own forward, in float32, and Accelerate would take it, or a
    copy of it, again.
    """
    model: nn.Module = accelerator.unwrap_model(state.network, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)  # what Accelerate puts back is a copy of the class's own
    vars(model).pop("_is_accelerate_prepared", None)  # a model with this mark is neither moved to the device nor cast
    return model


def new_state(model: nn.Module, settings: LoopSettings, accelerator: Accelerator) -> TrainState:
    """A state before its first step: AdamW over all Parameters, scales among them, without weight decay."""
    # fused, it would skip a step that overflows fp16 by itself, and Accelerate not know of it
    fused = accelerator.scaler is None
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=fused)
    network, prepared = accelerator.prepare(model, optimizer)
    state = TrainState(model=model, optimizer=prepared, network=network, scaler=accelerator.scaler)
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
    """Train from state.step to settings.steps; the state holds the result.

    Raises:
        DivergedError: the loss, a gradient or a weight is not finite (the step, its terms, and the causes that
            callbacks see); the step has changed no weight.
        InterruptedByUserError: Ctrl-C, after the step at hand and a checkpoint.
        CheckpointError: a checkpoint cannot be written.
    """
    with _interrupts() as interrupted:
        while state.step < settings.steps:
            for callback in callbacks:
                callback.before_step(state)
            report = _step(state, callbacks, batches(state.step), settings, accelerator=accelerator)
            state.step += 1
            _average(state, settings.ema)
            with agreed():
                for callback in callbacks:
                    callback.after_step(state, report)
            stop = any_process(interrupted.is_set())
            if checkpoints and (stop or state.step == settings.steps or state.step % checkpoints.every == 0):
                _checkpoint(checkpoints, state, callbacks)
            if stop:  # in the last step too: the stages that follow are not begun
                kept = ": its checkpoint is kept" if checkpoints else ""
                raise InterruptedByUserError(f"interrupted at step {state.step} of {settings.steps}{kept}")


def _step(
    state: TrainState, callbacks: Sequence[Callback], batch: Batch, settings: LoopSettings, *, accelerator: Accelerator
) -> StepReport:
    rate = settings.learning_rate_at(state.step, state.setbacks)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    parts = _micro_batches(_share(batch, accelerator), settings.accumulation)
    while True:  # once; again where gradients have overflowed fp16, at half their scale
        with others_alive():
            values = _gradients(state, callbacks, parts, accelerator)
        accelerator.unscale_gradients(state.optimizer)
        gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
        total = get_total_norm(gradients)
        # the weights' own too: quantizers clamp one that is infinite, and neither loss nor gradients would tell
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
    state: TrainState, callbacks: Sequence[Callback], parts: Sequence[Batch], accelerator: Accelerator
) -> dict[str, float]:
    """Forward and backward of every micro-batch; the loss terms, means over all micro-batches of all processes."""
    sums: dict[str, Tensor] = {}
    if not state.model.training:  # asked of the model: a wrapper says so of itself from the start
        state.network.train()
        hold_statistics(state.network)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(state.network):
            terms: dict[str, Tensor] = {}
            for callback in callbacks:
                terms.update(callback.loss_terms(state, part))
            accelerator.backward(torch.stack(list(terms.values())).sum() / len(parts))
        for name, term in terms.items():
            sums[name] = sums.get(name, torch.zeros_like(term.detach())) + term.detach() / len(parts)
    means: Tensor = accelerator.reduce(torch.stack(list(sums.values())), "mean")
    return dict(zip(sums, means.tolist(), strict=True))


def _may_overflow(scaler: torch.amp.GradScaler | None) -> bool:
    """Whether gradients that are not finite may be so only since fp16 has been scaled too high: the scaler halves the
    scale each time.
    """
    return scaler is not None and scaler.get_scale() > SMALLEST_SCALE


def _divergence(state: TrainState, callbacks: Sequence[Callback], values: dict[str, float], norm: float) -> str:
    """What is not finite, and why; the gradients are still as they came."""
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
    """Equal parts, so that the mean of their means is the batch's."""
    size = len(next(iter(batch.values())))
    assert size % count == 0, f"a process's batch of {size} is not {count} equal micro-batches"
    return [{name: value.chunk(count)[number] for name, value in batch.items()} for number in range(count)]


@torch.no_grad()
def _average(state: TrainState, decay: float) -> None:
    if state.ema is None:
        return
    since = state.step - state.ema_since
    weight = 1.0 - min(decay, (1 + since) / (10 + since))
    torch._foreach_lerp_(list(state.ema.values()), [state.parameters[name].detach() for name in state.ema], weight)


def _checkpoint(folder: CheckpointFolder, state: TrainState, callbacks: Sequence[Callback]) -> None:
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
    """Set on the first Ctrl-C or request to terminate; a second one ends the program at once."""
    asked = threading.Event()

    def note(_signal: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if asked.is_set():  # after the loop had last looked
        raise KeyboardInterrupt
