"""Attention's two products in INT8: what they read is observed in a model, and quantized in its exported graph.

Softmax(q k^T / sqrt(d)) v: queries, keys and values become signed bytes, the probabilities unsigned ones, each tensor
with one scale from the largest value that was seen. This is post-training quantization: the model that is exported
computes them in floating point. Not
here: its layers (traceable_modules.py), the conversion (export_model.py), and what became of the products (proof.py).
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

Product = Callable[[str, Tensor, Tensor, Tensor, float], Tensor]
"""(path of the module that attends, query, key, value, scale of q k^T) -> what it gives."""


@dataclass(frozen=True)
class AttentionRange:
    """The largest magnitudes that one attention was seen to multiply."""

    query: float
    key: float
    value: float
    probability: float


def masked_attention(model: nn.Module, example: PredictArguments) -> tuple[str, ...]:
    """The modules whose attention cannot be computed in INT8: it is causal, or under a mask. Of a model of shapes alone
    too.
    """

    def plain(_: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    with evaluating(model), _products(model, plain) as masked:
        predict(model, *example)
    return tuple(masked)


def attention_ranges(model: nn.Module, batches: Iterable[PredictArguments]) -> dict[str, AttentionRange]:
    """Watch a model predict; the path of each module that attends -> what its products read.

    Those of `masked_attention` are left out.

    Args:
        model: any.
        batches: inputs of `predict`.

    Raises:
        ExportError: values that are NaN or infinite.
    """
    found: dict[str, AttentionRange] = {}

    def watch(path: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        probability = _probabilities(query, key, scale)
        seen = AttentionRange(*(float(tensor.abs().max()) for tensor in (query, key, value, probability)))
        if not all(math.isfinite(largest) for largest in vars(seen).values()):
            raise ExportError(f"{path}: its attention reads NaN or infinity")
        before = found.get(path, seen)
        found[path] = AttentionRange(
            *(max(pair) for pair in zip(vars(before).values(), vars(seen).values(), strict=True))
        )
        return torch.matmul(probability, value)

    with evaluating(model), _products(model, watch):
        for batch in batches:
            predict(model, *batch)
    return found


@contextmanager
def quantized_attention(model: nn.Module, ranges: Mapping[str, AttentionRange]) -> Iterator[None]:
    """Within, the products of the attentions that have ranges are written as fake quantization that OpenVINO executes
    in INT8.
    """

    def compute(path: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        at = ranges[path]
        probability = _probabilities(
            _quantized(query, at.query, SIGNED_GRID), _quantized(key, at.key, SIGNED_GRID), scale
        )
        return torch.matmul(
            _quantized(probability, at.probability, UNSIGNED_GRID), _quantized(value, at.value, SIGNED_GRID)
        )

    with _products(model, compute, ranges):
        yield


def name_products(graph: ov.Model, ranges: Mapping[str, AttentionRange]) -> None:
    """Name the softmax between the products of each quantized attention of a converted graph PATH/softmax.

    Raises:
        ExportError: an attention that the graph does not have exactly once.
    """
    found = dict.fromkeys(ranges, 0)
    for node in graph.get_ordered_ops():
        path = traced_path(node.get_friendly_name())
        if node.get_type_name() == "Softmax" and path in found:
            found[path] += 1
            node.set_friendly_name(f"{path}/softmax")
    if wrong := [f"{path or 'the network itself'} {times} times" for path, times in found.items() if times != 1]:
        raise ExportError(
            f"quantization.attention: got int8; in the converted graph attention is computed by {', '.join(wrong)}; "
            "allowed once by a module below the network, or float"
        )


def _probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.softmax(torch.matmul(query, key.transpose(-2, -1)) * scale, dim=-1)


def _quantized(x: Tensor, largest: float, grid: tuple[int, int]) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, max(largest, torch.finfo(torch.float32).tiny) / grid[1], 0, *grid)


class _Attending(TorchFunctionMode):
    """Puts a function in the place of scaled_dot_product_attention, and tells it the module that is being called."""

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
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (self.paths is not None and self.calls[-1] not in self.paths):
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("attn_mask") is not None or given.get("is_causal") or given.get("enable_gqa"):
            self.masked[self.calls[-1]] = None
            return func(*args, **kwargs)
        scale = given.get("scale")
        query = given["query"]
        return self.compute(
            self.calls[-1],
            query,
            given["key"],
            given["value"],
            query.shape[-1] ** -0.5 if scale is None else float(scale),
        )


@contextmanager
def _products(model: nn.Module, compute: Product, paths: Iterable[str] | None = None) -> Iterator[Mapping[str, None]]:
    """Within, `compute` is called for every attention, or those of the paths; yields the paths that it cannot be called
    for.
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
