"""The opening of a folder for `sample` and `evaluate`, with the conditions and the guidance from the command line.

Not here: recognizing what a folder holds (stages/samplers.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import ConditionsPolicy, Policy
from pqcad_qat.stages.open_run import POLICY
from pqcad_qat.stages.run_folder import EMBEDDINGS
from pqcad_qat.stages.samplers import Sampler, open_folder


def opened_folder(folder: str, steps: int | None, conditions: str | None, guidance: float | None) -> Sampler:
    """Open a folder as a sampler.

    Args:
        folder: a run, a deployed folder, a quantized student, or a full-precision diffusers folder.
        steps: number of sampling steps; by default the number that the folder was made for.
        conditions: "all", class labels such as [0,3], or a safetensors file; by default those of a run's policy.
        guidance: scale of classifier-free guidance; by default the one that the folder was made for.

    Raises:
        ModelError, PolicyError: as for `stages.samplers.open_folder`.
    """
    section = None if (policy := policy_of(folder)) is None else policy.conditions
    if (embeddings := Path(folder) / EMBEDDINGS).is_file():
        section = ConditionsPolicy(embeddings=str(embeddings))
    if conditions is not None and re.fullmatch(r"\[[\d, ]+\]", conditions):
        section = ConditionsPolicy(classes=tuple(int(label) for label in re.findall(r"\d+", conditions)))
    elif conditions is not None:
        section = ConditionsPolicy() if conditions == "all" else ConditionsPolicy(embeddings=conditions)
    return open_folder(folder, steps, section, guidance)


def policy_of(folder: str) -> Policy | None:
    """Policy of a run's folder; None for any other folder."""
    return load_policy(policy) if (policy := Path(folder) / POLICY).is_file() else None
