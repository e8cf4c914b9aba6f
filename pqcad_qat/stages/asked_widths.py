"""What a policy asks of its layers' widths, before anything is measured: a quality, a size within reach, or nothing.

Not here: the measurement and the choice (chosen_widths.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from pqcad_qat.errors import PlanError
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import TRAINED, VARIANTS, stages_of
from pqcad_qat.quantization.mixed_precision import limit_in_bytes
from pqcad_qat.quantization.plan import LayerPlan
from pqcad_qat.quantization.plan_facts import expected_bytes
from pqcad_qat.stages.width_search import MEASURED

STEPS = 40
"""Training steps before each measurement: on the embedded digits more of them gain less than 3 dB (NOTES.md)."""


def widths_measured(policy: Policy) -> bool:
    """Whether a run gives layers their widths by measurement: the policy asks for it, and quantizes."""
    return policy.quantization.measured_widths and any(VARIANTS[name].bits is None for name in policy.variants)


def trains(policy: Policy) -> bool:
    """Whether a run of the policy trains; widths are then tried with a short training."""
    return not set(TRAINED).isdisjoint(stages_of(policy.variants))


def check_size(policy: Policy, split: nn.Module, plan: Sequence[LayerPlan]) -> None:
    """Check that the layers at their narrowest widths are within quantization.max_size.

    Raises:
        PlanError: they are not.
    """
    if policy.quantization.max_size is None:
        return
    packed, whole = policy.export.weights == "packed", expected_bytes(split, (), packed=False)
    limit, least = limit_in_bytes(policy.quantization.max_size, whole), expected_bytes(split, plan, packed)
    if limit < least:
        smaller = "" if packed else ", or export.weights: packed, in which narrow weights take less"
        raise PlanError(
            f"quantization.max_size: got {policy.quantization.max_size} ({limit:,} bytes); allowed at least "
            f"{least / 1e6:.2f}MB ({least / whole:.3f}x), which the narrowest widths of all layers take{smaller}"
        )


def measurement_notes(policy: Policy) -> Iterator[str]:
    """What a run will measure to give layers their widths, and what its bytes depend on."""
    if not widths_measured(policy):
        return
    key = "max_size" if policy.quantization.quality is None else "quality"
    # a search among widths, or one among float layers after the two ends of the first
    some = "one {}" if key == "max_size" else f"up to {MEASURED + 1} {{}}s"
    after = some.format("short training") + f" of {STEPS} steps" if trains(policy) else some.format("choice of widths")
    yield (
        f"quantization.{key}: this plan shows the narrowest widths; the run gives each layer a width of its ladder, "
        f"after it has measured each layer's error, and held-out images after {after}"
    )
    if policy.export.weights != "packed":
        yield (
            f"export.weights: {policy.export.weights} stores every width in a byte, so that quantization.{key} has no "
            "use for narrow ones; packed lets them take less"
        )
