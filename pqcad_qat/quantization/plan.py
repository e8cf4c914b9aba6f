"""The rules of a policy meet a model: which layer is quantized how, checked in full before anything is changed.

Not here: quantizers, and how a plan looks (report/tables.py). Nothing is rewritten: a plan is data and its sizes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pqcad_qat.errors import PlanError
from pqcad_qat.models.denoiser import PredictArguments, predict
from pqcad_qat.models.watched_layers import watched_inputs
from pqcad_qat.policy.origins import rule_key, rule_text
from pqcad_qat.quantization.layer_matching import claims, listed, quoted
from pqcad_qat.quantization.quantizable_layers import (
    CONSTANT,
    KINDS,
    float_kind,
    multiplies,
    parameter_count,
    quantizable_layers,
)

if TYPE_CHECKING:
    from pqcad_qat.policy.quantizers import InputQuantizer, LayerRule, WeightQuantizer

PACKED = (2, 3, 4)
"""Bits that deployed weights can be packed to; wider ones take a byte."""


@dataclass(frozen=True)
class QuantizerSpec:
    """How one tensor of a layer is quantized. ``signed`` "auto": unsigned where calibration sees no negative value."""

    bits: int
    per_channel: bool
    symmetric: bool
    signed: bool | Literal["auto"]
    learned_scale: bool
    range: str  # min_max, mse


@dataclass(frozen=True)
class LayerPlan:
    """One layer that will be quantized: by which rule's name, and by which of its patterns. ``input_group`` names the
    layer whose input quantizer it shares: its own name if none.
    """

    name: str
    kind: Literal["Conv2d", "Linear"]
    rule: str
    pattern: str
    weights: QuantizerSpec
    inputs: QuantizerSpec
    input_group: str
    ladder: tuple[int, ...]
    parameters: int
    int8_exception: bool


def plan_layers(
    model: nn.Module,
    rules: Mapping[str, LayerRule],
    ladder: Sequence[int],
    example: PredictArguments,
    *,
    constant: Collection[str] = (),
) -> tuple[LayerPlan, ...]:
    """Match every Conv2d and Linear of the model with the first rule that fits, in the order of the model's modules.

    ``ladder``: the weight widths of progressive quantization, descending; each layer takes its rungs above its own
    target.
    ``example``: input of one forward pass, which shows the layers that read the same tensor.
    ``constant``: layers that read what no input changes: they stay in floating point, since their outputs are constants
    of a graph.
    Raises PlanError with every fault: a pattern that matches nothing, a rule hidden by earlier ones, a planned layer
    that the model does not call or that no integer kernel can run, and layers that read one tensor but quantize it
    differently.
    """
    layers = quantizable_layers(model)
    for name in constant:
        layers[name].why_float = CONSTANT  # type: ignore[assignment]
    matches, faults = claims(model, layers, rules)
    first_readers, called = _read_tensors(model, layers, example)
    plans = []
    unfit: dict[tuple[str, str, str, str], list[str]] = {}
    for name, (rule_name, pattern) in matches.items():
        rule = rules[rule_name]
        if rule.keep_float or rule.weights is None or rule.inputs is None or name in constant:
            continue
        for why, allowed in _unfit(name, layers[name], name in called):
            unfit.setdefault((rule_name, pattern, why, allowed), []).append(name)
        plans.append(
            _layer_plan(
                name,
                layers[name],
                rule_name,
                pattern,
                rule=rule,
                weights=rule.weights,
                inputs=rule.inputs,
                ladder=ladder,
            )
        )
    faults += [
        f"{rule_key(rule_name)}.match: got {quoted(pattern)}, which names {listed(names)}: {why}; allowed {allowed}"
        for (rule_name, pattern, why, allowed), names in unfit.items()
    ]
    plans, conflicts = _share_inputs(plans, first_readers)
    if faults + conflicts:
        raise PlanError("\n".join(faults + conflicts))
    return tuple(plans)


def missing_rungs(plan: Sequence[LayerPlan], ladder: Sequence[int]) -> tuple[str, ...]:
    """What is to be known of a ladder without a rung for the width of some layers: their last step is one that it does
    not list.
    """
    off: dict[tuple[int, ...], list[str]] = {}
    for layer in plan:
        if layer.weights.bits not in ladder:
            off.setdefault(layer.ladder[-2:], []).append(layer.name)
    return tuple(
        f"progressive.ladder: {list(ladder)} has no rung of {step[-1]} bits, the width of "
        f"{listed(names)}; the last step there is {'>'.join(map(str, step))}"
        for step, names in off.items()
    )


def executes_int8(layer: LayerPlan) -> bool:
    """Whether OpenVINO on a CPU runs the layer in INT8; if not, its widths are a simulation on that target.

    Inputs of every width from 2 to 8 bits do (export/traceable_modules.py says how). Asymmetric weights do up to 7
    bits: at 8 their distance to the zero point needs a ninth.
    """
    wide = not layer.weights.symmetric and layer.weights.bits == 8
    return not wide and not layer.int8_exception


def expected_bytes(model: nn.Module, plan: Sequence[LayerPlan], packed: bool) -> int:
    """Bytes of the deployed weights: planned layers as integers (``packed``: in 2, 3 or 4 bits where symmetric ones
    fit), the rest float32.

    Each weight scale is a float32, each weight zero point a byte.
    """
    planned = {layer.name for layer in plan}
    float_weights = {
        id(own) for name, module in model.named_modules() if name not in planned for own in module._parameters.values()
    }
    replaced: dict[
        int, int
    ] = {}  # a weight that several layers share is in float32 once, if at all, and in integers for each
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    for layer in plan:
        weight = model.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        if id(weight) not in float_weights:
            replaced[id(weight)] = 4 * weight.numel()
        scales = weight.shape[0] if layer.weights.per_channel else 1
        total += (weight.numel() * stored_bits(layer.weights, PACKED if packed else ()) + 7) // 8
        total += scales * (4 if layer.weights.symmetric else 5)
    return total - sum(replaced.values())


def stored_bits(weights: QuantizerSpec, widths: Collection[int]) -> int:
    """The fewest of the widths that the exporter can pack them to, or 8; a zero point that is folded in may need one
    bit more.
    """
    return min((bits for bits in widths if weights.symmetric and bits >= weights.bits), default=8)


def float_layers(model: nn.Module, plan: Sequence[LayerPlan]) -> tuple[str, ...]:
    """The layers that stay in floating point: all that multiply weights of their own, whether they could be quantized
    or not.
    """
    planned = {layer.name for layer in plan}
    return tuple(name for name, module in model.named_modules() if name not in planned and multiplies(module))


def plan_json(plan: Sequence[LayerPlan], model: nn.Module) -> dict[str, Any]:
    """The plan as plain data, for plan.json."""
    return {
        "layers": [
            {**asdict(layer), "ladder": list(layer.ladder), "executes_int8": executes_int8(layer)} for layer in plan
        ],
        "float_layers": list(float_layers(model, plan)),
        "float_kinds": {name: float_kind(model.get_submodule(name)) for name in float_layers(model, plan)},
        "expected_bytes": {"float32": expected_bytes(model, (), False), "int8": expected_bytes(model, plan, False)}
        | {"packed": expected_bytes(model, plan, True)},
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients, every module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _read_tensors(
    model: nn.Module, layers: dict[str, nn.Module], example: PredictArguments
) -> tuple[dict[str, str], set[str]]:
    """For each layer the first that reads the tensors it reads, in all calls of both, and the layers that the model
    calls at all.
    """
    read: dict[str, tuple[int, ...]] = {}
    alive: dict[int, Tensor] = {}  # so that the id of each tensor stays its own

    def note(name: str, tensor: Tensor) -> None:
        alive[id(tensor)] = tensor
        read[name] = (*read.get(name, ()), id(tensor))

    with watched_inputs((layer, partial(note, name)) for name, layer in layers.items()), evaluating(model):
        predict(model, *example)
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(tensors, name) for name, tensors in read.items()}, set(read)


def _layer_plan(
    name: str,
    layer: nn.Module,
    rule_name: str,
    pattern: str,
    *,
    rule: LayerRule,
    weights: WeightQuantizer,
    inputs: InputQuantizer,
    ladder: Sequence[int],
) -> LayerPlan:
    return LayerPlan(
        name=name,
        kind=KINDS[type(layer)],
        rule=rule_name,
        pattern=pattern,
        weights=QuantizerSpec(
            bits=weights.bits,
            per_channel=weights.granularity == "per_channel",
            symmetric=weights.symmetric,
            signed=weights.symmetric,
            learned_scale=weights.scale == "learned",
            range=weights.range,
        ),
        inputs=QuantizerSpec(
            bits=inputs.bits,
            per_channel=False,
            symmetric=inputs.symmetric,
            signed=inputs.signed if inputs.symmetric else False,
            learned_scale=inputs.scale == "learned",
            range=inputs.range,
        ),
        input_group=name,
        ladder=(*(rung for rung in ladder if rung > weights.bits), weights.bits),
        parameters=parameter_count(layer),
        int8_exception=rule.execution == "float",
    )


def _unfit(name: str, layer: nn.Module, called: bool) -> Iterator[tuple[str, str]]:
    """Why the layer cannot be quantized, and what can."""
    if "," in name:
        yield (
            "a comma in its path, which OpenVINO puts between names",
            "paths without one; keep_float: true leaves it alone",
        )
    if not called:
        yield (
            "the model never calls it, so its input cannot be calibrated",
            "layers that it calls; keep_float: true leaves it alone",
        )
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        yield f"padding_mode {layer.padding_mode!r} has no integer kernel", "'zeros'; keep_float: true leaves it alone"


def _share_inputs(plans: list[LayerPlan], first_readers: dict[str, str]) -> tuple[list[LayerPlan], list[str]]:
    """Give the layers that read one tensor the input group of the first planned of them."""
    leaders: dict[str, LayerPlan] = {}
    shared = []
    apart: dict[tuple[str, str], list[tuple[LayerPlan, LayerPlan]]] = {}
    for layer in plans:
        leader = leaders.setdefault(first_readers.get(layer.name, layer.name), layer)
        if leader.inputs != layer.inputs:
            apart.setdefault((leader.rule, layer.rule), []).append((leader, layer))
        shared.append(LayerPlan(**{**vars(layer), "input_group": leader.name}))
    return shared, [_conflict(pairs) for pairs in apart.values()]


def _conflict(pairs: Sequence[tuple[LayerPlan, LayerPlan]]) -> str:
    """Two rules that quantize one tensor's inputs differently, by the pairs of layers that read it."""
    leader, layer = pairs[0]
    got, allowed = (f"{reader.inputs.bits} bits, {quantizer_words(reader.inputs)}" for reader in (layer, leader))
    names = listed([f"{a.name} ({quoted(a.pattern)}) and {b.name} ({quoted(b.pattern)})" for a, b in pairs])
    return (
        f"{rule_key(layer.rule)}.inputs: got {got}; allowed {allowed}, as rule {rule_text(leader.rule)}, for they "
        f"read the same tensor: {names}"
    )


def quantizer_words(spec: QuantizerSpec) -> str:
    """How a tensor is quantized, in words."""
    sign = (
        ""
        if not spec.symmetric or spec.per_channel
        else {True: " signed", False: " unsigned", "auto": " auto-signed"}[spec.signed]
    )
    scale = f"{'learned' if spec.learned_scale else 'fixed'} scale from {spec.range}"
    return (
        f"{'symmetric' if spec.symmetric else 'asymmetric'}{sign}, "
        f"{'channel' if spec.per_channel else 'tensor'}, {scale}"
    )
