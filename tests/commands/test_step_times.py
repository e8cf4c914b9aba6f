"""A real small model in INT8 and in floating point: every planned layer gets its time from both graphs, and all stays
within the step.

Not here: whose a node is, case by case (test_layer_times.py). Nothing asserts a speed.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import POLICIES, tiny_overrides

from pqcad_qat.commands.step_times import Trial
from pqcad_qat.export.proof import INT8, MATRIX_NODES, executed_nodes, execution_precision, layer_precisions
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model
from pqcad_qat.quantization.plan import FLOAT
from pqcad_qat.stages.prepared import prepare
from pqcad_qat.timing import layer_times
from pqcad_qat.timing.latency import PROFILING, compile_for_latency
from pqcad_qat.timing.layer_times import REST, execution_graph, node_owners


@pytest.fixture(scope="module")
def trial(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """With folders `int8`, `float` and `half`: every second layer in INT8."""
    torch.set_num_threads(1)
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))
    prepared = prepare(policy)
    model = quantize_model(
        copy.deepcopy(prepared.split), [replace(layer, ladder=(layer.weights.bits,)) for layer in prepared.plan]
    )
    calibrate_ranges(model, [(torch.randn(2, *prepared.model.sample_shape), torch.tensor([500, 1]))])
    layers = integer_layers(model)
    made = Trial(policy, prepared, (), tmp_path_factory.mktemp("trial"))
    made.deploy("int8", layers)
    made.deploy("float", {})
    made.deploy("half", {name: layers[name] for name in list(layers)[::2]})
    return made


def groups(trial: Trial) -> dict[str, str]:
    return {layer.name: layer.input_group for layer in trial.prepared.plan}


def test_each_folder_runs_its_layers_in_int8_and_the_others_in_floating_point(trial: Trial) -> None:
    names = list(groups(trial))
    assert execution_precision(trial.folder / "int8", names).float_layers == ()
    half = execution_precision(trial.folder / "half", names).precisions
    assert {name for name, precision in half.items() if precision in INT8} == set(names[::2])
    nodes = executed_nodes(compile_for_latency(trial.folder / "float", {}))
    assert not any(node.precision in INT8 for node in nodes if node.kind in MATRIX_NODES)
    assert set(layer_precisions(nodes, names).values()) == {"absent"}, "no layer of it was exported as planned"


@pytest.mark.parametrize("name", ["int8", "float", "half"])
def test_every_node_has_an_owner_and_every_planned_layer_one_matrix_product(trial: Trial, name: str) -> None:
    graph = execution_graph(compile_for_latency(trial.folder / name, PROFILING))
    owners = node_owners(graph, groups(trial))
    assert set(owners) == set(graph)
    products = [owners[node] for node, found in graph.items() if found.kind in MATRIX_NODES]
    assert sorted(owner for owner in products if owner != (REST,)) == sorted((layer,) for layer in groups(trial))
    inner = "down_blocks.0.resnets.0.conv2"  # behind a normalization, whose result nothing else reads
    kinds = [graph[node].kind for node, found in owners.items() if found == (inner,)]
    assert {"Convolution", "Reduce", "Subgraph"} <= set(kinds)


def test_costs_are_the_step_by_the_clock_shared_out_by_the_profiles(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_times, "ROUNDS", 2)
    found = trial.costs("int8", "float")
    own = {layer.name: layer.weights.bits for layer in trial.prepared.plan}
    assert {name: set(at) for name, at in found.layers.items()} == {name: {bits, FLOAT} for name, bits in own.items()}
    assert all(
        cost >= 0 for at in found.layers.values() for cost in at.values()
    )  # 0: less than the profile's microsecond
    assert 0 <= found.fixed <= found.whole
    assert found.of(own) == pytest.approx(found.whole, abs=len(own))
    assert found.of(dict.fromkeys(own, FLOAT)) - found.fixed == sum(at[FLOAT] for at in found.layers.values())


def test_the_clock_times_every_folder(trial: Trial) -> None:
    found = trial.clock(["int8", "half"])
    assert list(found) == ["int8", "half"]
    assert min(found.values()) > 0
