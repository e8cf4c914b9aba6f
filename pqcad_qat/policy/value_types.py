"""The types that values of several sections of a policy have: numbers within bounds, names, lists.

Not here: the sections (schema.py, layer_rules.py, pretraining.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict

from pqcad_qat.policy.variants import DeployedName, VariantName


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


Text = Annotated[str, Field(min_length=1)]


Count = Annotated[int, Field(ge=1)]


AutoCount = Literal["auto"] | Count


AutoRate = Literal["auto"] | Annotated[float, Field(gt=0, le=1)]


FloatSteps = Literal["auto"] | Annotated[int, Field(ge=0, le=1000)]


Side = Annotated[int, Field(ge=1, le=2048)]


Sides = Annotated[tuple[Side, ...], Strict(False), Field(min_length=2, max_length=2)]


Seed = Annotated[int, Field(ge=0, lt=2**32)]


Share = Annotated[float, Field(gt=0, le=1)]


Momentum = Annotated[float, Field(ge=0, lt=1)]


Bits = Annotated[int, Field(ge=2, le=8)]


SIZE_LIMIT = r"^(\d+(?:\.\d+)?|\.\d+) ?(x|MB)$"
"""Pattern of a size limit: a share of the float32 size as 0.15x, or megabytes as 2.5MB."""


SizeLimit = Annotated[str, Field(pattern=SIZE_LIMIT)]


OneOrMore = BeforeValidator(
    _one_or_more, json_schema_input_type=Text | Annotated[tuple[Text, ...], Field(min_length=1)]
)


Ladder = Annotated[tuple[Bits, ...], Strict(False), Field(min_length=1)]


Classes = Literal["all"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]


Patterns = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1), OneOrMore]


Variants = Annotated[tuple[VariantName, ...], Strict(False), Field(min_length=1)]


Deployed = Annotated[
    tuple[DeployedName, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(
        _one_or_more,
        json_schema_input_type=DeployedName | Annotated[tuple[DeployedName, ...], Field(min_length=1)],
    ),
]


Precision = Literal["fp32", "bf16", "fp16"]


Trainable = Literal["all", "low_rank", "scales"]


TrackerName = Literal["tensorboard", "wandb", "mlflow"]


Trackers = Annotated[tuple[TrackerName, ...], Strict(False)]
