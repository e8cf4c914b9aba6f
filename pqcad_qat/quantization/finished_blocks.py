"""Blocks of a model that have their last weights: what they return is kept, and returned again instead of computed.

Learning block by block runs the model once for each block, as far as that block, on the same states every time. With
this, a run computes little but what lies between the blocks. Results are the same to the bit.

Not here: what blocks are (model_blocks.py), and what is done with them (learned_rounding.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten  # as diffusers does: torch has no public one

from pqcad_qat.machine.accelerators import device_of
from pqcad_qat.models.denoiser import DenoiserInput
from pqcad_qat.quantization.model_blocks import Block, tensors_of


@dataclass
class _Seen:
    """What a block returned in one run of the model.

    Attributes:
        leaves: for each batch, all values that it returned, tensors on the CPU.
        form: what holds them.
        versions: how often the tensors that it reads had been changed before the call.
        pure: whether no call has changed what it read.
    """

    leaves: list[list[Any]] = field(default_factory=list)
    form: TreeSpec | None = None
    versions: list[int] = field(default_factory=list)
    pure: bool = True


class FinishedBlocks:
    """What finished blocks of a model return for the first states of a calibration set."""

    def __init__(self, model: nn.Module, states: int) -> None:
        """Take the model, whose finished blocks do not change any more, and the number of states of a whole run."""
        self._model, self._states = model, states
        self._finished: set[str] = set()
        self._returned: dict[str, _Seen] = {}

    def add(self, block: Block) -> None:
        """Keep what this block, which is finished, returns from the next whole run on."""
        self._finished.add(block.name)

    @contextmanager
    def returning(self, batches: Sequence[DenoiserInput]) -> Iterator[None]:
        """Within the context, these batches are run through the model in order, and blocks return what is kept.

        They may be fewer states than in a whole run, the first of them.
        """
        sizes = [len(x_t) for x_t, *_ in batches]
        whole = sum(sizes) == self._states
        new = {name: _Seen() for name in self._finished - self._returned.keys() if whole}
        batch = -1

        def begin(*_: object) -> None:
            nonlocal batch
            batch += 1

        def again(seen: _Seen, module: nn.Module, *_: object, **__: object) -> Any:
            assert seen.form is not None
            # copies, since what the model does next may change them in place
            kept, device = seen.leaves[batch], device_of(module)
            rows = [leaf[: sizes[batch]].to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in kept]
            return tree_unflatten(rows, seen.form)

        with ExitStack() as changed:
            changed.enter_context(self._model.register_forward_pre_hook(begin))
            for name, seen in self._returned.items():
                module = self._model.get_submodule(name)
                changed.enter_context(_calling(module, partial(again, seen, module)))
            for name, seen in new.items():
                changed.enter_context(_watched(self._model.get_submodule(name), seen))
            yield
        for name, seen in new.items():
            if seen.pure and len(seen.leaves) == len(batches):
                self._returned[name] = seen
            elif seen.leaves:  # it does more than to return something, or is called more than once
                self._finished.remove(name)


def small_enough(blocks: Sequence[Block], counts: Mapping[str, int], most: int) -> set[str]:
    """The blocks whose results for all states can be kept in so many bytes together: those that return least.

    Args:
        blocks: the blocks.
        counts: number of states that each learns from, by name.
        most: number of bytes.
    """
    states, taken = max(counts.values(), default=0), 0
    found = set[str]()
    for block in sorted(blocks, key=lambda block: block.bytes_returned):
        taken += block.bytes_returned * states
        if taken <= most:
            found.add(block.name)
    return found


@contextmanager
def _watched(module: nn.Module, seen: _Seen) -> Iterator[None]:
    """Within the context, note what a module returns, and whether it changes what it reads."""

    def before(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.versions = [tensor._version for tensor in tensors_of((arguments, named))]

    def after(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        seen.pure &= seen.versions == [tensor._version for tensor in tensors_of((arguments, named))]
        leaves, seen.form = tree_flatten(output)
        seen.leaves.append([leaf.to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    with (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ):
        yield


@contextmanager
def _calling(module: nn.Module, function: Any) -> Iterator[None]:
    """Within the context, a call of the module is one of `function`."""
    own = vars(module).get("forward")
    vars(module)["forward"] = function
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
