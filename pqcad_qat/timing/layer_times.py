"""What each layer takes of a step, and what all else takes: from OpenVINO's own profile of a graph, node by node.

Not here: the time of the whole step by the clock (latency.py), or what is chosen by these times
(quantization/mixed_precision.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import openvino as ov

from pqcad_qat.export.proof import MATRIX_NODES
from pqcad_qat.export.traceable_modules import traced_path
from pqcad_qat.serving.packing import called_layer
from pqcad_qat.timing.baseline_trials import Inputs
from pqcad_qat.timing.latency import PROFILING, compile_for_latency, inputs_of, turn_order

ROUNDS, CALLS, WARMUP = 8, 5, 2
"""Profiles of a graph, timed calls of each, and calls before them, in which kernels are made.

Few calls and many profiles: a call that something else on the machine interrupts stays in its profile's mean for good.
"""

REST = ""
"""Stands for a layer where a node's time is nobody's."""


@dataclass(frozen=True)
class Node:
    """One node of an execution graph.

    Attributes:
        kind: layer type of the CPU plugin.
        names: of the original nodes that were fused into it.
        reads: the nodes whose outputs it reads.
        microseconds: of a call, the mean over all calls since the graph was compiled, in whole ones; 0 where it is not
            executed.
    """

    kind: str
    names: tuple[str, ...]
    reads: tuple[str, ...]
    microseconds: int


@dataclass(frozen=True)
class StepProfile:
    """Where the milliseconds of a step go.

    Attributes:
        layers: planned layer -> its own.
        rest: what belongs to no planned layer, or to several that do not read one tensor.
    """

    layers: Mapping[str, float]
    rest: float

    @property
    def step(self) -> float:
        """All of them."""
        return self.rest + sum(self.layers.values())


def step_profiles(graphs: Mapping[str, Path], groups: Mapping[str, str], inputs: Inputs) -> dict[str, StepProfile]:
    """Profile graphs in turns, each compiled anew for every profile; of a layer the fastest counts, since all that
    disturbs it adds.

    Args:
        graphs: a deployed folder or a graph's xml, by name.
        groups: planned layer -> its input group.
        inputs: of one call.

    Raises:
        ModelError: as `benchmark.read_source`.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in graphs}
    for turn in range(ROUNDS):
        for name in turn_order(tuple(graphs), turn):
            found[name].append(
                _profile(compile_for_latency(graphs[name], PROFILING, len(inputs["sample"])), groups, inputs)
            )
    return {name: _fastest(profiles, groups) for name, profiles in found.items()}


def _fastest(profiles: list[dict[str, float]], groups: Mapping[str, str]) -> StepProfile:
    least = {name: min(profile[name] for profile in profiles) for name in (*groups, REST)}
    return StepProfile({name: least[name] for name in groups}, least[REST])


def _profile(compiled: ov.CompiledModel, groups: Mapping[str, str], inputs: Inputs) -> dict[str, float]:
    """Milliseconds of a call by layer and REST. What OpenVINO tells is a mean that the first calls count in: they are
    taken out again.
    """
    request, named = compiled.create_infer_request(), inputs_of(compiled, inputs)

    def called(times: int) -> dict[str, Node]:
        for _ in range(times):
            request.infer(named)
        return execution_graph(compiled)

    cold, warm = called(WARMUP), called(CALLS)
    spent = dict.fromkeys((*groups, REST), 0.0)
    for name, owners in node_owners(warm, groups).items():
        mean = ((WARMUP + CALLS) * warm[name].microseconds - WARMUP * cold[name].microseconds) / CALLS
        for owner in owners:
            spent[owner] += max(0.0, mean) / 1e3 / len(owners)
    return spent


def execution_graph(compiled: ov.CompiledModel) -> dict[str, Node]:
    """What a model that was compiled with PROFILING executes, by name, in an order in which every node comes after
    those it reads.
    """
    nodes = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        kind, names, spent = (
            node.rt_info[key].astype(str) for key in ("layerType", "originalLayersNames", "execTimeMcs")
        )
        reads = tuple(value.get_node().get_friendly_name() for value in node.input_values())
        nodes[node.get_friendly_name()] = Node(
            kind, tuple(names.split(",")), reads, int(spent) if spent.isdigit() else 0
        )
    return nodes


def node_owners(nodes: Mapping[str, Node], groups: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Node -> the planned layers whose time it takes, evenly, or REST alone.

    A convolution or matrix product is its layer's own. Any other node (a change of precision or layout, a
    normalization, an activation, a quantizer) belongs to the one layer that its result reaches before another matrix
    product; or to several, where they read one tensor.
    """
    layers = {name: _layer(node, groups) for name, node in nodes.items() if node.kind in MATRIX_NODES}
    reached: dict[str, set[str]] = {name: set() for name in nodes}
    for name in reversed(list(nodes)):
        onward = {layers[name]} if name in layers else reached[name]
        for source in nodes[name].reads:
            reached[source] |= onward
    return {name: (layers[name],) if name in layers else _readers_of_one(reached[name], groups) for name in nodes}


def _layer(node: Node, groups: Mapping[str, str]) -> str:
    """The planned layer that a matrix node computes: in INT8 it bears the layer's path as name, in floating point as
    scope.
    """
    paths = (called_layer(name, groups) or traced_path(name) for name in node.names)
    return next((path for path in paths if path in groups), REST)


def _readers_of_one(layers: set[str], groups: Mapping[str, str]) -> tuple[str, ...]:
    return (
        tuple(sorted(layers))
        if len({groups.get(layer, REST) for layer in layers} - {REST}) == 1 and REST not in layers
        else (REST,)
    )
