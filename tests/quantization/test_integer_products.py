"""Convolutions in INT8 against Brevitas's own computation, and the rule by which a layer is computed so.

Not here: the quantizers themselves (test_fake_quantization.py, test_quantized_layer.py), nor speed, which `profile`
shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import ASYMMETRIC_INPUTS, SYMMETRIC_WEIGHTS, layer_plan, quantized
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.quantization import brevitas_layers, integer_products
from pqcad_qat.quantization.conversion import unquantized
from pqcad_qat.quantization.integer_products import Geometry, applies, multiplies_integers
from pqcad_qat.quantization.plan import QuantizerSpec
from pqcad_qat.quantization.quantized_layer import (
    QuantizedLayer,
    begin_blend,
    end_blend,
    quantized_layer,
    set_blend,
    set_input_bits,
    set_input_range,
)

SIGNED_INPUTS = replace(ASYMMETRIC_INPUTS, symmetric=True, signed=True)
INPUTS = {
    "asymmetric": ASYMMETRIC_INPUTS,
    "signed": SIGNED_INPUTS,
    "unsigned": replace(SIGNED_INPUTS, signed=False),
    "4-bits": replace(ASYMMETRIC_INPUTS, bits=4),
    "fixed": replace(ASYMMETRIC_INPUTS, learned_scale=False),
}
WEIGHTS = {
    "4-bits": SYMMETRIC_WEIGHTS,
    "8-bits": replace(SYMMETRIC_WEIGHTS, bits=8),
    "per-tensor": replace(SYMMETRIC_WEIGHTS, per_channel=False),
    "statistics": replace(SYMMETRIC_WEIGHTS, learned_scale=False),
}
GEOMETRIES: Mapping[str, Mapping[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    "1x1": {"kernel_size": 1},
}
ORDINARY = {"kernel_size": 3, "padding": 1}

needs_vnni = pytest.mark.skipif(
    not multiplies_integers(), reason="this CPU, or the cap on its instruction sets, has no VNNI"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that are convolved in INT8, where a CPU has VNNI; every layer has products enough."""
    seen: list[Tensor] = []

    def watching(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x)
        return integer_products.convolve(x, *rest)

    monkeypatch.setattr(brevitas_layers, "convolve", watching)
    monkeypatch.setattr(integer_products, "PER_ACTIVATION", 1)
    monkeypatch.setattr(integer_products, "PER_WEIGHT", 1)
    return seen


def layer_of(
    weights: QuantizerSpec = SYMMETRIC_WEIGHTS, inputs: QuantizerSpec = ASYMMETRIC_INPUTS, **geometry: Any
) -> QuantizedLayer:
    """32 channels over 16, one of them far larger than the others."""
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 32, **(geometry or ORDINARY))
    with torch.no_grad():
        plain.weight[1] *= 20
    return quantized(plain, weights, inputs)


def activations(**changed: Any) -> Tensor:
    """Normal ones of twice the unit size, of which many lie outside of the layer's range."""
    return (2 * torch.randn(2, 16, 9, 12, generator=torch.Generator().manual_seed(1))).to(**changed).requires_grad_()


def brevitas(layer: QuantizedLayer, x: Tensor) -> Tensor:
    y = layer.input_quant.fused_activation_quant_proxy.tensor_quant(x)[0]
    weight = layer.weight_quant.tensor_quant(layer.weight)[0]
    return F.conv2d(y, weight, layer.bias, layer.stride, layer.padding, layer.dilation)


def gradients(y: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad((y * weights).sum(), tensors)


@needs_vnni
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_values_and_gradients_are_those_of_brevitas(
    calls: list[Tensor], inputs: str, weights: str, geometry: str
) -> None:
    layer, x = layer_of(WEIGHTS[weights], INPUTS[inputs], **GEOMETRIES[geometry]), activations()
    ours, theirs = layer(x), brevitas(layer, x)
    assert len(calls) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))
    tensors = [x, *layer.parameters()]
    for mine, reference in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@needs_vnni
def test_an_input_that_no_gradient_is_wanted_of_still_trains_the_layer(calls: list[Tensor]) -> None:
    layer, x = layer_of(), activations().detach()
    tensors = list(layer.parameters())
    for mine, reference in zip(gradients(layer(x), tensors), gradients(brevitas(layer, x), tensors), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert len(calls) == 1


@needs_vnni
def test_products_of_the_largest_integers_do_not_saturate(calls: list[Tensor]) -> None:
    layer = layer_of(WEIGHTS["8-bits"])
    with torch.no_grad():
        layer.weight.fill_(10.0)
    x = torch.full((1, 16, 8, 8), 10.0)
    torch.testing.assert_close(layer(x), brevitas(layer, x), rtol=1e-5, atol=0.0)
    assert len(calls) == 1


@needs_vnni
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_stays_and_the_values_do_not_depend_on_it(calls: list[Tensor], layout: torch.memory_format) -> None:
    layer, x = layer_of(), activations()
    y = layer(x.to(memory_format=layout))
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(y, layer(x))
    both = torch.cat([x, x], dim=1)
    assert torch.equal(layer(both[:, 16:]), layer(x))  # a half of a concatenation: not contiguous in any layout
    assert torch.equal(layer(x[:1]), layer(x)[:1])  # one state alone, whose layouts cannot be told apart by strides
    assert len(calls) == 6


@needs_vnni
def test_only_the_input_is_kept_for_the_backward_pass(calls: list[Tensor]) -> None:
    layer, x = layer_of(), activations()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        layer(x)
    assert kept.count(tuple(x.shape)) == 1
    assert len(calls) == 1


@needs_vnni
def test_what_is_not_finite_reaches_the_gradients(calls: list[Tensor]) -> None:
    """uint8 has no NaN, so a loss may not show one; the norm of the gradients does, and training stops on it before the
    step.
    """
    layer, x = layer_of(inputs=INPUTS["fixed"]), activations()
    with torch.no_grad():
        x[0, 0, 0, 0] = float("nan")
    assert not gradients(layer(x), [layer.weight])[0].isfinite().all()
    x = activations()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("nan")
    assert not gradients(layer(x), [x])[0].isfinite().all()
    assert len(calls) == 2


def in_bfloat16() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


def blended() -> QuantizedLayer:
    layer = layer_of(WEIGHTS["8-bits"])
    begin_blend(layer, 4)
    set_blend(layer, 0.5)
    return layer


FLOAT: Mapping[str, tuple[Callable[[], QuantizedLayer], Callable[[QuantizedLayer], AbstractContextManager[object]]]] = {
    "no gradient": (layer_of, lambda _: torch.no_grad()),
    "bf16": (layer_of, lambda _: in_bfloat16()),
    "unquantized": (layer_of, unquantized),
    "asymmetric weights": (lambda: layer_of(replace(SYMMETRIC_WEIGHTS, symmetric=False)), lambda _: nullcontext()),
    "groups": (lambda: layer_of(**ORDINARY, groups=2), lambda _: nullcontext()),
    "reflection": (lambda: layer_of(**ORDINARY, padding_mode="reflect"), lambda _: nullcontext()),
    "padding by name": (lambda: layer_of(kernel_size=3, padding="same"), lambda _: nullcontext()),
}


@pytest.mark.parametrize("case", FLOAT)
def test_what_is_not_integers_or_not_training_is_computed_in_floating_point(calls: list[Tensor], case: str) -> None:
    build, context = FLOAT[case]
    layer = build()
    with context(layer):
        layer(activations())
    assert calls == []


@needs_vnni
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_blend_is_the_sum_of_two_products(calls: list[Tensor], weights: str) -> None:
    layer, x = layer_of(WEIGHTS[weights]), activations()
    begin_blend(layer, 3)
    set_blend(layer, 0.3)
    ours = layer(x)
    blend = layer.weight_quant.tensor_quant.fused(layer.weight)
    theirs = F.conv2d(layer.input_quant.fused_activation_quant_proxy.tensor_quant(x)[0], blend, layer.bias, 1, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))
    tensors = [x, *layer.parameters()]
    for mine, reference in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    set_blend(layer, 1.0)
    before = layer(x)
    end_blend(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5 * float(before.detach().abs().max()))
    assert len(calls) == 3


@needs_vnni
def test_ties_are_rounded_to_even_on_either_side_of_zero(calls: list[Tensor]) -> None:
    halves = (torch.arange(16 * 8 * 8).reshape(1, 16, 8, 8) - 400) / 4
    for inputs, low, high in ((ASYMMETRIC_INPUTS, -101.0, 154.0), (SIGNED_INPUTS, -128.0, 127.0)):  # a scale of 1
        layer = layer_of(inputs=inputs, kernel_size=1)
        set_input_range(layer, low, high)
        theirs = brevitas(layer, halves)
        torch.testing.assert_close(layer(halves), theirs, rtol=1e-6, atol=1e-6 * float(theirs.detach().abs().max()))
    assert len(calls) == 2


@needs_vnni
def test_another_width_of_the_input_is_taken_at_once(calls: list[Tensor]) -> None:
    layer, x = layer_of(), activations()
    for bits in (2, 5, 8):
        set_input_bits(layer, bits)
        torch.testing.assert_close(layer(x), brevitas(layer, x), rtol=1e-5, atol=1e-4)
    assert len(calls) == 3


@needs_vnni
def test_an_input_without_a_range_is_refused() -> None:
    layer = quantized_layer(nn.Conv2d(16, 32, 3), layer_plan(nn.Conv2d(16, 32, 3)))
    with pytest.raises(ModelError, match="no range yet"):
        layer(activations())


@pytest.mark.parametrize(
    ("batch", "size", "inputs", "outputs", "kernel", "stride", "expected"),
    [
        (32, 32, 128, 128, 3, 1, True),
        (32, 32, 128, 32, 1, 1, True),
        (32, 32, 32, 32, 1, 1, False),  # too few products for each number
        (32, 32, 32, 1, 3, 1, False),
        (1, 8, 1280, 1280, 3, 1, False),  # each weight is used too seldom
        (32, 32, 8000, 16, 3, 1, False),  # sums could pass 2**31
    ],
)
def test_a_layer_is_in_int8_if_that_is_faster_and_exact(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    size: int,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(integer_products, "multiplies_integers", lambda: True)
    x, weight = (
        torch.empty(1).expand(shape) for shape in ((batch, inputs, size, size), (outputs, inputs, kernel, kernel))
    )
    geometry = Geometry([stride, stride], [kernel // 2] * 2, [1, 1])
    assert applies(x, weight, geometry) == expected
    assert not applies(x.double(), weight, geometry)
    assert not applies(x.to("meta"), weight, geometry)
    monkeypatch.setattr(integer_products, "multiplies_integers", lambda: False)
    assert not applies(x, weight, geometry)


@needs_vnni
@pytest.mark.parametrize(
    ("cap", "expected"), [("AVX2", "False"), ("AVX512_CORE", "False"), ("AVX512_CORE_VNNI", "True")]
)
def test_a_cap_on_the_instruction_sets_is_seen(cap: str, expected: str) -> None:
    """Without VNNI oneDNN's products saturate: the same machine, seen by a process under a cap, multiplies no
    integers.
    """
    code = "from pqcad_qat.quantization.integer_products import multiplies_integers; print(multiplies_integers())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": cap}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected
