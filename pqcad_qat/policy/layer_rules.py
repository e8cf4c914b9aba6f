"""What the section quantization of a policy may say: rules by name, and the quantizers of weights and inputs.

Not here: the other sections (schema.py), and what the rules make of a model (quantization/plan.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pqcad_qat.errors import shortened
from pqcad_qat.policy.origins import rule_text
from pqcad_qat.policy.sections import Fault, Section, faults_of_names, without_nulls
from pqcad_qat.policy.value_types import Bits, Patterns, SizeLimit

INPUT, OUTPUT, TIME = ROLES = ("role:input", "role:output", "role:time")
"""Patterns that name layers by their role in the network (quantization/layer_roles.py)."""


class WeightQuantizer(Section):
    """How a layer's weights are quantized."""

    bits: Bits = Field(
        description="target width in bits; progressive quantization walks down to it; with quantization.quality or "
        "quantization.max_size, the narrowest width that a layer may get"
    )
    granularity: Literal["per_channel", "per_tensor"] = Field(
        "per_channel", description="one scale for each output channel, or one for the whole tensor"
    )
    symmetric: bool = Field(True, description="zero point fixed at 0")
    scale: Literal["statistics", "learned"] = Field(
        "statistics",
        description="statistics: computed from the weights at each training step; learned: a trained parameter",
    )
    range: Literal["min_max", "mse"] = Field(
        "mse",
        description="what the scale is computed from: min_max takes the extremes, mse the range of least squared error",
    )


class InputQuantizer(Section):
    """How a layer's input tensor is quantized, with one scale."""

    bits: Bits = Field(description="width in bits; every width executes in INT8 on a CPU")
    symmetric: bool = Field(True, description="zero point fixed at 0; false is closer for lopsided inputs")
    signed: bool | Literal["auto"] = Field(
        "auto", description="auto: unsigned if no calibrated value is negative; must be auto if symmetric is false"
    )
    scale: Literal["statistics", "learned"] = Field(
        "learned", description="statistics: kept as calibrated; learned: a trained parameter that starts there"
    )
    range: Literal["min_max", "mse"] = Field(
        "mse", description="statistic of the calibration set behind the scale: the extremes, or the least squared error"
    )
    equalize: bool = Field(
        False,
        description="multiply each channel by a power of two before the quantizer, and divide the weights that read it "
        "by the same, so that the ranges of channels differ less (as SmoothQuant, arXiv 2211.10438); it pays where "
        "inputs have no more bits than weights, and OpenVINO GenAI's adapters do not fit such layers",
    )

    def faults(self) -> Iterator[Fault]:
        if self.signed != "auto" and not self.symmetric:
            yield Fault((("signed",), ("symmetric",)), str(self.signed).lower(), "auto, as symmetric is false")


class LayerRule(Section):
    """What happens to the layers that one of the patterns matches; the first rule that matches a layer wins."""

    match: Patterns = Field(
        description="pattern or list of patterns: a glob on the module path, re:REGEX, type:CLASS, or a role: "
        "role:input (layers that read x_t directly), role:output (that make the prediction) or role:time (that read "
        "the time step, but neither x_t nor a condition)"
    )
    weights: WeightQuantizer | None = Field(None, description="weight quantizer; needed unless keep_float")
    inputs: InputQuantizer | None = Field(None, description="input quantizer; needed unless keep_float")
    keep_float: bool = Field(False, description="leave these layers in floating point on purpose")
    execution: Literal["int8", "float"] = Field(
        "int8", description="float: quantize these layers, but leave OpenVINO free to execute them in floating point"
    )

    def faults(self) -> Iterator[Fault]:
        for pattern in self.match:
            if pattern.startswith("role:") and pattern not in ROLES:
                yield Fault((("match",),), shortened(repr(pattern)), ", ".join(ROLES))
        for key, value in (("weights", self.weights), ("inputs", self.inputs)):
            if self.keep_float and value is not None:
                yield Fault(((key,), ("keep_float",)), "a quantizer", "none, as keep_float is true")
            if not self.keep_float and value is None:
                yield Fault(
                    ((key,), ("keep_float",)),
                    "nothing",
                    "a quantizer such as {bits: 8}, or keep_float: true for the rule",
                )


def numbered(rules: Iterable[Any]) -> dict[str, Any]:
    """Return the rules of a list, each named by its index."""
    return {str(index): rule for index, rule in enumerate(rules)}


def _named(value: object) -> object:
    """Return rules by name. A rule that is null is left out: so a policy drops a rule of the one that it extends."""
    if isinstance(value, Mapping):
        return without_nulls(value)
    return numbered(value) if isinstance(value, list | tuple) and value else value


Rules = Annotated[
    Mapping[str, LayerRule],
    Field(min_length=1),
    BeforeValidator(
        _named,
        json_schema_input_type=Annotated[tuple[LayerRule, ...], Field(min_length=1)] | dict[str, LayerRule | None],
    ),
]


class QuantizationPolicy(Section):
    """Which layers are quantized, and how."""

    split_shortcuts: bool = Field(
        True,
        description="split a convolution that reads a concatenated shortcut in two, each half with an input quantizer"
        " of its own",
    )
    layers: Rules = Field(
        description="rules by name, in order; null drops one of the policy below; a layer that none matches stays in "
        "floating point"
    )
    quality: float | None = Field(
        None,
        gt=0,
        le=90,
        description="mean PSNR in dB of images from held-out noise to full precision's own, after a short training: "
        "each layer gets the width of its ladder with which the packed weights are smallest; null: the rules decide",
    )
    max_size: SizeLimit | None = Field(
        None,
        description="largest size of the deployed weights, in megabytes of 10^6 bytes or as a share of float32: each "
        "layer gets the width of its ladder that serves best within it; null: the rules decide",
        examples=["2.5MB", "0.15x"],
    )
    attention: Literal["float", "int8"] = Field(
        "float",
        description="int8: compute attention's two products in INT8 in the deployed folder, in 8 bits over the "
        "extremes; training does not see it",
    )

    def __hash__(self) -> int:
        return hash((self.split_shortcuts, tuple(self.layers.items()), self.quality, self.max_size, self.attention))

    @property
    def measured_widths(self) -> bool:
        """Whether layers get their widths by measurement, and not from the rules alone."""
        return self.quality is not None or self.max_size is not None

    def faults(self) -> Iterator[Fault]:
        """Yield names that no key can spell, and patterns that two rules of different content share: the second rule
        could never apply to a layer. Quality and size are not given together.
        """
        if self.quality is not None and self.max_size is not None:
            yield Fault((("max_size",), ("quality",)), repr(self.max_size), "null, as quality is given")
        yield from faults_of_names("layers", self.layers, "rule")
        first: dict[str, str] = {}
        for name, rule in self.layers.items():
            for pattern in rule.match:
                before = first.setdefault(pattern, name)
                if self.layers[before].model_copy(update={"match": rule.match}) != rule:
                    yield Fault(
                        (("layers", name, "match"), ("layers", before)),
                        repr(pattern),
                        f"a pattern once; rule {rule_text(before)} has it already, with other contents",
                    )
