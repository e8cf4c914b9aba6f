"""Conversion of a whole model: to quantized layers and back, calibration of its input ranges, and frozen weights.

Not here: a single layer (quantized_layer.py), its ranges and widths (layer_state.py), and its integers
(integer_layer.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import PredictArguments, predict
from pqcad_qat.models.watched_layers import watched_inputs
from pqcad_qat.quantization.brevitas_layers import QuantizedConv2d, QuantizedLinear
from pqcad_qat.quantization.equalization import channel_of
from pqcad_qat.quantization.integer_layer import IntegerLayer, integer_layer
from pqcad_qat.quantization.layer_state import (
    QuantizedLayer,
    equalize_input,
    estimate_weight_range,
    quantized_weight,
    read_bits,
    set_input_range,
)
from pqcad_qat.quantization.plan import LayerPlan, evaluating
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.quantization.quantized_layer import float_layer, quantized_layer, share_input, share_results
from pqcad_qat.quantization.ranges import InputRange, input_bounds
from pqcad_qat.quantization.shortcuts import replace_modules


def quantize_model(model: nn.Module, plan: Sequence[LayerPlan]) -> nn.Module:
    """Replace every planned layer in place by a quantized one around the same Parameters.

    Weights start at the first rung of their ladder. Inputs have no range yet, so a forward pass is refused until
    calibrate_ranges or a loaded state sets one.

    Raises:
        ModelError: the plan names a layer that this model does not have.
    """
    layers = quantizable_layers(model)
    if missing := [layer.name for layer in plan if layer.name not in layers]:
        raise ModelError(
            f"the plan: got layers that the model does not have in floating point: {', '.join(missing)}; allowed a "
            "plan that was made for this model"
        )
    done: dict[str, QuantizedLayer] = {}
    for layer in plan:
        original = layers[layer.name]
        assert isinstance(original, nn.Conv2d | nn.Linear)
        done[layer.name] = quantized_layer(original, layer)
        if layer.input_group != layer.name:
            share_input(done[layer.name], done[layer.input_group])
    share_results(done.values())
    replace_modules(model, {layers[name]: layer for name, layer in done.items()})
    return model


def dequantize_model(model: nn.Module) -> nn.Module:
    """The inverse of quantize_model, in place: floating-point layers around the same Parameters."""
    replace_modules(model, {layer: float_layer(layer) for layer in quantized_layers(model).values()})
    return model


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """All quantized layers by path."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantizedConv2d | QuantizedLinear)
    }


def integer_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """All quantized layers in integers, by path, for export and verification."""
    return {name: integer_layer(name, layer) for name, layer in quantized_layers(model).items()}


@torch.no_grad()
def taken_integers(model: nn.Module) -> dict[str, IntegerLayer]:
    """As integer_layers, for a model that is not used afterwards.

    Each layer's weight is released as soon as its integers exist, which saves memory.
    """
    integers = {}
    for name, layer in quantized_layers(model).items():
        integers[name] = integer_layer(name, layer)
        layer.weight.data = layer.weight.data.new_empty(0)
    return integers


def calibrate_ranges(model: nn.Module, batches: Iterable[PredictArguments]) -> None:
    """Set the range of every input from what the layers read while the model runs unquantized.

    Args:
        model: the quantized model.
        batches: inputs of the model.

    Raises:
        ModelError: as observed_ranges.
    """
    set_ranges(model, observed_ranges(model, batches))


def observed_ranges(model: nn.Module, batches: Iterable[PredictArguments]) -> dict[str, InputRange]:
    """What the layers of each input group read while the model runs unquantized, by the path of the group's leader.

    The first pass over the data finds the extremes of every input. Ranges of least squared error need a second pass,
    which fills a histogram between these extremes. Layers of one input group share a quantizer, so they are observed
    together.

    Args:
        model: the quantized model.
        batches: inputs of the model.

    Raises:
        ModelError: there is no data, or a layer's input is NaN, infinite, zero everywhere, or was never seen. The
            message names the layer.
    """
    layers = quantized_layers(model)
    leaders = {name: layer for name, layer in layers.items() if layer.plan.input_group == layer.plan.name}
    if not (samples := tuple(batches)):
        raise ModelError("calibration data: got no batch; allowed at least one")
    # a weight that other layers have too cannot be divided by the factors of one
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {layer.plan.input_group for layer in layers.values() if owners[id(layer.weight)] > 1}
    seen = {
        name: InputRange(name, channel_of(layer) if layer.plan.inputs.equalize and name not in tied else None)
        for name, layer in leaders.items()
    }
    _watch(model, layers, samples, {group: watched.watch_extremes for group, watched in seen.items()})
    for watched in seen.values():
        watched.check()
        if watched.channel is not None:
            watched.equalize()
    searched = {layer.plan.name for layer in leaders.values() if layer.plan.inputs.range != "min_max"}
    if searched:
        _watch(
            model,
            layers,
            samples,
            {group: watched.watch_histogram for group, watched in seen.items() if group in searched},
        )
    return seen


def set_ranges(model: nn.Module, seen: Mapping[str, InputRange]) -> None:
    """Set the range of every input from what `observed_ranges` saw, also in another copy of the model, and the factors
    of its channels where they are equalized.

    Widths and signs are those of this model's plan, so they may differ between copies.
    """
    layers = quantized_layers(model)
    before = {name: layer.input_quant.factors for name, layer in layers.items()}
    for name, layer in layers.items():
        if (factors := seen[layer.plan.input_group].factors) is not None:
            equalize_input(layer, factors, before[name])
        if layer.plan.input_group == layer.plan.name:
            _set_range(layer, seen[layer.plan.name])


def take_weights(model: nn.Module, other: nn.Module, less: Mapping[str, Tensor] | None = None) -> None:
    """Give the quantized layers the weights of another quantized copy, and find the ranges of these weights anew, at
    the model's own widths. Of layers that are named in `less`, that much is taken off first.
    """
    others = quantized_layers(other)
    for name, layer in quantized_layers(model).items():
        layer.weight.data.copy_(others[name].weight)
        if less is not None and name in less:
            layer.weight.data.sub_(less[name])
        estimate_weight_range(layer)


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Within the block, the quantized layers compute in floating point."""
    proxies = [proxy for layer in quantized_layers(model).values() for proxy in (layer.weight_quant, layer.input_quant)]
    before = [proxy.disable_quant for proxy in proxies]
    try:
        for proxy in proxies:
            proxy.disable_quant = True
        yield
    finally:
        for proxy, disabled in zip(proxies, before, strict=True):
            proxy.disable_quant = disabled


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Within the block, each quantized weight is computed once and reused, for sampling and for teachers.

    The weights must not be trained within the block.
    """
    proxies = [(layer, layer.weight_quant) for layer in quantized_layers(model).values()]
    with ExitStack() as stack:
        for layer, proxy in proxies:
            stack.callback(setattr, proxy, "frozen", proxy.frozen)
            proxy.frozen = quantized_weight(layer)
        yield


class CallEndedError(Exception):
    """Ends a call of a model within `run_frozen`, when a hook has seen all that it wants."""


def run_frozen(model: nn.Module, batches: Iterable[PredictArguments]) -> None:
    """Call the model with each batch, for the hooks that watch it; a hook may end a call by a CallEndedError."""
    with evaluating(model), frozen_weights(model):
        for batch in batches:
            with suppress(CallEndedError):
                predict(model, *batch)


def _watch(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    batches: Sequence[PredictArguments],
    watchers: dict[str, Callable[[Tensor], None]],
) -> None:
    """Run the batches through the unquantized model; each watcher sees what the layers of its group read."""
    watched = [
        (layer, watchers[layer.plan.input_group]) for layer in layers.values() if layer.plan.input_group in watchers
    ]
    with watched_inputs(watched), evaluating(model), unquantized(model):
        for batch in batches:
            predict(model, *batch)


def _set_range(layer: QuantizedLayer, seen: InputRange) -> None:
    """Set a layer's input range from its observations; `auto` makes it signed if a negative value was seen."""
    spec = layer.plan.inputs
    signed = seen.low < 0 if spec.signed == "auto" else spec.signed
    set_input_range(layer, *input_bounds(seen, spec.range, read_bits(layer)[1], signed, symmetric=spec.symmetric))
