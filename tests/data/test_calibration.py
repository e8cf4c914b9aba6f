"""Calibration sets: the trajectories against diffusers' own sampler, noise that does not depend on batching, reuse, and
damage.

Not here: the sampler's arithmetic (test_sampling.py).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from pqcad_qat.data.calibration import CalibrationRecipe, CalibrationSet, calibration_set, read_calibration, record
from pqcad_qat.errors import ModelError
from pqcad_qat.machine.content_store import LOCKS
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.sampling.trajectory import initial_noise, noise_schedule

STEPS, TRAJECTORIES = 5, 6


@pytest.fixture(scope="module")
def recipe(tiny_model: DiffusionModel) -> CalibrationRecipe:
    return CalibrationRecipe(tiny_model.digest, "ddim", STEPS, TRAJECTORIES, seed=7)


@pytest.fixture(scope="module")
def cache(tiny_model: DiffusionModel, recipe: CalibrationRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the recipe's set."""
    folder = tmp_path_factory.mktemp("calibration")
    calibration_set(tiny_model, recipe, TRAJECTORIES, folder)
    return folder


@pytest.fixture(scope="module")
def recorded(cache: Path, recipe: CalibrationRecipe) -> CalibrationSet:
    return read_calibration(cache / recipe.digest)


def test_the_trajectories_are_those_of_diffusers_own_ddim(tiny_model: DiffusionModel, recorded: CalibrationSet) -> None:
    scheduler = DDIMScheduler.from_config(tiny_model.scheduler_config)
    scheduler.set_timesteps(STEPS)
    assert recorded.timesteps == tuple(scheduler.timesteps.tolist())
    x_t = torch.from_numpy(initial_noise(7, 0, TRAJECTORIES, (1, 32, 32)))
    with torch.no_grad():
        for column, t in enumerate(scheduler.timesteps):
            torch.testing.assert_close(recorded.states[:, column], x_t, rtol=1e-4, atol=1e-5)
            prediction = tiny_model.denoiser(x_t, t).sample
            torch.testing.assert_close(recorded.predictions[:, column], prediction, rtol=1e-4, atol=1e-5)
            x_t = scheduler.step(prediction, t, x_t, eta=0.0).prev_sample
    torch.testing.assert_close(recorded.images, x_t, rtol=1e-4, atol=1e-4)


def test_the_set_has_the_shapes_it_promises(recorded: CalibrationSet) -> None:
    assert recorded.states.shape == (TRAJECTORIES, STEPS + 1, 1, 32, 32)
    assert recorded.predictions.shape == (TRAJECTORIES, STEPS, 1, 32, 32)
    assert recorded.states.dtype == recorded.predictions.dtype == torch.float32
    assert list(recorded.timesteps) == sorted(recorded.timesteps, reverse=True)


def test_every_prediction_is_the_models_at_its_state(tiny_model: DiffusionModel, recorded: CalibrationSet) -> None:
    with torch.no_grad():
        again = predict(tiny_model.denoiser, recorded.states[2, :-1], torch.tensor(recorded.timesteps))
    torch.testing.assert_close(again, recorded.predictions[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_noise_and_trajectories_do_not_depend_on_the_batch_size(
    tiny_model: DiffusionModel, recipe: CalibrationRecipe, recorded: CalibrationSet, batch_size: int
) -> None:
    found = record(tiny_model, recipe, batch_size)
    assert torch.equal(found.states[:, 0], recorded.states[:, 0])
    torch.testing.assert_close(found.states, recorded.states, rtol=1e-4, atol=1e-4)


def test_a_refined_set_holds_the_states_that_a_finer_sampler_visits(
    tiny_model: DiffusionModel, recipe: CalibrationRecipe
) -> None:
    refined = record(tiny_model, replace(recipe, refinement=2), TRAJECTORIES)
    finer = record(tiny_model, replace(recipe, steps=2 * STEPS), TRAJECTORIES)
    columns = [finer.timesteps.index(t) for t in refined.timesteps]
    assert refined.states.shape == (TRAJECTORIES, STEPS + 1, 1, 32, 32)
    assert torch.equal(refined.states[:, :-1], finer.states[:, columns])
    assert torch.equal(refined.predictions, finer.predictions[:, columns])
    assert torch.equal(refined.images, finer.images)


@pytest.mark.parametrize(
    ("spacing", "steps", "times"), [("linspace", 4, [999, 666, 333, 0]), ("leading", 3, [666, 333, 0])]
)
def test_steps_that_no_finer_sampler_visits_are_divided_all_the_same(
    tiny_model: DiffusionModel, recipe: CalibrationRecipe, spacing: str, steps: int, times: list[int]
) -> None:
    config = {**tiny_model.scheduler_config, "timestep_spacing": spacing}
    found = record(
        replace(tiny_model, scheduler_config=config), replace(recipe, steps=steps, refinement=2, trajectories=1), 1
    )
    assert list(found.timesteps) == times
    schedule, x_t = noise_schedule(config), found.states[:, 0]
    for t, s in ((times[0], times[0] - (times[0] - times[1]) // 2), (times[0] - (times[0] - times[1]) // 2, times[1])):
        x_t = schedule.step(predict(tiny_model.denoiser, x_t, t), x_t, t, s).detach()
    torch.testing.assert_close(x_t, found.states[:, 1], rtol=1e-5, atol=1e-5)


def test_recording_twice_gives_the_same_bits(
    tiny_model: DiffusionModel, recipe: CalibrationRecipe, recorded: CalibrationSet
) -> None:
    again = record(tiny_model, recipe, TRAJECTORIES)
    assert torch.equal(again.states, recorded.states)
    assert torch.equal(again.predictions, recorded.predictions)


def test_a_larger_set_begins_with_the_smaller_one_and_another_seed_is_other_noise(
    tiny_model: DiffusionModel, recipe: CalibrationRecipe, recorded: CalibrationSet
) -> None:
    fewer = record(tiny_model, replace(recipe, trajectories=2), 2)
    assert torch.equal(fewer.states[:, 0], recorded.states[:2, 0])
    other = record(tiny_model, replace(recipe, trajectories=2, seed=8), 2)
    assert not torch.isclose(other.states[:, 0], fewer.states[:, 0]).all()


def test_a_recorded_set_is_read_and_the_model_not_called_again(
    tiny_model: DiffusionModel, recipe: CalibrationRecipe, cache: Path, recorded: CalibrationSet
) -> None:
    calls: list[int] = []
    found, folder = calibration_set(tiny_model, recipe, TRAJECTORIES, cache, advance=calls.append)
    assert calls == []
    assert folder == cache / recipe.digest
    assert torch.equal(found.states, recorded.states)
    assert found.timesteps == recorded.timesteps


def test_progress_counts_every_trajectory_at_every_step(tiny_model: DiffusionModel, recipe: CalibrationRecipe) -> None:
    calls: list[int] = []
    record(tiny_model, recipe, 4, calls.append)
    assert Counter(calls) == {4: STEPS, 2: STEPS}


CHANGES = [{"steps": 4}, {"seed": 8}, {"trajectories": 5}, {"model_digest": "other"}, {"sampler": "other"}]


def test_an_unconditional_set_keeps_the_name_it_had_before_there_were_conditions() -> None:
    assert CalibrationRecipe("model", "ddim", 20, 128, 0, 2).digest == "31e2d3a119c03fe2"


@pytest.mark.parametrize("change", [*CHANGES, {"conditions": "set"}, {"guidance_scale": 2.0}])
def test_everything_that_decides_a_set_changes_its_name(
    recipe: CalibrationRecipe, change: dict[str, int | str]
) -> None:
    assert replace(recipe, **change).digest != recipe.digest


def test_the_folder_says_what_it_was_made_from(
    cache: Path, recipe: CalibrationRecipe, recorded: CalibrationSet
) -> None:
    written = json.loads((cache / recipe.digest / "recipe.json").read_text())
    assert (written["model_digest"], written["seed"], tuple(written["timesteps"])) == (
        recipe.model_digest,
        7,
        recorded.timesteps,
    )
    assert [path.name for path in cache.iterdir() if path.name != LOCKS] == [recipe.digest]  # no draft is left


@pytest.mark.parametrize("file", ["trajectories.safetensors", "recipe.json"])
@pytest.mark.parametrize("fault", ["truncated", "missing", "another"])
def test_a_damaged_set_is_an_error_that_says_what_to_do(
    cache: Path, recipe: CalibrationRecipe, tmp_path: Path, file: str, fault: str
) -> None:
    folder = Path(shutil.copytree(cache / recipe.digest, tmp_path / recipe.digest))
    victim = folder / file
    content = victim.read_bytes()
    if fault == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if fault == "truncated" else b"{}")
    with pytest.raises(ModelError, match=r"got a damaged calibration set.*delete the folder"):
        read_calibration(folder)


def test_a_set_that_another_run_is_recording_is_waited_for(
    tiny_model: DiffusionModel, recipe: CalibrationRecipe, tmp_path: Path
) -> None:
    small = replace(recipe, trajectories=1, steps=2)
    others: list[Future[tuple[CalibrationSet, Path]]] = []
    with ThreadPoolExecutor() as pool:

        def meanwhile(_moved: int) -> None:
            if not others:
                others.append(
                    pool.submit(
                        calibration_set,
                        tiny_model,
                        small,
                        1,
                        tmp_path,
                        advance=lambda _: pytest.fail("recorded twice"),
                    )
                )

        found, folder = calibration_set(tiny_model, small, 1, tmp_path, advance=meanwhile)
        other, same = others[0].result(60)
    assert folder == same
    assert torch.equal(found.states, other.states)
    assert [path.name for path in tmp_path.iterdir() if path.name != LOCKS] == [small.digest]


def test_a_model_that_gives_nan_is_refused_before_anything_is_written(
    tiny_model: DiffusionModel, recipe: CalibrationRecipe, tmp_path: Path
) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
            return (torch.full_like(x_t, float("nan")),)

    class Shaped(DiffusionModel):
        sample_shape = (1, 32, 32)  # type: ignore[assignment]

    model = Shaped(Broken(), tiny_model.scheduler_config, "broken", "")
    with pytest.raises(ModelError, match="broken: got full-precision trajectories with values that are not finite"):
        calibration_set(model, recipe, 2, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name != LOCKS] == []


def test_inputs_are_spread_evenly_over_trajectories_and_time_steps(recorded: CalibrationSet) -> None:
    parts = list(recorded.inputs(STEPS * TRAJECTORIES, 7))
    assert [len(x) for x, _, _ in parts] == [7, 7, 7, 7, 2]
    times = Counter(torch.cat([t for _, t, _ in parts]).tolist())
    assert times == dict.fromkeys(recorded.timesteps, TRAJECTORIES)


def test_inputs_are_states_of_the_set_beside_their_own_time_step(recorded: CalibrationSet) -> None:
    for x, t, _ in recorded.inputs(9, 4):
        for state, step in zip(x, t.tolist(), strict=True):
            column = recorded.timesteps.index(step)
            assert any(torch.equal(state, known) for known in recorded.states[:, column])


def test_more_inputs_than_there_are_gives_each_once(recorded: CalibrationSet) -> None:
    found = torch.cat([x for x, _, _ in recorded.inputs(10_000, 64)])
    assert len(found) == STEPS * TRAJECTORIES
    assert len({row.numpy().tobytes() for row in found}) == STEPS * TRAJECTORIES


def test_inputs_are_the_same_every_time(recorded: CalibrationSet) -> None:
    first, second = ([x for x, _, _ in recorded.inputs(8, 3)] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
