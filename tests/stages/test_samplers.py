"""Whatever samples: images from the same noise in every kind of folder, any batch size, and folders that hold none.

Not here: the images' worth (test_fidelity.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny_runs import FinishedRun

from pqcad_qat.data.images import to_uint8
from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import DiffusionModel
from pqcad_qat.policy.variants import FP32
from pqcad_qat.report.grid import save_grid
from pqcad_qat.sampling.trajectory import initial_noise, noise_schedule
from pqcad_qat.stages.samplers import DEFAULT_STEPS, Sampler, open_folder, pytorch_variant, sample_images


@pytest.fixture
def variant(tiny_model: DiffusionModel) -> Sampler:
    return pytorch_variant(
        FP32, tiny_model.denoiser, noise_schedule(tiny_model.scheduler_config), 3, sample_shape=tiny_model.sample_shape
    )


def test_images_are_those_of_diffusers_own_sampler(variant: Sampler, tiny_model: DiffusionModel) -> None:
    scheduler = DDIMScheduler.from_config(tiny_model.scheduler_config)
    scheduler.set_timesteps(3)
    x_t = torch.from_numpy(initial_noise(5, 0, 4, (1, 32, 32)))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_t = scheduler.step(tiny_model.denoiser(x_t, t).sample, t, x_t).prev_sample
    wanted = to_uint8(x_t)
    found = sample_images(variant, 4, 5, 4)
    assert (found.dtype, found.shape) == (torch.uint8, (4, 1, 32, 32))
    assert (found.int() - wanted.int()).abs().max() <= 1


def test_image_number_k_does_not_depend_on_how_many_are_made_or_in_which_batches(variant: Sampler) -> None:
    whole = sample_images(variant, 5, 0, 5)
    for batch_size in (1, 2):
        assert (sample_images(variant, 5, 0, batch_size).int() - whole.int()).abs().max() <= 1
    assert (sample_images(variant, 2, 0, 8).int() - whole[:2].int()).abs().max() <= 1


def test_sampling_twice_gives_the_same_images_and_another_seed_others(variant: Sampler) -> None:
    assert torch.equal(sample_images(variant, 2, 0, 2), sample_images(variant, 2, 0, 2))
    assert not torch.equal(sample_images(variant, 2, 0, 2), sample_images(variant, 2, 1, 2))


def test_progress_counts_images_times_steps(variant: Sampler) -> None:
    moved: list[int] = []
    sample_images(variant, 5, 0, 2, advance=moved.append)
    assert (sum(moved), len(moved)) == (15, 9)


def test_sampling_leaves_the_weights_as_they_were(variant: Sampler, tiny_model: DiffusionModel) -> None:
    before = {name: value.clone() for name, value in tiny_model.denoiser.state_dict().items()}
    sample_images(variant, 1, 0, 1)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.denoiser.state_dict().items())


def test_every_kind_of_folder_is_recognised_with_its_own_steps(tiny_run: FinishedRun, tiny_folder: Path) -> None:
    found = {
        source: open_folder(str(folder))
        for source, folder in {
            "full": tiny_folder,
            "student": tiny_run.path / "student",
            "deployed": tiny_run.path / "openvino",
            "run": tiny_run.path,
        }.items()
    }
    kinds = {source: (variant.runtime, variant.steps) for source, variant in found.items()}
    student = tiny_run.policy.distillation.student_steps
    assert kinds == {
        "full": ("pytorch", DEFAULT_STEPS),
        "student": ("pytorch", student),
        "deployed": ("openvino", student),
        "run": ("openvino", student),
    }
    assert {variant.sample_shape for variant in found.values()} == {(1, 32, 32)}


def test_steps_that_are_asked_for_win(tiny_run: FinishedRun, tiny_folder: Path) -> None:
    for folder in (tiny_folder, tiny_run.path / "student", tiny_run.path):
        assert open_folder(str(folder), 4).steps == 4


def test_the_student_and_its_deployed_folder_make_nearly_the_same_images(tiny_run: FinishedRun) -> None:
    student = sample_images(open_folder(str(tiny_run.path / "student")), 4, 0, 4)
    deployed = sample_images(open_folder(str(tiny_run.path / "openvino")), 4, 0, 4)
    error = (student.float() - deployed.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 30  # dB; BF16 between INT8 layers


def test_a_folder_with_none_of_them_is_refused_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"got a folder with none of manifest\.json.*allowed a deployed OpenVINO folder"
    ):
        open_folder(str(tmp_path))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"")
    with pytest.raises(ModelError, match=r"grid\.png"):
        open_folder(str(tmp_path / "grid.png"))


def test_more_steps_than_the_model_was_trained_with_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="sampling steps: got 1001; allowed 1 to 1000"):
        sample_images(open_folder(str(tiny_folder), 1001), 1, 0, 1)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (5, 2, 3), (9, 3, 3)])
def test_a_grid_is_nearly_square_with_white_between_and_pixels_enlarged(
    tmp_path: Path, count: int, rows: int, columns: int
) -> None:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 1, 32, 32)
    save_grid(images, tmp_path / "deep" / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert grid.shape == (3 * (33 * rows - 1), 3 * (33 * columns - 1))
    for number in range(count):
        row, column = divmod(number, columns)
        assert (grid[99 * row : 99 * row + 96, 99 * column : 99 * column + 96] == number).all()
    assert set(np.unique(grid)) <= {*range(count), 255}


def test_a_grid_of_colour_images_is_in_colour(tmp_path: Path) -> None:
    images = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 128, 128)
    save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (128, 257, 3)
    assert grid[0, 0].tolist() == [10, 20, 30]
