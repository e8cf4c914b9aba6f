"""Rules meet a model: who claims which layer, what is shared, what it costs, and every fault at once."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from small_networks import EVERYTHING, SkipNetwork, Timeless, example, rule, skip_network
from tiny_runs import tiny_unet
from torch import Tensor, nn

from pqcad_qat.errors import PlanError
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.quantization.plan import LayerPlan, plan_layers, plan_with_remarks
from pqcad_qat.quantization.plan_facts import executes_int8, expected_bytes, float_layers, plan_json
from pqcad_qat.quantization.shortcuts import split_shortcuts
from pqcad_qat.report.tables import plan_table
from pqcad_qat.serving.packing import PACKED_WIDTHS, stored_bits

FLOAT_INPUT = LayerRule(match=("role:input",), keep_float=True)


def plan(
    *rules: LayerRule, model: nn.Module | None = None, ladder: tuple[int, ...] = (8, 6, 4)
) -> tuple[LayerPlan, ...]:
    return plan_layers(model or skip_network(), numbered(rules), ladder, example())


def test_the_first_rule_wins_and_order_is_the_models() -> None:
    layers = plan(rule("conv_*", bits=8), rule("re:to_[qk]", bits=3), rule("type:Conv2d", "type:Linear"))
    assert [layer.name for layer in layers] == [
        name for name, m in skip_network().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    claims = {layer.name: (int(layer.rule), layer.pattern) for layer in layers}
    assert claims["conv_in"] == (0, "conv_*")
    assert claims["to_k"] == (1, "re:to_[qk]")
    assert claims["to_v"] == (2, "type:Linear")
    assert claims["conv1"] == (2, "type:Conv2d")


def test_ladders_are_the_rungs_above_the_target() -> None:
    layers = {
        layer.name: layer.ladder for layer in plan(rule("conv_in", bits=8), rule("conv1", bits=5), rule("*", bits=2))
    }
    assert layers["conv_in"] == (8,)
    assert layers["conv1"] == (8, 6, 5)
    assert layers["down"] == (8, 6, 4, 2)


def test_specs_are_the_rules_words() -> None:
    inputs = {"symmetric": True, "signed": False}
    (layer,) = plan(rule("down", granularity="per_tensor", symmetric=False, scale="statistics", inputs=inputs))
    assert (layer.weights.per_channel, layer.weights.symmetric, layer.weights.learned_scale, layer.weights.signed) == (
        False,
    ) * 4
    assert (layer.inputs.symmetric, layer.inputs.signed, layer.inputs.learned_scale) == (True, False, True)
    assert layer.parameters == 8 * 8 * 9 + 8


def test_layers_that_read_one_tensor_share_the_first_ones_quantizer() -> None:
    groups = {layer.name: layer.input_group for layer in plan(EVERYTHING)}
    assert groups["to_q"] == groups["to_k"] == groups["to_v"] == "to_q"
    assert all(group == name for name, group in groups.items() if not name.startswith("to_"))


def test_every_attention_of_a_diffusers_unet_shares_and_nothing_else_does() -> None:
    model = tiny_unet()
    layers = plan_layers(model, numbered([EVERYTHING]), (8, 4), (torch.randn(1, 1, 32, 32), torch.tensor([5])))
    shared = {(layer.name, layer.input_group) for layer in layers if layer.name != layer.input_group}
    attentions = [name.removesuffix(".to_q") for name, _ in model.named_modules() if name.endswith(".to_q")]
    assert attentions
    assert shared == {(f"{a}.to_{x}", f"{a}.to_q") for a in attentions for x in "kv"}


def test_a_float_layer_in_between_does_not_break_the_group() -> None:
    groups = {layer.name: layer.input_group for layer in plan(LayerRule(match=("to_q",), keep_float=True), EVERYTHING)}
    assert groups["to_k"] == groups["to_v"] == "to_k"


def test_a_rule_for_a_split_convolution_claims_both_halves() -> None:
    model = split_shortcuts(skip_network(), example())
    layers = {
        layer.name: layer
        for layer in plan(rule("conv_shortcut", bits=8), rule("re:conv1", bits=6), rule("*"), model=model)
    }
    assert [layers[name].weights.bits for name in ("conv_shortcut.left", "conv_shortcut.right", "conv1", "down")] == [
        8,
        8,
        6,
        4,
    ]
    assert layers["conv_shortcut.left"].input_group != layers["conv_shortcut.right"].input_group


def test_unmatched_and_kept_layers_stay_float() -> None:
    model = skip_network()
    layers = plan(LayerRule(match=("conv_out",), keep_float=True), rule("type:Conv2d"), model=model)
    assert float_layers(model, layers) == ("to_q", "to_k", "to_v", "conv_out")


def test_all_faults_are_reported_at_once() -> None:
    rules = (
        rule("conv1_in"),
        rule("re:conv(", "down"),
        rule("type:Conv1d"),
        rule("*", bits=4),
        rule("conv_out", bits=8),
    )
    with pytest.raises(PlanError) as caught:
        plan(*rules)
    message = str(caught.value)
    assert [line.split("; allowed")[0].replace("quantization.layers", "") for line in message.splitlines()] == [
        "[0].match: got 'conv1_in', which matches no Conv2d or Linear of the model",
        "[1].match: got 're:conv(', no regular expression (missing ), unterminated subpattern at position 4)",
        "[2].match: got 'type:Conv1d', which matches no Conv2d or Linear of the model",
        "[4].match: got 'conv_out', which matches only layers that earlier rules have: [3] ('*')",
    ]
    assert "close names: conv_in" in message
    assert "its classes are Conv2d, Linear" in message


def test_a_pattern_that_fits_every_network_may_match_nothing_of_one_and_is_a_remark() -> None:
    model = Timeless(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    rules = numbered([rule("role:input", "role:time"), rule("*"), rule("role:output", "type:Linear", "type:Conv2d")])
    layers, remarks = plan_with_remarks(model, rules, (8, 4), example())
    assert [(layer.name, layer.pattern) for layer in layers] == [("0", "role:input"), ("2", "*")]
    assert remarks == (
        "quantization.layers[0].match: 'role:time' matches no Conv2d or Linear of the model",
        "quantization.layers[2].match: 'role:output' matches only layers that earlier rules have: [1] ('*')",
        "quantization.layers[2].match: 'type:Linear' matches no Conv2d or Linear of the model",
        "quantization.layers[2].match: 'type:Conv2d' matches only layers that earlier rules have: [0] ('role:input'), "
        "[1] ('*')",
    )


@pytest.mark.parametrize("rules", [(rule("role:time", "type:Linear"),), (FLOAT_INPUT, rule("type:Conv2d"))])
def test_rules_that_claim_nothing_to_quantize_are_a_fault(rules: tuple[LayerRule, ...]) -> None:
    with pytest.raises(
        PlanError, match=r"^quantization\.layers: got rules that claim no layer to quantize \(quantization.*\);"
    ):
        plan(*rules, model=Timeless(nn.Conv2d(1, 1, 1)))


def test_a_policy_may_keep_everything_in_floating_point_on_purpose() -> None:
    assert plan(FLOAT_INPUT, model=Timeless(nn.Conv2d(1, 1, 1))) == ()


def test_one_dead_pattern_of_a_rule_is_a_fault_although_the_others_match() -> None:
    with pytest.raises(PlanError, match=r"layers\[0\]\.match: got 'to_x', which matches no .*close names: to_"):
        plan(rule("down", "to_x"))


def test_readers_of_one_tensor_must_agree() -> None:
    with pytest.raises(PlanError) as caught:
        plan(rule("to_k", inputs={"bits": 4}), rule("*"))
    assert re.match(
        r"quantization\.layers\[0\]\.inputs: got 4 bits, .*; allowed 8 bits, .*, as rule \[1\]", str(caught.value)
    )
    assert str(caught.value).endswith("for they read the same tensor: to_q ('*') and to_k ('to_k')")


class Unfit(SkipNetwork):
    """With a layer that is never called and one of circular padding."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.down = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")


def test_layers_that_cannot_be_calibrated_or_exported_are_faults() -> None:
    with pytest.raises(PlanError) as caught:
        plan(rule("*"), model=Unfit())
    assert "quantization.layers[0].match: got '*', which names spare: the model never calls it" in str(caught.value)
    assert "got '*', which names down: padding_mode 'circular' has no integer kernel; allowed 'zeros'" in str(
        caught.value
    )


def test_a_fault_of_many_layers_names_the_first_of_them() -> None:
    network = skip_network()
    network.spare = nn.ModuleList(nn.Linear(3, 3) for _ in range(40))
    with pytest.raises(PlanError, match=r"names spare\.0, spare\.1, spare\.2 and 37 more: the model never calls"):
        plan(rule("*"), model=network)


class Special(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_subclasses_of_convolutions_are_not_layers_of_the_plan() -> None:
    model = skip_network()
    model.down = Special(8, 8, 3, padding=1)
    assert "down" not in {layer.name for layer in plan(rule("*"), model=model)}


def test_sizes_are_those_of_the_integers_and_scales() -> None:
    model = skip_network()
    layers = plan(rule("down", bits=4), rule("conv1", bits=8, symmetric=False), model=model)
    total = sum(parameter.numel() for parameter in model.parameters())
    down, conv1 = 8 * 8 * 9, 8 * 16 * 9
    assert expected_bytes(model, (), packed=True) == 4 * total
    assert expected_bytes(model, layers, packed=False) == 4 * (total - down - conv1) + down + conv1 + 8 * 4 + 8 * 5
    assert expected_bytes(model, layers, packed=True) == expected_bytes(model, layers, packed=False) - down // 2


@pytest.mark.parametrize(("bits", "stored"), [(2, 2), (3, 3), (4, 4), (5, 8), (7, 8)])
def test_packed_weights_take_as_many_bits_as_the_exporter_packs_them_to(bits: int, stored: int) -> None:
    model = skip_network()
    widest = np.array([2 ** (bits - 1) - 1, 1 - 2 ** (bits - 1)], np.int8)
    assert stored_bits(widest, PACKED_WIDTHS["packed"]) == stored
    layers = plan(rule("down", bits=bits), model=model)
    assert (
        expected_bytes(model, layers, packed=False) - expected_bytes(model, layers, packed=True)
        == 8 * 8 * 9 * (8 - stored) // 8
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_input_width_executes_in_int8(bits: int) -> None:
    (layer,) = plan(rule("down", inputs={"bits": bits}))
    assert executes_int8(layer)


@pytest.mark.parametrize(("bits", "runs"), [(8, False), (7, True), (4, True)])
def test_asymmetric_weights_of_8_bits_are_simulation_only(bits: int, runs: bool) -> None:
    (layer,) = plan(rule("down", bits=bits, symmetric=False))
    assert executes_int8(layer) is runs


def test_the_table_and_the_json_say_it_all() -> None:
    model = skip_network()
    layers = plan(rule("down", bits=8, symmetric=False), rule("to_*"), model=model)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(layers, model))
    text = console.export_text()
    for part in ("8>6>4", "8 of to_q", "float, simulated", "conv_out", "584", "1 layers do not run in INT8"):
        assert part in text
    content = json.loads(json.dumps(plan_json(layers, model)))
    assert content["layers"][0]["name"] == "down"
    assert content["layers"][0]["executes_int8"] is False
    assert content["float_layers"] == ["conv_in", "conv1", "conv_shortcut", "conv_out"]
    assert (
        content["expected_bytes"]["packed"] < content["expected_bytes"]["int8"] < content["expected_bytes"]["float32"]
    )
