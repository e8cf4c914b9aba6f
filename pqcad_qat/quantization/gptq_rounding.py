"""Post-training quantization of a whole model: its layers' weights are rounded by GPTQ, in the order of their calls.

A layer has to make up for errors on what it really reads, which layers before it give that are rounded too. So the
model runs in passes. Each rounds the next layers by what they read, once all before them are rounded, and ends at the
last of them. More passes take more time. With a single one, layers would be rounded for what no layer gives any more.

Not here: one layer's rounding (brevitas_gptq.py), rounding that is learned (learned_rounding.py), and the ranges of
inputs (conversion.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn

from pqcad_qat.models.denoiser import PredictArguments, predict
from pqcad_qat.models.watched_layers import watched_inputs
from pqcad_qat.quantization.brevitas_gptq import LayerRounding
from pqcad_qat.quantization.conversion import CallEndedError, quantized_layers, run_frozen
from pqcad_qat.quantization.layer_state import QuantizedLayer, read_bits, weight_quantizer_of
from pqcad_qat.quantization.plan import evaluating

LEAST_BITS = 3
"""Least width of weights that are not rounded each by itself. At 2 bits GPTQ's make up for so much that training, which
such a model needs, ends far behind (NOTES.md). With learned rounding it is not known.
"""

COLUMNS = 2
"""Number of a layer's columns, over all states, for each weight of an output; more of them bring no more."""

FEWEST = 4096
"""Least number of a layer's columns over all states, where an output has few weights."""

LARGEST = 2**31
"""Most bytes of the moments of one pass, which has fewer layers where theirs are larger."""


def rounded_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Layers that GPTQ or learned rounding rounds, by path: of LEAST_BITS or more, with a learned range of weights."""
    return {
        name: layer
        for name, layer in quantized_layers(model).items()
        if weight_quantizer_of(layer).learned and read_bits(layer)[0] >= LEAST_BITS
    }


def round_weights(
    model: nn.Module,
    batches: Sequence[PredictArguments],
    passes: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Round the weights of a calibrated model's `rounded_layers` onto their grids, at present widths and ranges.

    Args:
        model: the quantized model.
        batches: inputs of the model from the calibration set.
        passes: number of passes; there are more where the moments of a pass would take too much memory.
        advance: called with 1 after each layer.
    """
    layers, states = rounded_layers(model), sum(len(x_t) for x_t, *_ in batches)
    for names in _passes(_called(model, layers, batches[0]), layers, passes):
        roundings = [
            LayerRounding(layers[name], _columns_of_state(layers[name], states), seed)
            for seed, name in enumerate(names)
        ]
        with _watched(roundings):
            run_frozen(model, batches)
        while roundings:  # each gives up its memory when it is done
            roundings.pop(0).round()
            advance(1)


def _called(model: nn.Module, layers: Mapping[str, QuantizedLayer], batch: PredictArguments) -> list[str]:
    """Names of the layers in the order of their first calls."""
    called: dict[str, None] = {}

    def note(name: str, _: Tensor) -> None:
        called.setdefault(name)

    with evaluating(model), watched_inputs([(layer, partial(note, name)) for name, layer in layers.items()]):
        predict(model, *batch)
    return list(called)


def _passes(names: Sequence[str], layers: Mapping[str, QuantizedLayer], passes: int) -> Iterator[list[str]]:
    """Names of the layers of each pass: equally many, or fewer where their moments are large."""
    most = -(-len(names) // passes)
    members: list[str] = []
    taken = 0
    for name in names:
        size = _moment_bytes(layers[name])
        if members and (len(members) == most or taken + size > LARGEST):
            yield members
            members, taken = [], 0
        members, taken = [*members, name], taken + size
    if members:
        yield members


def _moment_bytes(layer: QuantizedLayer) -> int:
    groups: int = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return 4 * groups * _weights_of_output(layer) ** 2


def _columns_of_state(layer: QuantizedLayer, states: int) -> int:
    return -(-max(FEWEST, COLUMNS * _weights_of_output(layer)) // states)


def _weights_of_output(layer: QuantizedLayer) -> int:
    return int(layer.weight[0].numel())


def _watched(roundings: Sequence[LayerRounding]) -> AbstractContextManager[None]:
    """Watch what the layers read; a call of the model ends when the last of them has been called."""

    def see(rounding: LayerRounding, x: Tensor) -> None:
        rounding.watch(x)
        if rounding is roundings[-1]:
            raise CallEndedError

    return watched_inputs([(rounding.layer, partial(see, rounding)) for rounding in roundings])
