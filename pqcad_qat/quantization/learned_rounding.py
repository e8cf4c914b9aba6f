"""Post-training quantization by learned rounding: whether each weight goes up or down is learned block by block, so
that what a block returns changes little.

The method. Every weight gets a shift between -1/2 and 1/2 of its level, which is added before it is rounded and begins
at 0. The shifts of a block's weights follow the sign of the gradient of the block's squared error to full precision, in
steps that shrink to nothing (SignRound: Cheng et al. 2023, arXiv 2309.05516). Rounding is passed by the
straight-through estimator. The blocks come in the order of their calls. Each reads what the learned blocks before it
give, so it makes up for their errors too, and the states are those of the calibration set, their time steps mixed
(BRECQ: Li et al. 2021, arXiv 2102.05426; Q-Diffusion: Li et al. 2023, arXiv 2302.04304).

Not here: what blocks are (model_blocks.py), GPTQ, and which layers are rounded (gptq_rounding.py). Ranges stay as they
are: learned in the same way, those of inputs made a model worse (NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_qat.machine.processes import is_first
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.models.denoiser import DenoiserInput
from pqcad_qat.quantization.finished_blocks import FinishedBlocks, small_enough
from pqcad_qat.quantization.layer_matching import listed
from pqcad_qat.quantization.layer_state import QuantizedLayer, level_size, quantized_weight, weight_quantizer_of
from pqcad_qat.quantization.model_blocks import Block, BlockArguments, arguments_of, blocks_of, results_of, rows_of
from pqcad_qat.quantization.plan import evaluating

BATCH = 8
"""States of a step."""

APART = 4
"""One of so many states teaches nothing; by these it is decided whether a block's shifts are kept."""

LARGEST = 2**31
"""Most bytes of what a block reads or returns, of what blocks return that are looked at together, and of what finished
blocks return. Where a state takes much, a block learns from fewer states, but at least from those of one step.
"""


def learn_rounding(
    model: nn.Module,
    full: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Sequence[DenoiserInput],
    *,
    steps: int,
    kept: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Round the weights of `layers` onto their grids, at present widths and ranges.

    A layer that is in no block keeps its weights, which are rounded each by itself.

    Args:
        model: the quantized model.
        full: the model in floating point, whose modules have the same paths.
        layers: layers of the model whose range of weights is learned, by path.
        batches: inputs of the model from the calibration set.
        steps: number of steps for each block.
        kept: folder for the weights of each finished block; blocks whose weights are there are not learned again.
        advance: called with the number of layers that are done since the last call.
        warn: receives a message for layers that are in no block, and for blocks that learn from fewer states.
    """
    blocks = blocks_of(model, layers, batches[0])
    counts = {block.name: _fitting(block, batches) for block in blocks}
    for message in _not_as_asked(layers, blocks, counts, sum(len(x_t) for x_t, *_ in batches)):
        warn(message)
    learned = {block.name for place, block in enumerate(blocks) if kept is not None and _taken(block, kept, place)}
    targets: dict[str, list[Tensor]] = {}
    finished, kept_results = (
        FinishedBlocks(model, max(counts.values(), default=0)),
        small_enough(blocks, counts, LARGEST),
    )
    for place, block in enumerate(blocks):
        if block.name not in learned:
            states = _first(batches, counts[block.name])
            if block.name not in targets:
                targets = results_of(full, _beside(blocks[place:], counts), states)
            results = targets.pop(block.name)
            with finished.returning(states):
                arguments = arguments_of(model, block, states)
            with evaluating(model):
                _learn(model.get_submodule(block.name), block, arguments, results, steps=steps, seed=place)
            if kept is not None and is_first():
                save_tensors({name: layer.weight.detach() for name, layer in block.layers.items()}, _file(kept, place))
        if block.name in kept_results:
            finished.add(block)
        advance(len(block.layers))


def _file(kept: Path, place: int) -> Path:
    return kept / f"block-{place:04d}.safetensors"


@torch.no_grad()
def _taken(block: Block, kept: Path, place: int) -> bool:
    """Give the block's layers the weights that an earlier process has learned, and tell whether it has."""
    try:
        weights = load_file(_file(kept, place))
    except (OSError, SafetensorError):  # not there, or damaged
        return False
    if {name: value.shape for name, value in weights.items()} != {
        name: layer.weight.shape for name, layer in block.layers.items()
    }:
        return False
    for name, weight in weights.items():
        block.layers[name].weight.copy_(weight)
    return True


def _fitting(block: Block, batches: Sequence[DenoiserInput]) -> int:
    """Number of states that a block learns from."""
    of_state = max(1, block.bytes_read, block.bytes_returned)
    return min(sum(len(x_t) for x_t, *_ in batches), max(BATCH, LARGEST // of_state))


def _not_as_asked(
    layers: Mapping[str, QuantizedLayer], blocks: Sequence[Block], counts: Mapping[str, int], asked: int
) -> Iterator[str]:
    """What differs from a policy that asks for so many states."""
    inside = {name for block in blocks for name in block.layers}
    if left := [name for name in layers if name not in inside]:
        yield f"ptq: weights are rounded each by itself in layers that can be learned in no block: {listed(left)}"
    if fewer := [name for name, count in counts.items() if count < asked]:
        least = f"at least {min(counts.values())}: more take too much memory"
        yield f"ptq: {listed(fewer)} learned from fewer than {asked} states, {least}"


def _first(batches: Sequence[DenoiserInput], count: int) -> list[DenoiserInput]:
    """The first states of all batches."""
    found: list[DenoiserInput] = []
    for batch in batches:
        if count > 0:
            found.append(rows_of(batch, slice(count)))
        count -= len(batch[0])
    return found


def _beside(blocks: Sequence[Block], counts: Mapping[str, int]) -> list[Block]:
    """The first of the blocks, and those after it that learn from as many states and whose results can be held too."""
    states, taken = counts[blocks[0].name], 0
    found: list[Block] = []
    for block in blocks:
        taken += block.bytes_returned * states
        if found and (taken > LARGEST or counts[block.name] != states):
            break
        found.append(block)
    return found


def _learn(
    module: nn.Module, block: Block, arguments: BlockArguments, results: Sequence[Tensor], *, steps: int, seed: int
) -> None:
    """Learn the rounding of one block, and write the rounded weights into its layers."""
    dice = torch.Generator().manual_seed(seed)
    # by chance: every second state may belong to the unconditional pass
    mixed = torch.randperm(len(results[0]), generator=dice)
    share = -(-len(mixed) // APART)
    apart, taught = mixed[:share], mixed[share:] if len(mixed) > 1 else mixed
    sizes = [max(float(result.var()), torch.finfo().tiny) for result in results]
    levels = {name: level_size(layer) for name, layer in block.layers.items()}
    shifts = {name: torch.zeros_like(layer.weight) for name, layer in block.layers.items()}

    def error(rows: Tensor) -> Tensor:
        """Squared error of what the block returns, as a share of its variance."""
        with _shifted(block, levels, shifts):
            returned = arguments.call(module, rows)
        pairs = zip(returned, results, sizes, strict=True)
        return torch.stack(
            [(own - full[rows].to(own.device)).square().mean() / size for own, full, size in pairs]
        ).sum()

    def whole_error() -> float:
        with torch.no_grad():
            return sum(float(error(rows)) * len(rows) for rows in torch.split(apart, BATCH))

    at_first = whole_error()
    with torch.enable_grad(), _learning(module, shifts):
        for step in range(steps):
            rows = taught[torch.randint(len(taught), (BATCH,), generator=dice)]
            slopes = torch.autograd.grad(error(rows), list(shifts.values()), materialize_grads=True)
            _follow(list(shifts.values()), slopes, (1 - step / steps) / steps)
    if whole_error() >= at_first:
        for shift in shifts.values():
            shift.zero_()
    for name, layer in block.layers.items():
        with torch.no_grad():
            layer.weight.add_(shifts[name] * levels[name])
            layer.weight.copy_(quantized_weight(layer))


@torch.no_grad()
def _follow(shifts: Sequence[Tensor], slopes: Sequence[Tensor], length: float) -> None:
    """Move the shifts by a step of this length, in levels, down the signs of the slopes."""
    for shift, slope in zip(shifts, slopes, strict=True):
        shift.sub_(length * slope.sign()).clamp_(-0.5, 0.5)


@contextmanager
def _shifted(block: Block, levels: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, the block's layers compute with their weights rounded after the shifts."""
    for name, layer in block.layers.items():
        shifted = layer.weight.detach() + shifts[name] * levels[name]
        layer.weight_quant.frozen = weight_quantizer_of(layer).fused(shifted)
    try:
        yield
    finally:
        for layer in block.layers.values():
            layer.weight_quant.frozen = None


@contextmanager
def _learning(module: nn.Module, shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, the shifts alone get gradients."""
    others = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for tensors, learns in ((others, False), (shifts.values(), True)):
        for tensor in tensors:
            tensor.requires_grad_(learns)
    try:
        yield
    finally:
        for tensors, learns in ((shifts.values(), False), (others, True)):
            for tensor in tensors:
                tensor.requires_grad_(learns)
