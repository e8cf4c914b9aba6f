"""What is deployed is the sampler that the student was made for: diffusers opens it from the folder, and its pictures
are ours.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from rich.console import Console
from tiny_runs import POLICIES, tiny_overrides, without_page
from torch import Tensor

from pqcad_qat.commands import run as pipeline
from pqcad_qat.models.denoiser import predict
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import FP32, FP32_HALF, PQCAD, PQCAD_OPENVINO
from pqcad_qat.sampling.schedulers import DDIM_KEYS, KIN
from pqcad_qat.sampling.trajectory import NoiseSchedule, noise_schedule, trajectory, written_out
from pqcad_qat.serving.runtime import OVUNet2DModel

SIZE, STEPS = 16, 3


def pixels() -> UNet2DModel:
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(
        sample_size=SIZE, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, **blocks
    ).eval()


def pictures_of_diffusers(loaded: Any) -> np.ndarray:
    loaded.set_progress_bar_config(disable=True)
    images: np.ndarray = loaded(
        batch_size=2, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    return images


def assert_same_pictures(theirs: np.ndarray, ours: np.ndarray) -> None:
    """Steps that differ in the last bit of float32 can round a quantized value to its neighbour, in a few pixels."""
    assert np.abs(theirs - ours).mean() < 1e-3
    assert np.abs(theirs - ours).max() < 0.05


def our_pictures(denoiser: Any, schedule: NoiseSchedule) -> np.ndarray:
    """From the noise that diffusers' pipelines draw."""
    noise = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def follow(x_t: Tensor, t: float) -> Tensor:
        return (
            denoiser(x_t.float(), t).sample
            if isinstance(denoiser, OVUNet2DModel)
            else predict(denoiser, x_t.float(), t)
        )

    with torch.no_grad():
        *_, last = trajectory(follow, noise, schedule, STEPS)
    found: np.ndarray = (last.x_s / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return found


@pytest.mark.parametrize("spacing", [None, "leading", "trailing"])
@pytest.mark.parametrize("name", KIN)
def test_a_student_of_every_class_samples_as_the_ddim_that_is_written_for_it(name: str, spacing: str | None) -> None:
    source: Any = getattr(diffusers, name)(
        **({} if spacing is None or name == "DPMSolverSinglestepScheduler" else {"timestep_spacing": spacing})
    )
    config = {"_class_name": name, **json.loads(source.to_json_string())}
    student = noise_schedule(config).student(3 * STEPS, STEPS)
    written = json.loads(json.dumps(written_out(config, student), allow_nan=False))
    assert written["_class_name"] == "DDIMScheduler"
    assert written.keys() >= DDIM_KEYS.keys()
    unet = pixels()
    theirs = pictures_of_diffusers(DDIMPipeline(unet=unet, scheduler=DDIMScheduler.from_config(written)))
    np.testing.assert_allclose(theirs, our_pictures(unet, student), atol=5e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("DDPMScheduler", {"clip_sample": True, "variance_type": "fixed_large"}),
    ],
)
def test_a_run_deploys_it_and_diffusers_pictures_are_ours(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    scheduler = getattr(diffusers, name)(**keys)
    diffusers.DDPMPipeline(unet=pixels(), scheduler=scheduler).save_pretrained(tmp_path / "model")
    budget = (
        "progressive.steps=2",
        "distillation.steps=2",
        "training.samples_every=2",
        "evaluation.features=none",
        "evaluation.images=2",
    )
    steps = (
        f"sampler.steps={2 * STEPS}",
        f"distillation.student_steps={STEPS}",
        f"evaluation.variants=[{FP32},{FP32_HALF},{PQCAD},{PQCAD_OPENVINO}]",
    )
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tmp_path / "model", *budget, *steps))
    with without_page():
        pipeline.run(policy, tmp_path / "run", "python -m pqcad_qat run", Console(file=io.StringIO()))
    for folder in (tmp_path / "run" / "openvino", tmp_path / "run" / "student"):
        index, config = (
            json.loads((folder / name).read_text()) for name in ("model_index.json", "scheduler/scheduler_config.json")
        )
        assert index["scheduler"][1] == config["_class_name"] == "DDIMScheduler"
        assert index["_class_name"] == "DDIMPipeline"
        assert config.keys() >= {*DDIM_KEYS, "num_inference_steps"}
        assert config["clip_sample"] == (name == "DDPMScheduler")
        assert config["steps_offset"] == keys.get("steps_offset", 0) + 1000 // (2 * STEPS)
    deployed = DiffusionPipeline.from_pretrained(tmp_path / "run" / "openvino")
    assert isinstance(deployed.unet, OVUNet2DModel)
    schedule = noise_schedule(json.loads((tmp_path / "run/openvino/scheduler/scheduler_config.json").read_text()))
    assert_same_pictures(pictures_of_diffusers(deployed), our_pictures(deployed.unet, schedule))
    student = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student", use_safetensors=True)
    assert_same_pictures(pictures_of_diffusers(student), our_pictures(student.unet, schedule))
