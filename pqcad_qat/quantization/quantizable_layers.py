"""The modules of a network that count as layers: those that can be quantized, and those that cannot.

Not here: what a policy's rules decide about them (plan.py).
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

KINDS: dict[type[nn.Module], Literal["Conv2d", "Linear"]] = {nn.Conv2d: "Conv2d", nn.Linear: "Linear"}
"""Classes of the layers that can be quantized, and their names in a plan."""

LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Classes of torch whose modules multiply by their own weights, and therefore count as layers."""
TABLES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm)
"""Classes of torch whose weights are looked up or only scale, and which therefore do not count as layers."""

CONSTANT = "reads a constant"
"""Why a layer stays in floating point if its input does not depend on the model's inputs."""


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of exactly nn.Conv2d and nn.Linear, by path.

    Subclasses and layers with hooks compute something else, so they are not included.
    """
    return {name: module for name, module in model.named_modules() if type(module) in KINDS and not _changed(module)}


def _changed(module: nn.Module) -> str:
    """Why a module computes something other than its class does, or "" if it does not."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "its hooks change it"
    return "" if isinstance(module._parameters.get("weight"), nn.Parameter) else "its weight is no Parameter"


def float_kind(layer: nn.Module) -> str:
    """The class of a floating-point layer, and the reason for floating point where it is no rule of the policy."""
    why = getattr(layer, "why_float", "") or (_changed(layer) if type(layer) in KINDS else "")
    return type(layer).__name__ + (f", {why}" if why else "")


def multiplies(module: nn.Module) -> bool:
    """Whether a module counts as a layer, which multiplies by its own weights.

    Those of torch are known by their classes, others by a matrix called weight. Tables and normalizations do not
    count.
    """
    if isinstance(module, LAYERS):
        return not isinstance(module, NonDynamicallyQuantizableLinear)  # a part of MultiheadAttention
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() >= 2
        and not type(module).__module__.startswith("torch.nn.")
        and not isinstance(module, TABLES)
    )


def parameter_count(layer: nn.Module) -> int:
    """Number of values in a layer's Parameters."""
    return sum(parameter.numel() for parameter in layer.parameters())
