"""The policies that ship for models that do not, each run whole on a small pipeline of its model's layout.

Not here: what each plans at full size (test_large_policies.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import POLICIES

from pqcad_qat.policy.variants import OV_BF16, PQ, PQCAD, VARIANTS

pytest.importorskip("transformers")

from conditional_models import saved
from rich.console import Console
from safetensors.torch import load_file
from text_pipelines import PIPELINES, T5_TOKENS

from pqcad_qat.commands.run import run
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy

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
    "calibration.refinement=1",
    "calibration.batch_size=4",
    "progressive.steps=2",
    "distillation.steps=2",
    "training.batch_size=2",
    "training.gradient_accumulation=2",
    "evaluation.images=4",
    "evaluation.batch_size=4",
    "export.latency_runs=1",
    "training.learning_rate=0.0001",
)
WITH_BASELINES = ("w8a8-flux", "w8a8-pixart", "w8a8-sd15", "w8a8-sd3", "w8a8-sdxl")
"""Policies whose baselines are made too, one of each layout; test_conditional_runs.py has those of labelled models."""

SMALLER = {"w8a8-flux": (f"conditions.tokens={T5_TOKENS}",)}


def digits(folder: Path) -> Path:
    """What pretrain-digits-classes.yaml leaves, smaller and not trained."""
    saved("class_unet", folder / "model", num_class_embeds=11)
    return folder / "model"


SOURCES = {**PIPELINES, "digits": digits}


def run_of(name: str, source: Path, path: Path, *more: str) -> Policy:
    policy = load_policy(POLICIES / f"{name}.yaml", [*SMALL, f"model.source={source}", *SMALLER.get(name, ()), *more])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)

        run(policy, path, "command", Console(quiet=True))
    return policy


def test_every_policy_for_a_model_that_does_not_ship_is_run() -> None:
    loaded = {path.stem: load_policy(path) for path in POLICIES.glob("*.yaml") if not path.stem.startswith("pretrain")}
    assert LAYOUTS.keys() == {
        name for name, policy in loaded.items() if not policy.model.source.startswith("embedded:")
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_goes_through_training_distillation_export_and_proof(name: str, tmp_path: Path) -> None:
    """As it is, and trained alone with activations computed again if they were not, or kept if they were: to the same
    weights.
    """
    source, whole, trained = (
        SOURCES[LAYOUTS[name]](tmp_path),
        tmp_path / "runs" / "whole",
        tmp_path / "runs" / "trained",
    )
    listed = load_policy(POLICIES / f"{name}.yaml").evaluation.variants
    chosen = [spec for spec in listed if name in WITH_BASELINES or VARIANTS[spec].weights_from != "baselines"]
    policy = run_of(name, source, whole, f"evaluation.variants=[{', '.join(chosen)}]")
    report = json.loads((whole / "report.json").read_text())
    assert (
        report["execution"]["executed_int8"] == report["execution"]["planned"] == report["parity"]["layers_exact"] > 10
    )
    assert {row["name"] for row in report["variants"]} >= {*policy.evaluation.variants} - {OV_BF16}
    other = str(not policy.training.activation_checkpointing).lower()
    run_of(name, source, trained, f"training.activation_checkpointing={other}", f"evaluation.variants=[{PQCAD}]")
    for stage in (PQ, PQCAD):
        one, two = (load_file(path / "models" / f"{stage}.safetensors") for path in (whole, trained))
        assert [key for key, value in one.items() if not value.equal(two[key])] == []
