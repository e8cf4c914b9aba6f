"""Rewrites of a converted graph: other nodes, the same values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
import torch
import torch.nn.functional as F
from rewritten_graph import A, B, rewritten
from torch import Tensor

from pqcad_qat.export.graph_rewrites import rewrite


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
    kinds = rewritten(lambda a, b: F.scaled_dot_product_attention(a, b[:, :3], b[:, 3:], **more), A, B)
    assert kinds["ScaledDotProductAttention"] == 1


def test_silu_is_a_quotient() -> None:
    a = torch.tensor([-200.0, -90.0, -1.0, -0.0, 0.5, 88.0, 200.0]).reshape(1, 1, 1, 7)
    kinds = rewritten(lambda a, b: F.silu(a) + 0 * b, a, torch.zeros(1, 1, 1, 7))
    assert (kinds["Swish"], kinds["Exp"]) == (0, 1)


def test_silu_of_a_vector_stays() -> None:
    """What is not an image is small, and OpenVINO computes Swish within the product before it."""
    assert rewritten(lambda a, b: F.silu(a.flatten(1)) + b.sum(), A, B)["Swish"] == 1


def test_names_and_ports_of_the_graph_stay() -> None:
    x = op.parameter([1, 2, 3], np.float32, name="x")
    joined = op.concat([x, op.relu(x)], 1)
    part = op.slice(joined, op.constant([2]), op.constant([4]), op.constant([1]), op.constant([1]))
    graph = ov.Model([op.result(part)], [x], "small")
    graph.output(0).get_tensor().set_names({"out"})
    rewrite(graph)
    assert (graph.get_friendly_name(), graph.input(0).get_any_name()) == ("small", "x")
    assert graph.output(0).get_shape() == ov.Shape([1, 2, 3])
