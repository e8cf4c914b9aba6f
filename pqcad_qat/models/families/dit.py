"""DiTTransformer2DModel, a transformer of patches with class labels as its condition (Peebles and Xie 2023).

Not here: the rules that all transformers of patches share (config_faults.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from pqcad_qat.models.families.config_faults import allowed, among, patched
from pqcad_qat.models.families.family import ConditionInput, Config, Family, Pipeline


def _conditions(config: Config) -> tuple[ConditionInput, ...]:
    classes = config["num_embeds_ada_norm"] + 1  # the last row of its table stands for no class
    return (ConditionInput("class_labels", (), "int64", classes),)


def _faults(config: Config) -> Iterator[str]:
    yield from among(config, "norm_type", ("ada_norm_zero",))
    if config["num_embeds_ada_norm"] is None:
        yield allowed("num_embeds_ada_norm", None, "the number of classes")
    yield from patched(config)


FAMILY = Family(
    name="DiTTransformer2DModel",
    part="transformer",
    parameters=("hidden_states", "timestep", "class_labels", "cross_attention_kwargs", "return_dict"),
    conditions=_conditions,
    faults=_faults,
    former="ada_norm_zero",
    pipelines=(Pipeline("DiTPipeline"),),
    null_class=lambda config: int(config["num_embeds_ada_norm"]),
)
