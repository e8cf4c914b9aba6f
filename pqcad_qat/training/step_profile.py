"""The cost of one training step by its parts, in time and memory.

The method. The training loop itself makes the steps, and a stopwatch is put around the methods that each part calls.
Several models take turns, so that a slow moment falls on all alike. On an accelerator the host runs ahead of the
device, so the stopwatch waits for the device at both ends of a part. This makes the whole step slower, so its total
comes from further steps without these waits.

Not here: which models are compared (commands/profile.py), and the speed of inference (timing/latency.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import profile

from pqcad_qat.policy.value_types import Precision
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.quantization.trained_part import ALL, TrainedPart
from pqcad_qat.training.callback import BatchSource, Callback, TrainState
from pqcad_qat.training.trainer import LoopSettings, fit, new_accelerator, new_state

PARTS = ("batch", "schedule", "forward", "backward", "optimizer", "watch", "rest")
"""Parts of a training step, in order.

`schedule` is the callbacks' work before a step and `watch` their work after it; `rest` is the gradient norm and the
moving averages.
"""

WARM_UP = 2
"""Number of steps of each model that are not timed; they measure its memory."""


@dataclass(frozen=True)
class StepProfile:
    """Cost of a training step: medians over the timed steps, and memory.

    On an accelerator, each part is waited for in steps made for that, so the parts' sum is more than `total`.

    Attributes:
        milliseconds: milliseconds per step of each part.
        total: milliseconds per whole step, measured without any waiting that training does not do.
        kept_bytes: bytes that autograd keeps between the forward and the backward pass, without Parameters and
            buffers.
        held_bytes: bytes that stay from step to step: Parameters, buffers, the optimizer's state, and averages.
        peak_bytes: largest number of bytes allocated at once, beyond those allocated before the step.
    """

    milliseconds: Mapping[str, float]
    total: float
    kept_bytes: int
    held_bytes: int
    peak_bytes: int


@dataclass
class _Stopwatch:
    """Adds up the seconds of each part of a step, unless it is stopped.

    On an accelerator it waits for the device at both ends of each part.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    stopped: bool = False

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls are timed as this part."""

        def timing(*arguments: Any, **named: Any) -> Any:
            if self.stopped:
                return call(*arguments, **named)
            start = self.now()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start

        return timing

    def seconds_by_part(self, step: Callable[[], None]) -> dict[str, float]:
        """Seconds of each part of a step, of the rest, and of the whole step."""
        self.seconds.clear()
        start = self.now()
        step()
        total = self.now() - start
        return {**self.seconds, "rest": total - sum(self.seconds.values()), "total": total}

    def seconds_of(self, step: Callable[[], None]) -> float:
        """Seconds of a step whose parts are not timed."""
        self.stopped = True
        start = self.now()
        try:
            step()
            return self.now() - start
        finally:
            self.stopped = False

    def now(self) -> float:
        """The time in seconds, after all work given to the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def profile_steps(
    candidates: Mapping[str, tuple[nn.Module, Sequence[Callback]]],
    batches: BatchSource,
    precision: Precision,
    ema: float,
    *,
    runs: int,
    trained: TrainedPart = ALL,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, StepProfile]:
    """Train every candidate for `runs` timed steps, in turns, so that a slow moment falls on all of them alike.

    Args:
        candidates: name -> model, changed in place, and its callbacks.
        batches: batch source of all candidates.
        precision: arithmetic of the forward and backward pass.
        ema: decay of the weights' moving averages.
        runs: number of timed steps per candidate.
        trained: what is trained of those that are quantized.
        advance: function called with 1 after every step.
    """
    accelerator = new_accelerator(precision)
    watch = _Stopwatch(accelerator.device)
    accelerator.backward = watch.timed("backward", accelerator.backward)
    timed_batches = watch.timed("batch", batches)
    states: dict[str, TrainState] = {}
    for name, (model, callbacks) in candidates.items():
        settings = LoopSettings(1, learning_rate=1e-6, ema=ema, part=trained if quantized_layers(model) else ALL)
        states[name] = new_state(model, settings, accelerator)
        optimizer = states[name].optimizer
        optimizer.step = watch.timed("optimizer", optimizer.step)  # type: ignore[method-assign]
        for callback in callbacks:
            for part, method in (("schedule", "before_step"), ("forward", "loss_terms"), ("watch", "after_step")):
                setattr(callback, method, watch.timed(part, getattr(callback, method)))
    timed_steps: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    kept_bytes: dict[str, int] = {}
    peak_bytes: dict[str, int] = {}
    for turn in range(WARM_UP + runs):
        for name, state in states.items():
            step = partial(_train_once, state, candidates[name][1], timed_batches, ema, accelerator=accelerator)
            if turn == 0:
                kept_bytes[name] = _kept_bytes(state.model, step)
            elif turn == 1:  # the second step, since the optimizer allocates its state in the first
                peak_bytes[name] = _peak_bytes(accelerator.device, step)
            else:
                timed_steps[name].append(watch.seconds_by_part(step))
                if accelerator.device.type != "cpu":
                    timed_steps[name][-1]["total"] = watch.seconds_of(step)
            advance(1)
    return {
        name: _medians(steps, kept_bytes[name], _held_bytes(states[name]), peak_bytes[name])
        for name, steps in timed_steps.items()
    }


def _train_once(
    state: TrainState, callbacks: Sequence[Callback], batches: BatchSource, ema: float, *, accelerator: Accelerator
) -> None:
    """Make one training step with the loop itself."""
    fit(
        state,
        callbacks,
        batches,
        LoopSettings(state.step + 1, learning_rate=1e-6, shape="constant", ema=ema),
        accelerator=accelerator,
    )


def _medians(steps: Sequence[Mapping[str, float]], kept_bytes: int, held_bytes: int, peak_bytes: int) -> StepProfile:
    """The medians over the timed steps, with the memory of a step."""
    median = {part: 1e3 * statistics.median(step.get(part, 0.0) for step in steps) for part in (*PARTS, "total")}
    total = median.pop("total")
    return StepProfile(median, total, kept_bytes, held_bytes, peak_bytes)


def _held_bytes(state: TrainState) -> int:
    """Bytes that a training holds between two steps."""
    moments = (value for entry in state.optimizer.state.values() for value in entry.values())
    averages = (state.ema or {}).values()
    tensors = [*state.model.parameters(), *state.model.buffers(), *averages, *moments]
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor))


def _kept_bytes(model: nn.Module, step: Callable[[], None]) -> int:
    """Bytes of the storages that autograd saves while `step` runs, each counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def _peak_bytes(device: torch.device, step: Callable[[], None]) -> int:
    """Largest number of bytes allocated at once on a device while `step` runs, beyond those before it.

    CUDA counts this itself. Elsewhere it is the largest running sum of the allocations that torch's profiler records.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps the profiler's start and stop messages off the terminal
    with profile(profile_memory=True) as watched:
        step()
    changes = [
        event.nbytes()
        for event in watched.profiler.kineto_results.events()
        if event.name() == "[memory]" and _is_on(event, device)
    ]
    return int(max(accumulate(changes, initial=0)))


def _is_on(event: Any, device: torch.device) -> bool:
    """Whether an event of the profiler happened on this type of device."""
    return bool(event.device_type().name.lower() == device.type)
