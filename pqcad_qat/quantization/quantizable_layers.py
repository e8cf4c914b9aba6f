"""Which modules of a network are layers: those that can be quantized, and those that stay in floating point whatever a
policy says.

Not here: what a policy's rules make of them (plan.py).
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

KINDS: dict[type[nn.Module], Literal["Conv2d", "Linear"]] = {nn.Conv2d: "Conv2d", nn.Linear: "Linear"}

LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
TABLES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm)
"""Modules of torch that multiply weights of their own, and modules whose weights are looked up or only scale."""

CONSTANT = "reads a constant"
"""Why a layer is in floating point whose input no input of the model changes."""


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Conv2d and nn.Linear by path. Subclasses, and layers with hooks, compute something else, and are left
    alone.
    """
    return {name: module for name, module in model.named_modules() if type(module) in KINDS and not _changed(module)}


def _changed(module: nn.Module) -> str:
    """What of one module computes something else than its class does, "" if nothing."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "its hooks change it"
    return "" if isinstance(module._parameters.get("weight"), nn.Parameter) else "its weight is no Parameter"


def float_kind(layer: nn.Module) -> str:
    """The class of a layer in floating point, and why it is in it where no rule of the policy says so."""
    why = getattr(layer, "why_float", "") or (_changed(layer) if type(layer) in KINDS else "")
    return type(layer).__name__ + (f", {why}" if why else "")


def multiplies(module: nn.Module) -> bool:
    """Whether a module is a layer: torch's by their classes, others by a matrix called weight. Tables and
    normalizations are none.
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
    """All values of its Parameters."""
    return sum(parameter.numel() for parameter in layer.parameters())
