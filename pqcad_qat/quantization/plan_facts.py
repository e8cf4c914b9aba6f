"""What follows from a plan, as plan.json records it: the layers that run in INT8, those in floating point, and bytes.

Not here: how a plan is made (plan.py), and how it is printed (report/tables.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from pqcad_qat.quantization.plan import LayerPlan, QuantizerSpec
from pqcad_qat.quantization.quantizable_layers import (
    float_kind,
    multiplies,
)

PACKED = (2, 3, 4)
"""Widths in bits to which deployed weights can be packed; wider weights take a byte each."""


def executes_int8(layer: LayerPlan) -> bool:
    """Whether OpenVINO on a CPU runs the layer in INT8.

    Inputs may have any width from 2 to 8 bits; export/traceable_modules.py says how. Asymmetric weights may have up to
    7 bits, because the distance of an 8-bit weight to its zero point needs a ninth bit. A layer that does not run in
    INT8 runs in floating point, and its widths are simulated there.
    """
    wide = not layer.weights.symmetric and layer.weights.bits == 8
    return not wide and not layer.int8_exception


def expected_bytes(model: nn.Module, plan: Sequence[LayerPlan], packed: bool) -> int:
    """Bytes of the deployed weights.

    Planned layers are stored as integers, and everything else in float32. Each weight scale is a float32, and each
    weight zero point a byte. A float32 weight that several layers share is stored once.

    Args:
        model: the floating-point model.
        plan: plan of its layers.
        packed: whether weights are packed to 2, 3 or 4 bits where that can hold them.
    """
    planned = {layer.name for layer in plan}
    float_weights = {
        id(own) for name, module in model.named_modules() if name not in planned for own in module._parameters.values()
    }
    # A shared weight is removed from the float32 total once, but each of its layers stores integers of its own.
    replaced: dict[int, int] = {}
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
    """Bits in which a weight is stored: the narrowest of the given widths that holds it, or else 8.

    Only symmetric weights are packed: an asymmetric one has its zero point folded in, which may need one bit more.
    """
    return min((bits for bits in widths if weights.symmetric and bits >= weights.bits), default=8)


def float_layers(model: nn.Module, plan: Sequence[LayerPlan]) -> tuple[str, ...]:
    """Paths of the layers that stay in floating point, whether they could be quantized or not."""
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
