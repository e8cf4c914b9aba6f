"""Sensitivity of the model's output to each layer: the error when that layer alone is quantized, at every width.

Not here: the choice of widths from these errors (mixed_precision.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pqcad_qat.models.denoiser import PredictArguments, predict
from pqcad_qat.quantization.conversion import quantized_layers, unquantized
from pqcad_qat.quantization.layer_state import QuantizedLayer, set_weight_bits
from pqcad_qat.quantization.plan import evaluating


@dataclass(frozen=True)
class LayerSensitivity:
    """Relative squared errors of the model's output, mean ||f_q - f||^2 / mean ||f||^2, with one part quantized.

    Attributes:
        name: path of the layer.
        inputs: error with only its input quantized, at the plan's width; layers that read the same tensor share its
            error evenly.
        weights: error with only its weights quantized, by width.
    """

    name: str
    inputs: float
    weights: Mapping[int, float]

    def error(self, bits: int) -> float:
        """Estimated error with the layer's input and its weights, at this width, quantized."""
        return self.inputs + self.weights[bits]


def layer_sensitivities(
    model: nn.Module,
    widths: Sequence[int],
    batches: Sequence[PredictArguments],
    advance: Callable[[], None] = lambda: None,
) -> tuple[LayerSensitivity, ...]:
    """Measure every quantized layer of a calibrated model; afterwards the weights have the last of the widths.

    Args:
        model: quantized model; it computes in floating point except for what is being measured.
        widths: weight widths to measure; at each the range is found anew by the plan's method.
        batches: inputs of the model from the calibration set.
        advance: function called after every measurement: one per layer and width, and one per input tensor.
    """
    layers = quantized_layers(model)
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer.plan.input_group, []).append(name)
    with evaluating(model), unquantized(model):  # every quantizer is off, and `measured` turns on one at a time
        reference = [predict(model, *batch) for batch in batches]

        def measured(proxy: Any) -> float:
            with _enabled(proxy):
                error = relative_error(model, reference, batches)
            advance()
            return error

        inputs = {group: measured(layers[group].input_quant) / len(members) for group, members in groups.items()}
        return tuple(
            LayerSensitivity(name, inputs[layer.plan.input_group], dict(_by_width(layer, widths, measured)))
            for name, layer in layers.items()
        )


def _by_width(
    layer: QuantizedLayer, widths: Sequence[int], measured: Callable[[Any], float]
) -> Iterator[tuple[int, float]]:
    """(width, error with only the layer's weights quantized) for every width."""
    for bits in widths:
        set_weight_bits(layer, bits)
        yield bits, measured(layer.weight_quant)


@contextmanager
def _enabled(proxy: Any) -> Iterator[None]:
    """Within the block, this quantizer is on."""
    proxy.disable_quant = False
    try:
        yield
    finally:
        proxy.disable_quant = True


def output_error(model: nn.Module, bits: Mapping[str, int], batches: Sequence[PredictArguments]) -> float:
    """The same error with every layer quantized at once, with weights of these widths.

    The sum over the layers' sensitivities estimates it.
    """
    for name, layer in quantized_layers(model).items():
        set_weight_bits(layer, bits[name])
    with evaluating(model):
        with unquantized(model):
            reference = [predict(model, *batch) for batch in batches]
        return relative_error(model, reference, batches)


def relative_error(model: nn.Module, reference: Sequence[Tensor], batches: Sequence[PredictArguments]) -> float:
    """Mean squared distance of the predictions from reference ones, over the mean square of the latter."""
    distance = sum(
        float((predict(model, *batch) - known).square().sum()) for batch, known in zip(batches, reference, strict=True)
    )
    return distance / sum(float(known.square().sum()) for known in reference)
