"""CLIP scores of every variant's images, each of which was made for a prompt.

Not here: the score itself (quality/clip_score.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from pqcad_qat.machine.progress import working
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quality.clip_score import clip_scorer
from pqcad_qat.quality.fidelity import FidelityFigures
from pqcad_qat.stages.prepared import Prepared


def with_clip_scores(
    figures: Mapping[str, FidelityFigures],
    pictures: Callable[[str], Tensor],
    policy: Policy,
    prepared: Prepared,
    *,
    console: Console,
) -> dict[str, FidelityFigures]:
    """Add each variant's CLIP score to its figures; picture k of every variant was made for the same prompt.

    Args:
        figures: variant -> its figures.
        pictures: returns a variant's uint8 pictures (N, C, H, W), in the order in which they were sampled.
        policy: the run's policy, which names a CLIP model.
        prepared: the run's model, with its prompts.
        console: shows what is going on.

    Raises:
        ModelError: a file of the CLIP model is missing or damaged.
    """
    section, scored = policy.evaluation, {}
    assert section.clip is not None
    prompts = [prepared.prompts[row] for row in prepared.conditions.choice(section.seed, 0, section.images)]
    with working(console, "evaluation: CLIP scores") as tell:
        score_of = clip_scorer(Path(section.clip), prompts)
        for name, figure in figures.items():
            tell(f"evaluation: CLIP score of {name}")
            score = score_of(pictures(name))
            scored[name] = replace(figure, clip_score=score.value, clip_score_error=score.error)
    return scored
