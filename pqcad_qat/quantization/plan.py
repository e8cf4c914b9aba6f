"""The plan of a quantization: which layers of a model are quantized, how, and by which rule of the policy.

Everything is checked before the model is changed, and all faults are reported at once. A plan itself is plain data.

Not here: how patterns match layers (layer_matching.py), what follows from a plan (plan_facts.py), how it is printed
(report/tables.py), and the quantized layers (quantized_layer.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from pqcad_qat.errors import PlanError
from pqcad_qat.models.denoiser import PredictArguments, predict
from pqcad_qat.models.watched_layers import watched_inputs
from pqcad_qat.policy.origins import rule_key, rule_text
from pqcad_qat.quantization.layer_matching import claims, listed, names_roles, quoted
from pqcad_qat.quantization.layer_roles import layer_roles
from pqcad_qat.quantization.quantizable_layers import (
    CONSTANT,
    KINDS,
    parameter_count,
    quantizable_layers,
)

if TYPE_CHECKING:
    from pqcad_qat.policy.layer_rules import InputQuantizer, LayerRule, WeightQuantizer


@dataclass(frozen=True)
class QuantizerSpec:
    """How one tensor of a layer is quantized: its weight, or its input.

    Attributes:
        bits: width.
        per_channel: whether each output channel has a scale of its own.
        symmetric: whether the zero point is 0.
        signed: whether the integers are signed; "auto" makes them signed if calibration sees a negative value.
        learned_scale: whether the range is trained; otherwise it stays fixed, or follows from the weight.
        range: how the range is chosen: "min_max" for the extremes, "mse" for the least squared error.
        equalize: whether each channel of an input is multiplied by a number of its own first (equalization.py).
    """

    bits: int
    per_channel: bool
    symmetric: bool
    signed: bool | Literal["auto"]
    learned_scale: bool
    range: str
    equalize: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """One layer that will be quantized.

    Attributes:
        name: path of the layer in the model.
        kind: class of the layer.
        rule: name of the policy's rule that claims it.
        pattern: pattern of that rule that matches it.
        weights: how its weight is quantized at the end.
        inputs: how its input is quantized.
        input_group: path of the layer whose input quantizer it uses, its own if none is shared.
        ladder: widths of its weight in progressive quantization, the widest first, its target width last.
        parameters: number of values in its weight and bias.
        int8_exception: whether the policy lets it execute in floating point.
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
    """The plan that `plan_with_remarks` makes, with the same arguments and errors."""
    return plan_with_remarks(model, rules, ladder, example, constant=constant)[0]


def plan_with_remarks(
    model: nn.Module,
    rules: Mapping[str, LayerRule],
    ladder: Sequence[int],
    example: PredictArguments,
    *,
    constant: Collection[str] = (),
) -> tuple[tuple[LayerPlan, ...], tuple[str, ...]]:
    """Match every Conv2d and Linear of the model with the first rule that fits, in the order of the model's modules.

    Args:
        model: the floating-point model.
        rules: the policy's rules by name, the first that matches a layer decides.
        ladder: weight widths of progressive quantization, the widest first; each layer takes those above its target.
        example: input of one forward pass, which shows the layers that read the same tensor, and their roles.
        constant: layers whose input does not depend on the model's inputs. They stay in floating point, since their
            outputs are constants of a graph.

    Returns:
        One plan for each layer that will be quantized, and remarks about patterns that fit every network and claim
        nothing of this one.

    Raises:
        PlanError: names every fault. A pattern is at fault if it matches nothing, or only layers that earlier rules
            have, unless it is a role, type:Conv2d or type:Linear. A planned layer is at fault if the model does not
            call it, or if no integer kernel can run it. So are layers that read one tensor but quantize it
            differently.
    """
    layers = quantizable_layers(model)
    for name in constant:
        layers[name].why_float = CONSTANT  # type: ignore[assignment]
    roles: Mapping[str, Collection[str]] = {}
    if names_roles(rules):
        with evaluating(model):
            roles = layer_roles(model, layers, example)
    claimed = claims(model, layers, rules, roles)
    faults = list(claimed.faults)
    first_readers, called = _read_tensors(model, layers, example)
    plans = []
    unfit: dict[tuple[str, str, str, str], list[str]] = {}  # (rule, pattern, reason, what is allowed) -> layers
    for name, (rule_name, pattern) in claimed.layers.items():
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
    return tuple(plans), tuple(claimed.remarks)


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
    """The first reader of each layer's tensors, and all layers that the model calls.

    Layers that read the same tensors in all their calls have the same first reader.
    """
    read: dict[str, tuple[int, ...]] = {}
    alive: dict[int, Tensor] = {}  # a tensor that is freed would give its id to another one

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
    """The plan of one layer by its rule, before layers that read the same tensor are joined."""
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
            equalize=inputs.equalize,
        ),
        input_group=name,
        ladder=(*(rung for rung in ladder if rung > weights.bits), weights.bits),
        parameters=parameter_count(layer),
        int8_exception=rule.execution == "float",
    )


def _unfit(name: str, layer: nn.Module, called: bool) -> Iterator[tuple[str, str]]:
    """For each reason why a layer cannot be quantized: the reason, and what is allowed instead."""
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
    """The message about two rules that quantize one tensor differently, from the pairs of layers that read it."""
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
        f"{'channel' if spec.per_channel else 'tensor'}, {scale}{', channels equalized' if spec.equalize else ''}"
    )
