"""Whose time a node of an execution graph is, on invented graphs; profiles of real ones are in test_step_times.py."""

from __future__ import annotations

import pytest

from pqcad_qat.timing.layer_times import REST, Node, StepProfile, node_owners


def node(kind: str, *reads: str, names: str = "") -> Node:
    return Node(kind, (names,), reads, 1)


GRAPH = {
    "sample": node("Input"),
    "cast": node("Reorder", "sample"),
    "first": node("Convolution", "cast", names="__module.denoiser.first/aten::_convolution/Convolution"),
    "to planes": node("Reorder", "first"),
    "norm": node("MVN", "to planes"),
    "quantizer": node("Subgraph", "norm"),
    "second": node("Convolution", "quantizer", names="second"),
    "add": node("Eltwise", "first", "second"),
    "rows": node("Subgraph", "add"),
    "q": node("FullyConnected", "rows", names="attention.to_q"),
    "k": node("FullyConnected", "rows", names="__module.denoiser.attention.to_k/aten::linear/MatMul"),
    "scores": node("MatMul", "q", "k", names="__module.denoiser.attention/aten::matmul/MatMul"),
    "softmax": node("Softmax", "scores"),
    "product": node("MatMul", "softmax", "add", names="__module.denoiser.attention/aten::matmul/MatMul_1"),
    "away": node("Reorder", "product"),
    "out": node("Output", "away"),
}
GROUPS = {"first": "first", "second": "second", "attention.to_q": "attention.to_q", "attention.to_k": "attention.to_q"}


def test_a_matrix_product_is_its_layers_own_whether_named_by_the_export_or_by_its_module() -> None:
    owners = node_owners(GRAPH, GROUPS)
    assert [owners[name] for name in ("first", "second", "q", "k")] == [(name,) for name in GROUPS]
    assert [owners[name] for name in ("scores", "product")] == [(REST,)] * 2


def test_what_flows_into_one_layer_alone_is_its_own_however_many_nodes_before() -> None:
    owners = node_owners(GRAPH, GROUPS)
    assert owners["cast"] == ("first",)
    assert [owners[name] for name in ("to planes", "norm", "quantizer")] == [("second",)] * 3


def test_what_flows_into_layers_that_read_one_tensor_is_shared_among_them() -> None:
    assert node_owners(GRAPH, GROUPS)["rows"] == ("attention.to_k", "attention.to_q")


@pytest.mark.parametrize("name", ["add", "softmax", "away", "out"])
def test_what_flows_elsewhere_too_or_into_no_layer_is_nobodys(name: str) -> None:
    assert node_owners(GRAPH, GROUPS)[name] == (REST,)


def test_layers_that_only_happen_to_read_one_node_do_not_share_it() -> None:
    apart = {**GROUPS, "attention.to_k": "attention.to_k"}
    assert node_owners(GRAPH, apart)["rows"] == (REST,)


def test_a_step_is_its_layers_and_the_rest() -> None:
    assert StepProfile({"a": 1.0, "b": 0.5}, 0.25).step == 1.75
