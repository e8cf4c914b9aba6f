"""INT8 products of attention: their ranges are observed in the model and become quantizers of the exported graph.

Method: attention is softmax(q k^T / sqrt(d)) v. Queries, keys and values are quantized to signed bytes and the
softmax's probabilities to unsigned ones. Each tensor has one scale, taken from the largest magnitude that was observed.
This is post-training quantization: in PyTorch the exported model computes these products in floating point.

Modules call torch's scaled_dot_product_attention. While this module watches or exports a model, a TorchFunctionMode
intercepts these calls, and forward hooks say which module makes the call.

Not here: the model's layers (traceable_modules.py), the conversion (export_model.py), and the check that the products
run in INT8 (execution.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openvino as ov
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pqcad_qat.errors import ExportError
from pqcad_qat.export.traceable_modules import SIGNED_GRID, UNSIGNED_GRID, traced_path
from pqcad_qat.models.denoiser import PredictArguments, predict
from pqcad_qat.quantization.plan import evaluating
from pqcad_qat.serving.packing import softmax_name

Product = Callable[[str, Tensor, Tensor, Tensor, float], Tensor]
"""A replacement of attention: (module path, query, key, value, scale of q k^T) -> the attention's output."""


@dataclass(frozen=True)
class AttentionRange:
    """Largest observed magnitudes of the four tensors that one attention multiplies.

    Attributes:
        query: largest magnitude of the queries.
        key: largest magnitude of the keys.
        value: largest magnitude of the values.
        probability: largest softmax output.
    """

    query: float
    key: float
    value: float
    probability: float


def masked_attention(model: nn.Module, example: PredictArguments) -> tuple[str, ...]:
    """The paths of modules whose attention cannot run in INT8, because it is causal, masked or grouped (enable_gqa).

    The model may also be one of shapes alone, on the meta device.
    """

    def plain(_: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    with evaluating(model), _products(model, plain) as masked:
        predict(model, *example)
    return tuple(masked)


def attention_ranges(model: nn.Module, batches: Iterable[PredictArguments]) -> dict[str, AttentionRange]:
    """Observe what the products of every attention read while a model predicts: module path -> ranges over all batches.

    The attentions that `masked_attention` reports are left out.

    Args:
        model: any model that `predict` can call.
        batches: arguments of `predict`.

    Raises:
        ExportError: an attention reads NaN or infinity.
    """
    ranges: dict[str, AttentionRange] = {}

    def watch(path: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        probability = _probabilities(query, key, scale)
        observed = AttentionRange(*(float(tensor.abs().max()) for tensor in (query, key, value, probability)))
        if not all(math.isfinite(largest) for largest in vars(observed).values()):
            raise ExportError(f"{path}: its attention got NaN or infinity; allowed finite queries, keys and values")
        before = ranges.get(path, observed)
        # over several batches the largest magnitudes count
        ranges[path] = AttentionRange(
            *(max(pair) for pair in zip(vars(before).values(), vars(observed).values(), strict=True))
        )
        return torch.matmul(probability, value)

    with evaluating(model), _products(model, watch):
        for batch in batches:
            predict(model, *batch)
    return ranges


@contextmanager
def quantized_attention(model: nn.Module, ranges: Mapping[str, AttentionRange]) -> Iterator[None]:
    """While the context lasts, attentions that have ranges compute with fake quantization.

    OpenVINO turns the fake quantization of an exported graph into INT8 products.
    """

    def compute(path: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        largest = ranges[path]
        probability = _probabilities(
            _quantized(query, largest.query, SIGNED_GRID), _quantized(key, largest.key, SIGNED_GRID), scale
        )
        return torch.matmul(
            _quantized(probability, largest.probability, UNSIGNED_GRID), _quantized(value, largest.value, SIGNED_GRID)
        )

    with _products(model, compute, ranges):
        yield


def name_products(graph: ov.Model, ranges: Mapping[str, AttentionRange]) -> None:
    """Name the softmax of each quantized attention in a converted graph after its module (packing.softmax_name).

    The name is how its two products are found later.

    Raises:
        ExportError: the graph does not compute one of these attentions exactly once.
    """
    times_computed = dict.fromkeys(ranges, 0)
    for node in graph.get_ordered_ops():
        path = traced_path(node.get_friendly_name())
        if node.get_type_name() == "Softmax" and path in times_computed:
            times_computed[path] += 1
            node.set_friendly_name(softmax_name(path))
    if wrong := [
        f"{path or 'the network itself'} {times} times" for path, times in times_computed.items() if times != 1
    ]:
        raise ExportError(
            f"quantization.attention: got int8; in the converted graph attention is computed by {', '.join(wrong)}; "
            "allowed once by a module below the network, or float"
        )


def _probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.softmax(torch.matmul(query, key.transpose(-2, -1)) * scale, dim=-1)


def _quantized(x: Tensor, largest: float, grid: tuple[int, int]) -> Tensor:
    """x fake-quantized to the grid, symmetrically around 0; the tiny lower bound avoids a scale of 0."""
    return torch.fake_quantize_per_tensor_affine(x, max(largest, torch.finfo(torch.float32).tiny) / grid[1], 0, *grid)


class _Attending(TorchFunctionMode):
    """Intercepts scaled_dot_product_attention and calls `compute` in its place, with the path of the calling module.

    Attributes:
        compute: the replacement.
        calls: stack of the paths of the modules that are being called, the innermost last.
        masked: paths whose attention was passed through because the replacement cannot compute it.
        paths: modules whose attention is replaced; None means all.
    """

    def __init__(self, compute: Product, calls: list[str], paths: Iterable[str] | None) -> None:
        super().__init__()
        self.compute, self.calls = compute, calls
        self.masked: dict[str, None] = {}
        self.paths = None if paths is None else set(paths)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `compute` for scaled_dot_product_attention, and any other function as it is."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (self.paths is not None and self.calls[-1] not in self.paths):
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        # the replacement knows no mask, no causal order and no shared heads, so the call stays in floating point
        if arguments.get("attn_mask") is not None or arguments.get("is_causal") or arguments.get("enable_gqa"):
            self.masked[self.calls[-1]] = None
            return func(*args, **kwargs)
        scale, query = arguments.get("scale"), arguments["query"]
        if scale is None:
            # int: a traced size would be computed at each call of a graph of any size, and be one input more to the
            # node in which OpenVINO runs the attention
            scale = int(query.shape[-1]) ** -0.5
        return self.compute(self.calls[-1], query, arguments["key"], arguments["value"], float(scale))


@contextmanager
def _products(model: nn.Module, compute: Product, paths: Iterable[str] | None = None) -> Iterator[Mapping[str, None]]:
    """While the context lasts, `compute` replaces the attention of all modules, or of those in `paths`.

    Yields the paths of attentions that it cannot replace; the set fills during the calls.
    """
    calls: list[str] = []

    def leave(*_: Any) -> None:
        calls.pop()

    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: calls.append(path))
        for path, module in model.named_modules()
    ]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with _Attending(compute, calls, paths) as attending:
            yield attending.masked
    finally:
        for hook in hooks:
            hook.remove()
