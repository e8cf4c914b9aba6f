"""The method in every kind of sampler: each prediction, noise schedule, spacing and clipping, with one trained model.

A trained model is re-expressed exactly for each of them (reexpressed_model.py). There the shipped policy has to give a
student whose images, in half the steps, are as good as full precision's in all of them: a Frechet distance to the real
images within 10 %. Where no sampler exists, the run has to be refused with the reason.

Every cell is a whole run of minutes, so they are left to `tox -e method`: with 60 and 80 training steps students stay
11 and 17 % behind. Without it the models themselves are tested, and the cells that are refused.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reexpressed_model import equal_times, reexpressed
from rich.console import Console
from tiny_runs import POLICIES

from pqcad_qat.commands.run import run
from pqcad_qat.errors import ModelError
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import PQCAD, REFERENCE
from pqcad_qat.report.report_files import read_report
from pqcad_qat.sampling.ddim import split_prediction
from pqcad_qat.sampling.ddpm_schedule import ddpm_schedule

ALL = bool(os.environ.get("PQCAD_METHOD"))
"""Whether whole runs are made."""

WITHIN = 1.10
"""Largest Frechet distance of the student, as a multiple of full precision's in all steps."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squared-cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero-terminal": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    },
}
CLIPPING = ("clipped", "unclipped")

Cell = tuple[str, str, str, str]
"""Prediction, noise schedule, spacing and clipping."""

CELLS: tuple[Cell, ...] = tuple(product(PREDICTIONS, BETAS, SPACINGS, CLIPPING))


def without_a_sampler(cell: Cell) -> bool:
    """Whether the first step of the cell's sampler predicts noise where there is nothing but noise."""
    prediction, betas, spacing, _ = cell
    return prediction == "epsilon" and betas == "zero-terminal" and spacing != "leading"


def scheduler(cell: Cell) -> dict[str, Any]:
    """The cell's scheduler config in diffusers' names."""
    prediction, betas, spacing, clipping = cell
    return {
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": int(spacing == "leading"),
        "clip_sample": clipping == "clipped",
        **BETAS[betas],
    }


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", BETAS)
def test_a_reexpressed_model_says_the_same_of_the_picture(prediction: str, betas: str) -> None:
    own = reexpressed("embedded:digits", scheduler((prediction, betas, "trailing", "unclipped")))
    trained = load_model("embedded:digits")
    before, after = ddpm_schedule(trained.scheduler_config), ddpm_schedule(own.scheduler)
    x_t = torch.randn(2, *own.sample_shape, generator=torch.Generator().manual_seed(0))
    for t in (5, 400, 800):
        same = equal_times(before, after)[t]
        with torch.no_grad():
            expected = trained.denoiser(x_t, torch.tensor(same, dtype=torch.float32)).sample
            found = own.build()(x_t, torch.tensor([t, t]))
        signal = after.alpha_bar_at(t)
        pictures = [
            split_prediction(output, x_t, signal, kind)[0]
            for output, kind in ((expected, before.prediction_type), (found, after.prediction_type))
        ]
        torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
        assert float(np.interp(same, np.arange(1000), before.alpha_bar)) == pytest.approx(signal, rel=1e-2)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if without_a_sampler(cell)], ids="-".join)
def test_a_model_without_a_sampler_is_refused_with_the_reason(cell: Cell, tmp_path: Path) -> None:
    own = reexpressed("embedded:digits", scheduler(cell))
    with pytest.raises(ModelError, match="epsilon says nothing of the picture"):
        run(load_policy(POLICIES / "w4a8.yaml"), tmp_path / "run", "run", Console(quiet=True), model=own)


@pytest.mark.skipif(not ALL, reason="a whole run of minutes: `tox -e method` makes them")
@pytest.mark.parametrize("data", ["digits", "fashion-mnist"] if ALL else ["digits"])
@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if not without_a_sampler(cell)] if ALL else CELLS[:1], ids="-".join
)
def test_student_is_as_good_as_full_precision_in_all_steps(cell: Cell, data: str, tmp_path: Path) -> None:
    overrides = (
        f"name={data}",
        f"evaluation.features=embedded:{data}",
        "evaluation.images=1000",
        f"evaluation.variants=[{PQCAD}]",
        "training.samples_every=0",
    )
    policy = load_policy(POLICIES / "w4a8.yaml", overrides)
    own = reexpressed(f"embedded:{data}", scheduler(cell))
    run(policy, tmp_path / "run", "run", Console(quiet=True), model=own)
    distances = {row.name: row.fid_real for row in read_report(tmp_path / "run").variants}
    student, full = distances[PQCAD], distances[REFERENCE]
    assert student is not None
    assert full is not None
    assert student <= WITHIN * full, f"{student:.3f} in half the steps, {full:.3f} in all of them"
