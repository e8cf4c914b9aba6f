"""The policies that ship for models that do not, each run whole on a small pipeline of its model's layout: once in a
process, for all tests that look at what it leaves.

Not here: any test. Needs transformers.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conditional_models import saved
from rich.console import Console
from text_pipelines import PIPELINES, T5_TOKENS
from tiny_runs import POLICIES, with_one_setting_of_nncf, without_page, without_trials

from pqcad_qat.commands.run import run
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import ConditionsPolicy, Policy
from pqcad_qat.policy.variants import NNCF_INT8, VARIANTS
from pqcad_qat.stages.run_folder import EMBEDDINGS

LAYOUTS = {
    "w4a8-digits-classes": "digits",
    "w4a8-dit": "dit",
    "w4a8-sd15": "stable-diffusion",
    "w8a8-dit-xl-2": "dit",
    "w8a8-flux": "flux",
    "w8a8-pixart": "pixart",
    "w8a8-sd15": "stable-diffusion",
    "w8a8-sd3": "stable-diffusion-3",
    "w8a8-sdxl": "stable-diffusion-xl",
}
"""Policy -> a pipeline of its model's layout."""

SMALL = (
    "sampler.steps=4",
    "distillation.student_steps=2",
    "calibration.trajectories=4",
    "calibration.batch_size=4",
    "post_training.passes=1",
    "progressive.steps=2",
    "distillation.steps=2",
    "training.batch_size=2",
    "training.gradient_accumulation=2",
    "evaluation.images=4",
    "evaluation.batch_size=4",
    "export.latency_runs=1",
    "training.learning_rate=0.0001",
)
WITH_BASELINES = ("w4a8-dit", "w8a8-flux", "w8a8-pixart", "w8a8-sd15", "w8a8-sd3", "w8a8-sdxl")
"""Policies whose baselines are made too, one of each layout of a model that makes latents."""

WITHOUT_PAGE = ("w8a8-dit-xl-2", "w8a8-flux", "w8a8-pixart", "w8a8-sdxl")
"""Policies whose reports get no page: those of others have the same rows and notes."""

GUIDANCE = 2.5
"""Guidance that Flux is given as an input; not the one that is taken where a policy says nothing."""

SMALLER = {
    "w4a8-dit": ("sampler.guidance_scale=3.0", "post_training.rounding=learned", "post_training.steps=2"),
    "w8a8-flux": (f"conditions.tokens={T5_TOKENS}", f"conditions.guidance={GUIDANCE}"),
    "w8a8-sd15": ("sampler.guidance_scale=3.0", "distillation.guidance=keep", "quantization.attention=int8"),
    "w8a8-sd3": (f"conditions.tokens={T5_TOKENS}",),
}
"""What else makes a run small or sets it apart: few tokens where T5 would read hundreds (PixArt keeps its own),
guidance of a DiT and learned rounding, of which its policy says nothing, and a student of Stable Diffusion that keeps
guidance and computes attention in INT8, beside one that does neither.
"""


@dataclass(frozen=True)
class ShippedRun:
    """A run that was made once, for tests that must not change it; others may be made beside it.

    Attributes:
        name: of the policy that ships.
        source: folder of the pipeline.
        path: folder of the run.
        policy: policy of the run.
    """

    name: str
    source: Path
    path: Path
    policy: Policy

    @property
    def conditions(self) -> ConditionsPolicy:
        """The embeddings of the run's prompts, which it keeps; those of its policy where there are no prompts."""
        if self.policy.conditions.prompts is None:
            return self.policy.conditions
        return ConditionsPolicy(embeddings=str(self.path / EMBEDDINGS))

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "report.json").read_text())
        return found


def digits(folder: Path) -> Path:
    """What pretrain-digits-classes.yaml leaves, smaller and not trained."""
    saved("class_unet", folder / "model", num_class_embeds=11)
    return folder / "model"


def run_of(name: str, source: Path, path: Path, *more: str) -> Policy:
    """Run the policy, made small, on the pipeline in `source`; return what was run. Baselines are tried out where the
    policy has a row of NNCF.
    """
    policy = load_policy(POLICIES / f"{name}.yaml", [*SMALL, f"model.source={source}", *SMALLER.get(name, ()), *more])
    torch.set_num_threads(1)
    baselines = with_one_setting_of_nncf() if NNCF_INT8 in policy.variants else without_trials()
    page = without_page() if name in WITHOUT_PAGE else nullcontext()
    with baselines, page, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
        run(policy, path, "command", Console(quiet=True))
    return policy


_MADE: dict[str, ShippedRun] = {}


def shipped_run(name: str, factory: pytest.TempPathFactory) -> ShippedRun:
    """Run of the policy of that name with all of its variants, made once for all tests."""
    if name not in _MADE:
        folder = factory.mktemp(name)
        source = {**PIPELINES, "digits": digits}[LAYOUTS[name]](folder)
        listed = load_policy(POLICIES / f"{name}.yaml").variants
        chosen = [spec for spec in listed if name in WITH_BASELINES or VARIANTS[spec].weights_from != "baselines"]
        path = folder / "runs" / "whole"
        policy = run_of(name, source, path, f"evaluation.variants=[{', '.join(chosen)}]")
        _MADE[name] = ShippedRun(name, source, path, policy)
    return _MADE[name]
