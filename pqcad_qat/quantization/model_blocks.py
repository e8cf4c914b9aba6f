"""The blocks of a quantized model, and what they read and return while the model runs.

A block is the largest module of a few quantized layers that the model calls once, such as a residual or a transformer
block, and that can be called with the rows of some states. It is found by watching a call, so any model has blocks;
where a module does not fit, its parts are taken.

Not here: what is done with blocks (learned_rounding.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten  # as diffusers does: torch has no public one

from pqcad_qat.machine.accelerators import device_of
from pqcad_qat.models.denoiser import DenoiserInput
from pqcad_qat.quantization.conversion import CallEndedError, run_frozen
from pqcad_qat.quantization.layer_state import QuantizedLayer

MOST = 14
"""Largest number of quantized layers of a block with several: those of a transformer block with its projections."""


PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Types of values that hold no tensor of states."""


@dataclass(frozen=True)
class Block:
    """A block of a model.

    Attributes:
        name: path of its module.
        layers: its quantized layers, by path.
        of_states: for each tensor among its arguments, whether it has a row for each state.
        bytes_read: size of such rows of one state.
        bytes_returned: size of what it returns for one state.
    """

    name: str
    layers: Mapping[str, QuantizedLayer]
    of_states: tuple[bool, ...]
    bytes_read: int
    bytes_returned: int


@dataclass
class _Call:
    """Shapes of the tensors of a module's first call, whether it got or gave anything that nobody can take apart, and
    the number of all calls.
    """

    arguments: list[torch.Size] = field(default_factory=list)
    results: list[torch.Size] = field(default_factory=list)
    opaque: bool = False
    times: int = 0


@dataclass(frozen=True)
class BlockArguments:
    """The arguments of a block, for many states.

    Attributes:
        leaves: all values among them; tensors of `of_states` have a row for each state.
        form: what holds them.
        of_states: as the block's.
    """

    leaves: Sequence[Any]
    form: TreeSpec
    of_states: Sequence[bool]

    def call(self, module: nn.Module, rows: Tensor) -> list[Tensor]:
        """Call the module with the arguments of some states, and return its tensors (rows, ...)."""
        numbers, device = iter(self.of_states), device_of(module)
        chosen = [leaf[rows].to(device) if isinstance(leaf, Tensor) and next(numbers) else leaf for leaf in self.leaves]
        arguments, named = tree_unflatten(chosen, self.form)
        return tensors_of(module(*arguments, **named))


def blocks_of(model: nn.Module, layers: Mapping[str, QuantizedLayer], batch: DenoiserInput) -> list[Block]:
    """The blocks of a quantized model that hold `layers`, in the order of their calls.

    A layer is in no block if it is never called, or reads or returns tensors whose rows are not states.

    Args:
        model: the quantized model.
        layers: the layers that matter; others belong to no block.
        batch: inputs of the model, of which the first state is used.
    """
    # Only a tensor of states grows with their number, whatever its first dimension may be otherwise.
    one, two = (_calls(model, rows_of(batch, rows)) for rows in ([0], [0, 0]))

    def chosen(path: str, module: nn.Module) -> Iterator[Block]:
        inside = {name: layer for name, layer in layers.items() if name == path or name.startswith(f"{path}.")}
        call, more = one.get(path, _Call()), two.get(path, _Call())
        small = path in layers or (call.times == 1 and len(inside) <= MOST)
        if inside and small and _by_rows(call, more):
            of_states = tuple(a != b for a, b in zip(call.arguments, more.arguments, strict=True))
            read = sum(shape.numel() for shape, grows in zip(call.arguments, of_states, strict=True) if grows)
            yield Block(path, inside, of_states, 4 * read, 4 * sum(shape.numel() for shape in call.results))
        elif inside:
            for name, child in module.named_children():
                yield from chosen(f"{path}.{name}", child)

    order = {name: place for place, name in enumerate(one)}
    found = [block for name, child in model.named_children() for block in chosen(name, child)]
    return sorted(found, key=lambda block: order[block.name])


def arguments_of(model: nn.Module, block: Block, batches: Sequence[DenoiserInput]) -> BlockArguments:
    """What a block reads in a quantized model, on the CPU."""
    seen: list[tuple[list[Any], TreeSpec]] = []

    def see(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(tree_flatten((arguments, named)))
        raise CallEndedError

    with model.get_submodule(block.name).register_forward_pre_hook(see, with_kwargs=True):
        run_frozen(model, batches)
    (leaves, form), numbers = seen[0], iter(block.of_states)
    merged = [
        torch.cat([others[place].cpu() for others, _ in seen]) if isinstance(leaf, Tensor) and next(numbers) else leaf
        for place, leaf in enumerate(leaves)
    ]
    return BlockArguments(merged, form, block.of_states)


def results_of(model: nn.Module, blocks: Sequence[Block], batches: Sequence[DenoiserInput]) -> dict[str, list[Tensor]]:
    """The tensors (states, ...) that blocks, in the order of their calls, return in a model, on the CPU.

    Of a layer that is called more often it is what its first call returns.
    """
    seen: list[dict[str, list[Tensor]]] = []

    def see(name: str, _module: nn.Module, _arguments: object, output: Any) -> None:
        # copies, since what the model does next may change them in place
        seen[-1].setdefault(name, [value.to("cpu", copy=True) for value in tensors_of(output)])
        if name == blocks[-1].name:
            raise CallEndedError

    def begin(*_: object) -> None:
        seen.append({})

    with ExitStack() as watching:
        watching.enter_context(model.register_forward_pre_hook(begin))
        for block in blocks:
            watching.enter_context(model.get_submodule(block.name).register_forward_hook(partial(see, block.name)))
        run_frozen(model, batches)
    return {
        block.name: [torch.cat(parts) for parts in zip(*(of_batch[block.name] for of_batch in seen), strict=True)]
        for block in blocks
    }


def _calls(model: nn.Module, batch: DenoiserInput) -> dict[str, _Call]:
    """The modules that a call of the model calls, in order, by path."""
    calls: dict[str, _Call] = {}
    with _watched(model, calls):
        run_frozen(model, [batch])
    return calls


@contextmanager
def _watched(model: nn.Module, calls: dict[str, _Call]) -> Iterator[None]:
    def begin(path: str, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        call = calls.setdefault(path, _Call())
        call.times += 1
        if call.times == 1:
            call.arguments, call.opaque = _shapes((arguments, named)), _opaque((arguments, named))

    def end(path: str, _module: nn.Module, _arguments: object, output: Any) -> None:
        if calls[path].times == 1:
            calls[path].results = _shapes(output)
            calls[path].opaque |= _opaque(output)

    with ExitStack() as watching:
        for path, module in model.named_modules():
            watching.enter_context(module.register_forward_pre_hook(partial(begin, path), with_kwargs=True))
            watching.enter_context(module.register_forward_hook(partial(end, path)))
        yield


def _by_rows(one: _Call, two: _Call) -> bool:
    """Whether a module that was called for one state and for two read and returned a row for each."""
    read = [(a, b) for a, b in zip(one.arguments, two.arguments, strict=True) if a != b]
    returned = list(zip(one.results, two.results, strict=True))
    rows = all(a[:1] == (1,) and b[:1] == (2,) and a[1:] == b[1:] for a, b in read + returned)
    return bool(one.results) and rows and not one.opaque


def _opaque(values: Any) -> bool:
    return any(not isinstance(leaf, (*PLAIN, Tensor)) for leaf in tree_flatten(values)[0])


def rows_of(batch: DenoiserInput, rows: list[int] | slice) -> DenoiserInput:
    """Some states of a batch."""
    x_t, t, condition = batch
    return x_t[rows], t[rows], {name: value[rows] for name, value in condition.items()}


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def _shapes(values: Any) -> list[torch.Size]:
    return [value.shape for value in tensors_of(values)]
