"""The section `targets` of a policy: what its owner wants of a run's figures, each target by a name.

Not here: what was measured beside them (report/targets.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from pqcad_qat.policy.sections import Fault, Section, without_nulls
from pqcad_qat.policy.variants import VariantName


class Metric(NamedTuple):
    """A figure that targets are about: its field in a report's rows, its words, its unit, and how two variants are
    compared by it.

    Figures that have no zero of their own, or may be negative, are subtracted; others are divided.
    """

    field: str
    words: str
    unit: str
    subtracted: bool


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "distance": Metric("fid_real", "Frechet distance to {against}", "", subtracted=False),
        "kid": Metric("kid_real", "KID to {against}", "", subtracted=True),
        "psnr": Metric("psnr_fp", "PSNR to full precision", "dB", subtracted=True),
        "ssim": Metric("ssim_fp", "SSIM to full precision", "", subtracted=True),
        "clip": Metric("clip_score", "CLIP score", "", subtracted=True),
        "ms": Metric("latency_ms_per_image", "milliseconds an image", "ms", subtracted=False),
        "bytes": Metric("size_bytes", "bytes", "bytes", subtracted=False),
        "packed_bytes": Metric("size_bytes", "bytes packed", "bytes", subtracted=False),
    }
)
"""Metrics by the names that a policy has for them. `packed_bytes` is of the first deployed folder in packed form, which
no row of a report has; its field is what it is compared with."""

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(METRICS)]
"""Names of METRICS."""


class TargetPolicy(Section):
    """A bound on a figure of a variant, or on its comparison with another variant's."""

    metric: MetricName = Field(
        description="distance (Frechet, to the reference), kid, psnr and ssim (to full precision), clip, ms (an "
        "image), bytes, or packed_bytes (of the first deployed folder)"
    )
    variant: VariantName = Field(description="variant whose figure it is")
    against: VariantName | None = Field(
        None,
        description="variant that it is compared with: by the difference of kid, psnr, ssim and clip, by the ratio of "
        "all others; null: the figure itself",
    )
    at_most: float | None = Field(None, description="largest value that holds")
    at_least: float | None = Field(None, description="smallest value that holds")

    def faults(self) -> Iterator[Fault]:
        if (self.at_most is None) == (self.at_least is None):
            got = "neither of at_most and at_least" if self.at_most is None else "at_most and at_least"
            yield Fault((("at_most",), ("at_least",)), got, "one of the two")


def _without_dropped(value: object) -> object:
    return without_nulls(value) if isinstance(value, Mapping) else value


Targets = Annotated[
    Mapping[str, TargetPolicy],
    BeforeValidator(_without_dropped, json_schema_input_type=dict[str, TargetPolicy | None]),
]
