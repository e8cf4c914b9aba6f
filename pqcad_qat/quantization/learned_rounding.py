"""Post-training quantization by learned rounding: whether each weight goes up or down is learned block by block, so
that what a block returns changes little.

The method. Every weight gets a shift between -1/2 and 1/2 of its level, which is added before it is rounded and begins
at 0. The shifts of a block's weights follow the sign of the gradient of the block's squared error to full precision, in
steps that shrink to nothing (SignRound: Cheng et al. 2023, arXiv 2309.05516). Rounding is passed by the
straight-through estimator. The blocks come in the order of their calls. Each reads what the learned blocks before it
give, so it makes up for their errors too, and the states are those of the calibration set, their time steps mixed
(BRECQ: Li et al. 2021, arXiv 2102.05426; Q-Diffusion: Li et al. 2023, arXiv 2302.04304).

Not here: what blocks are (model_blocks.py), GPTQ (gptq_rounding.py), and ranges, which stay as they are: learned in the
same way, those of inputs made a model worse (NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_qat.machine.processes import is_first
from pqcad_qat.machine.tensor_files import save_tensors
from pqcad_qat.models.denoiser import DenoiserInput
from pqcad_qat.quantization.layer_state import QuantizedLayer, quantized_weight, weight_quantizer_of
from pqcad_qat.quantization.model_blocks import Block, BlockArguments, arguments_of, blocks_of, results_of
from pqcad_qat.quantization.plan import evaluating

BATCH = 8
"""States of a step."""

APART = 4
"""Every so many states teaches nothing; by these it is decided whether a block's shifts are kept."""

LARGEST = 2**31
"""Most bytes of what a block reads, and of what blocks return that are looked at together. Where one state of a block
takes much, fewer states are used.
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
) -> None:
    """Round the weights of `layers` onto their grids, at present widths and ranges.

    Args:
        model: the quantized model.
        full: the model in floating point, whose modules have the same paths.
        layers: layers of the model whose range of weights is learned, by path.
        batches: inputs of the model from the calibration set.
        steps: number of steps for each block.
        kept: folder for the weights of each finished block; blocks whose weights are there are not learned again.
        advance: called with 1 after each layer.
    """
    blocks = blocks_of(model, layers, batches[0])
    batches = batches[: min((_fitting(block, batches) for block in blocks), default=0)]
    learned = {block.name for place, block in enumerate(blocks) if kept is not None and _taken(block, kept, place)}
    targets: dict[str, list[Tensor]] = {}
    for place, block in enumerate(blocks):
        if block.name not in learned:
            if block.name not in targets:
                targets = results_of(full, _beside(blocks[place:], batches), batches)
            results = targets.pop(block.name)
            arguments = arguments_of(model, block, batches)
            with evaluating(model):
                _learn(model.get_submodule(block.name), block, arguments, results, steps=steps, seed=place)
            if kept is not None and is_first():
                save_tensors({name: layer.weight.detach() for name, layer in block.layers.items()}, _file(kept, place))
        advance(len(block.layers))


def _file(kept: Path, place: int) -> Path:
    return kept / f"block-{place:04d}.safetensors"


@torch.no_grad()
def _taken(block: Block, kept: Path, place: int) -> bool:
    """Give the block's layers the weights that an earlier process has learned, and tell whether it has."""
    if not _file(kept, place).exists():
        return False
    for name, weight in load_file(_file(kept, place)).items():
        block.layers[name].weight.copy_(weight)
    return True


def _fitting(block: Block, batches: Sequence[DenoiserInput]) -> int:
    """Number of batches whose states can be held."""
    of_batch = max(block.bytes_read, block.bytes_returned) * len(batches[0][0])
    return max(1, min(len(batches), LARGEST // max(1, of_batch)))


def _beside(blocks: Sequence[Block], batches: Sequence[DenoiserInput]) -> list[Block]:
    """The first of the blocks, and those after it whose results can be held beside its own."""
    states, taken = sum(len(x_t) for x_t, *_ in batches), 0
    found: list[Block] = []
    for block in blocks:
        taken += block.bytes_returned * states
        if found and taken > LARGEST:
            break
        found.append(block)
    return found


def _learn(
    module: nn.Module, block: Block, arguments: BlockArguments, results: Sequence[Tensor], *, steps: int, seed: int
) -> None:
    """Learn the rounding of one block, and write the rounded weights into its layers."""
    every, dice = torch.arange(len(results[0])), torch.Generator().manual_seed(seed)
    apart, taught = every[::APART], every if len(every) == 1 else every[every % APART != 0]
    sizes = [max(float(result.var()), torch.finfo().tiny) for result in results]
    levels = {name: _level(layer) for name, layer in block.layers.items()}
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


@torch.no_grad()
def _level(layer: QuantizedLayer) -> Tensor:
    """The distance of two levels of the layer's weights, in their units; broadcastable to them."""
    span, _, (smallest, largest) = weight_quantizer_of(layer).grid(layer.weight)
    level: Tensor = span.abs() / (-smallest or largest)
    return level


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
