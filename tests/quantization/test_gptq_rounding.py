"""GPTQ of layers and of models: Brevitas's results, from the columns that a layer really reads."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from brevitas.graph.gptq import gptq_mode
from small_networks import (
    EVERYTHING,
    Timeless,
    calibrated_network,
    error_of,
    example,
    quantized,
    rule,
    several_batches,
)
from torch import Tensor, nn

from pqcad_qat.policy.layer_rules import LayerRule
from pqcad_qat.quantization import gptq_rounding
from pqcad_qat.quantization.brevitas_gptq import LayerRounding, convolved_columns
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.gptq_rounding import round_weights, rounded_layers
from pqcad_qat.quantization.layer_state import quantized_weight
from pqcad_qat.quantization.plan import plan_layers

LAYERS = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(0, 1), bias=False), (4, 7, 9)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, padding="same", groups=2), (8, 6, 6)),
    "dilated": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding=1, padding_mode="circular"), (4, 6, 6)),
    "linear": (lambda: nn.Linear(16, 8), (10, 16)),
    "vector": (lambda: nn.Linear(16, 8), (16,)),
}


def inputs_of(shape: tuple[int, ...]) -> Tensor:
    """Correlated inputs of 32 states, without which rounding one by one is best already."""
    x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))
    return x + x.mean(dim=tuple(range(1, x.dim())), keepdim=True) + 0.5


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in {"linear", "vector"}])
def test_the_columns_are_those_that_the_layer_multiplies_with_its_weights(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make(), inputs_of(shape)
    assert isinstance(layer, nn.Conv2d)
    y = layer(x)
    every = torch.arange(y.shape[2] * y.shape[3]).repeat(len(x), 1)
    columns = convolved_columns(layer, x, lambda places: every[:, :places])
    weights = layer.weight.reshape(layer.groups, -1, columns.shape[1])
    by_columns = (weights @ columns).reshape(len(layer.weight), len(x), -1).transpose(0, 1).reshape(y.shape)
    bias = 0 if layer.bias is None else layer.bias[:, None, None]
    torch.testing.assert_close(by_columns + bias, y)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in {"grouped", "dilated"}])
def test_a_layer_gets_the_weights_that_brevitas_gives_it(kind: str) -> None:
    """Brevitas knows no padding by name or in a circle, and is given every column, as we are here."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    ours = quantized(make())
    theirs, x = copy.deepcopy(ours), inputs_of(shape)
    before = quantized_weight(ours)
    rounding = LayerRounding(ours, 10**6, 0)
    rounding.watch(x)
    rounding.round()
    model = nn.Sequential(theirs)
    with torch.no_grad(), gptq_mode(model, create_weight_orig=False, act_order=True, num_blocks=1) as mode:
        mode.model(x)
        mode.update()
    assert not torch.equal(quantized_weight(ours), before)
    # by another order of sums an error may round to the other side; of these weights none does
    torch.testing.assert_close(quantized_weight(ours), quantized_weight(theirs))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_outputs_are_nearer_than_with_each_weight_rounded_by_itself(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = quantized(make()), inputs_of(shape)
    read, weight = layer.input_quant(x), layer.weight.detach().clone()

    def error() -> float:
        with torch.no_grad():
            return float(
                (_applied(layer, read, quantized_weight(layer)) - _applied(layer, read, weight)).square().mean()
            )

    nearest = error()
    rounding = LayerRounding(layer, 8, 0)
    for part in x.split(8):
        rounding.watch(part)
    rounding.round()
    assert error() < 0.9 * nearest


def _applied(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(layer, nn.Conv2d):
        return F.linear(x, weight)
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=False,
        padding_mode=layer.padding_mode,
    )
    plain.weight.data = weight
    y: Tensor = plain(x)
    return y


def test_a_vector_that_belongs_to_no_state_is_one_column() -> None:
    layer = quantized(nn.Linear(16, 8))
    rounding = LayerRounding(layer, 8, 0)
    rounding.watch(torch.linspace(-1, 2, 16))
    read = layer.input_quant(torch.linspace(-1, 2, 16))
    torch.testing.assert_close(rounding.H[0], 2 * torch.outer(read, read))


def test_a_model_predicts_better_of_states_that_it_has_not_seen() -> None:
    model = calibrated_network()
    before = error_of(model)
    round_weights(model, several_batches(), passes=3)
    assert error_of(model) < 0.7 * before


def test_every_layer_is_rounded_once_and_for_what_rounded_layers_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of one layer, also where the memory of their moments alone asks for them, give the same model."""
    calls: list[str] = []
    one_by_one, few, done = calibrated_network(), calibrated_network(), []
    round_weights(one_by_one, several_batches(), passes=100, advance=done.append)
    assert done == [1] * len(quantized_layers(one_by_one))
    monkeypatch.setattr(gptq_rounding, "LARGEST", 1)
    watch = LayerRounding.watch

    def noted(rounding: LayerRounding, x: Tensor) -> None:
        calls.append(rounding.layer.plan.name)
        watch(rounding, x)

    monkeypatch.setattr(LayerRounding, "watch", noted)
    round_weights(few, several_batches(), passes=1)
    assert calls == [name for name in dict.fromkeys(calls) for _ in several_batches()], (
        "a pass watches other layers too"
    )
    assert calls[0] == "conv_in"
    assert calls[-1] == "conv_out"
    for name, value in one_by_one.state_dict().items():
        assert torch.equal(value, few.state_dict()[name]), name


@pytest.mark.parametrize("other", [rule("0", scale="statistics"), rule("0", bits=2)], ids=["computed", "2 bits"])
def test_ranges_stay_and_layers_of_computed_ranges_or_of_2_bits_stay_as_they_are(other: LayerRule) -> None:
    model = Timeless(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)).eval()
    rules = {"other": other, "rest": EVERYTHING}
    quantize_model(model, plan_layers(model, rules, (), example()))
    calibrate_ranges(model, several_batches())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    round_weights(model, several_batches(), passes=2)
    assert list(rounded_layers(model)) == ["1"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["1.weight"]
