"""How one quantized layer is built from a floating-point layer, turned back, and described when it is printed.

Not here: its widths and ranges (layer_state.py), its integers (integer_layer.py), Brevitas's modules
(brevitas_layers.py), which layers are quantized (plan.py), and the conversion of a whole model (conversion.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pqcad_qat.quantization.brevitas_layers import (
    QuantizedConv2d,
    QuantizedLinear,
    input_quantizer,
    keep_unregistered,
    unregister_stateless,
    weight_quantizer,
)
from pqcad_qat.quantization.equalization import over_weights
from pqcad_qat.quantization.layer_state import QuantizedLayer, blend_state, estimate_weight_range, read_bits
from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec
from pqcad_qat.quantization.shared_input import SharedInput


def quantized_layer(layer: nn.Conv2d | nn.Linear, plan: LayerPlan) -> QuantizedLayer:
    """A quantized layer around the same Parameters.

    Weights are at the first rung of the plan's ladder, and the input has no range yet.
    """
    quantizers = {"weight_quant": weight_quantizer(plan, layer.weight), "input_quant": input_quantizer(plan)}
    if isinstance(layer, nn.Conv2d):
        quantized: QuantizedLayer = QuantizedConv2d(**_geometry(layer), device=layer.weight.device, **quantizers)
    else:
        quantized = QuantizedLinear(
            layer.in_features, layer.out_features, layer.bias is not None, device=layer.weight.device, **quantizers
        )
    quantized.plan, quantized.description, quantized.update = plan, describe, None
    # Brevitas keeps a reference to the weight that a layer was built with, so that weight gives up its memory here.
    quantized.weight.data = torch.empty(0)
    # Assigning the weight makes Brevitas build the weight quantizer anew, on the weight's device.
    quantized.weight, quantized.bias = (layer.weight, layer.bias)
    quantized.input_quant.to(layer.weight.device)
    quantized.weight_quant.to(layer.weight.device)
    unregister_stateless(quantized)
    estimate_weight_range(quantized)
    quantized.train(layer.training)
    return quantized


def float_layer(layer: QuantizedLayer) -> nn.Conv2d | nn.Linear:
    """A floating-point layer around the same Parameters; the weight is a new one where the input was equalized."""
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, QuantizedConv2d):
        plain = nn.Conv2d(**_geometry(layer), device="meta")  # without memory, since its Parameters are replaced below
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    factors = layer.input_quant.factors
    if factors is None:
        plain.weight = layer.weight
    else:
        plain.weight = nn.Parameter(layer.weight.detach() * over_weights(factors, layer), layer.weight.requires_grad)
    plain.bias = layer.bias
    return plain.train(layer.training)


def share_input(layer: QuantizedLayer, leader: QuantizedLayer) -> None:
    """Make the layer use the leader's input quantizer.

    Only the leader registers it as a module, so that its Parameters are trained and stored once.
    """
    keep_unregistered(layer, "input_quant", leader.input_quant)


def share_results(layers: Iterable[QuantizedLayer]) -> None:
    """Let linear layers that read the same tensor quantize it once for all of them.

    These are the linear layers with one input quantizer that are children of one module. Convolutions
    quantize their inputs each for itself.
    """
    siblings: dict[tuple[str, str], list[QuantizedLinear]] = {}
    for layer in layers:
        if isinstance(layer, QuantizedLinear):
            siblings.setdefault((layer.plan.input_group, layer.plan.name.rpartition(".")[0]), []).append(layer)
    for readers in siblings.values():
        shared = SharedInput(len(readers)) if len(readers) > 1 else None
        for layer in readers:
            layer.shared_input = shared


def describe(layer: QuantizedLayer) -> str:
    """The quantization of a layer in a few words."""
    weight_bits, input_bits = read_bits(layer)
    blend = blend_state(layer)
    towards = f"->{blend.next_bits} ({blend.share:.2f})" if blend else ""
    weights, inputs = layer.plan.weights, layer.plan.inputs
    granularity = "per_channel" if weights.per_channel else "per_tensor"
    return (
        f"weights={weight_bits}{towards} bits {_kind(weights)} {granularity}, inputs={input_bits} bits {_kind(inputs)}"
    )


def _geometry(layer: nn.Conv2d) -> dict[str, Any]:
    """The arguments by which a convolution of the same geometry is built."""
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "bias": layer.bias is not None,
        "padding_mode": layer.padding_mode,
    }


def _kind(spec: QuantizerSpec) -> str:
    """A quantizer's spec in a few words."""
    sign = (
        "" if spec.per_channel or not spec.symmetric else {True: "signed ", False: "unsigned ", "auto": ""}[spec.signed]
    )
    return (
        f"{sign}{'symmetric' if spec.symmetric else 'asymmetric'} {'learned' if spec.learned_scale else 'statistics'}"
    )
