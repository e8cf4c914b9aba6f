"""Rewrites of a converted graph: nodes that go, values that stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqcad_qat.deployment.rewrites import rewrite

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


def rewritten(function: Callable[..., Tensor], a: Tensor, b: Tensor) -> Counter[str]:
    """The kinds of nodes after the rewrite, whose result is PyTorch's."""
    graph = ov.convert_model(Function(function), example_input=(a, b))
    graph.reshape({0: list(a.shape), 1: list(b.shape)})
    rewrite(graph)
    found = ov.compile_model(graph, "CPU", F32)([a.numpy(), b.numpy()])[0]
    np.testing.assert_allclose(found, function(a, b).numpy(), rtol=1e-5, atol=1e-6)
    return Counter(node.get_type_name() for node in graph.get_ops())


A, B = (
    torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)),
    torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(1)),
)


def test_a_slice_that_is_an_input_of_the_concatenation_goes() -> None:
    kinds = rewritten(lambda a, b: torch.cat([a, b], 1)[:, 3:] * 2 + torch.cat([b, a], 1)[:, :6], A, B)
    assert kinds["Slice"] == kinds["Concat"] == 0


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda a, b: torch.cat([a, b], 1)[:, 2:], id="across the border"),
        pytest.param(lambda a, b: torch.cat([a, b], 1)[:, 3:8], id="a part of an input"),
        pytest.param(lambda a, b: torch.cat([a, b], 1)[:, :, 1:3], id="another axis"),
        pytest.param(lambda a, b: torch.cat([a, b], 1)[:, 3::2], id="every second"),
    ],
)
def test_another_slice_stays(function: Callable[..., Tensor]) -> None:
    assert rewritten(function, A, B)["Slice"] == 1


def test_attention_is_two_products_without_a_transpose() -> None:
    kinds = rewritten(lambda a, b: F.scaled_dot_product_attention(a, b[:, :3], b[:, 3:]), A, B)
    assert (kinds["ScaledDotProductAttention"], kinds["MatMul"], kinds["Transpose"]) == (0, 2, 0)


@pytest.mark.parametrize("more", [{"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(4, 4).tril().bool()}])
def test_other_attention_stays(more: dict[str, object]) -> None:
    kinds = rewritten(lambda a, b: F.scaled_dot_product_attention(a, b[:, :3], b[:, 3:], **more), A, B)  # type: ignore[arg-type]
    assert kinds["ScaledDotProductAttention"] == 1


def test_names_and_ports_of_the_graph_stay() -> None:
    x = op.parameter([1, 2, 3], np.float32, name="x")
    joined = op.concat([x, op.relu(x)], 1)
    part = op.slice(joined, op.constant([2]), op.constant([4]), op.constant([1]), op.constant([1]))
    graph = ov.Model([op.result(part)], [x], "small")
    graph.output(0).get_tensor().set_names({"out"})
    rewrite(graph)
    assert (graph.get_friendly_name(), graph.input(0).get_any_name()) == ("small", "x")
    assert graph.output(0).get_shape() == ov.Shape([1, 2, 3])
