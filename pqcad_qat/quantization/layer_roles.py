"""The role of a layer in its network: which tensors it reads, and what becomes of its output. Names play no part.

The method. The network runs once on an example, and every tensor of this pass carries marks: which of the network's
inputs it was computed from, whether a layer lies between it and x_t, and which layers it was computed from with no
other layer in between. Each operation of torch gives its results the marks of its arguments. A layer's output loses
the marks of the last two kinds and gets one that names this layer. Integers carry marks too, such as class labels
until a table turns them into numbers, which gradients could not follow. Values are not needed, so the meta device
suffices.

Not here: the patterns of rules that name a role (layer_matching.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pqcad_qat.errors import PlanError, PqcadError
from pqcad_qat.models.denoiser import PredictArguments, predict
from pqcad_qat.models.module_preparation import one_line
from pqcad_qat.models.watched_layers import watched_inputs
from pqcad_qat.policy.layer_rules import INPUT, OUTPUT, TIME
from pqcad_qat.quantization.quantizable_layers import multiplies

STATE, STEP, CONDITION = "x_t", "t", "condition"
"""Marks of a tensor that depends on these inputs of the network."""

DIRECT = "x_t, read directly"
"""Mark of a tensor that was computed from x_t with no layer in between."""

Marks = frozenset[str | nn.Module]
"""Marks of a tensor; a module stands for the layer that it was computed from with no other layer in between."""


def layer_roles(
    network: nn.Module, layers: Mapping[str, nn.Module], example: PredictArguments
) -> Mapping[str, Collection[str]]:
    """Return the layers of each role, by the role's name.

    role:input holds the layers that read x_t with no other layer in between. role:output holds those whose output
    becomes the prediction with no other layer in between. role:time holds those whose input depends on the time step
    and neither on x_t nor on a condition. A layer that is called several times has the first two roles if one of its
    calls has them, and the third only if all have it.

    Args:
        network: the network, in evaluation mode and without gradients.
        layers: the layers to look at, by path.
        example: input of one forward pass.

    Raises:
        PlanError: the network cannot be followed from x_t to its prediction.
    """
    read: dict[str, list[Marks]] = {name: [] for name in layers}
    trail = _Trail()

    def note(name: str, tensor: Tensor) -> None:
        read[name].append(trail.marks_of([tensor]))

    others = "patterns without role:, such as globs on the module path"
    try:
        with ExitStack() as watching:
            watching.enter_context(watched_inputs((layer, partial(note, name)) for name, layer in layers.items()))
            for module in network.modules():
                if multiplies(module):
                    watching.enter_context(module.register_forward_hook(trail.leave_layer))
            inputs = _marked(example, trail)
            with trail:
                final = trail.marks_of([predict(network, *inputs)])
    except PqcadError:
        raise
    except Exception as error:  # a module of the user's own may do anything
        raise PlanError(
            f"quantization.layers: got {one_line(error)} while the roles of layers were looked for; allowed {others}"
        ) from error
    if STATE not in final:
        raise PlanError(
            "quantization.layers: got role:, for a network whose prediction does not follow from x_t by operations of "
            f"torch; allowed {others}"
        )
    return {
        INPUT: [name for name, calls in read.items() if any(DIRECT in marks for marks in calls)],
        OUTPUT: [name for name, layer in layers.items() if layer in final],
        TIME: [
            name
            for name, calls in read.items()
            if calls and all(marks & {STATE, STEP, CONDITION} == {STEP} for marks in calls)
        ],
    }


def _marked(example: PredictArguments, trail: _Trail) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Copies of the example's tensors, each with its marks."""
    x_t, t, *rest = example
    inputs = x_t.clone(), t.clone(), {name: value.clone() for name, value in (rest[0] if rest else {}).items()}
    trail.mark([inputs[0]], frozenset({STATE, DIRECT}))
    trail.mark([inputs[1]], frozenset({STEP}))
    trail.mark(inputs[2].values(), frozenset({CONDITION}))
    return inputs


class _Trail(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries marks from the arguments of each operation to its results.

    Marks belong to a tensor's memory, so that views of it share them, and an operation that writes into a tensor marks
    all views of it. Only weak references to memory are kept. They let it be freed, yet no other memory takes its place
    in the table.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.marks: dict[StorageWeakRef, Marks] = {}

    def marks_of(self, tensors: Iterable[Any]) -> Marks:
        """The marks of all these tensors together; what is no tensor has none."""
        keys = (_memory(tensor) for tensor in tensors if isinstance(tensor, Tensor))
        return frozenset().union(*(self.marks.get(key, frozenset()) for key in keys))

    def mark(self, tensors: Iterable[Any], marks: Marks) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.marks[_memory(tensor)] = marks

    def leave_layer(self, layer: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        """Forward hook of a layer: its output depends on the same inputs of the network, and on them by this layer."""
        tensors = tree_leaves(output)
        self.mark(tensors, frozenset({*(self.marks_of(tensors) & {STATE, STEP, CONDITION}), layer}))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        marks: Marks = frozenset() if _reads_shape_alone(func) else self.marks_of(tree_leaves((args, kwargs)))
        if marks:
            for tensor in (*tree_leaves(result), *_written(func, args, kwargs)):
                self.mark([tensor], marks | self.marks_of([tensor]))
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes into, such as the first of add_."""
    if not func._schema.is_mutable:
        return []
    names = {argument.name for argument in func._schema.arguments if argument.is_write}
    places = [value for argument, value in zip(func._schema.arguments, args, strict=False) if argument.name in names]
    return tree_leaves((places, [value for name, value in kwargs.items() if name in names]))


def _reads_shape_alone(func: Any) -> bool:
    """Whether an operation, such as zeros_like or new_ones, uses its tensor for shape, dtype and device alone."""
    name: str = func.overloadpacket.__name__
    return name.endswith("_like") or name.startswith("new_")


def _memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
