"""Observation of the inputs of layers while their model runs.

Not here: what is done with the tensors, which the observers decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def watched_inputs(watchers: Iterable[tuple[nn.Module, Callable[[Tensor], object]]]) -> Iterator[None]:
    """Call a layer's watcher with the layer's input before each of its calls, within this context."""
    with ExitStack() as watching:
        for layer, see in watchers:
            watching.enter_context(layer.register_forward_pre_hook(_shower(see), with_kwargs=True))
        yield


def _shower(see: Callable[[Tensor], object]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def show(_layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        see(arguments[0] if arguments else named["input"])

    return show
