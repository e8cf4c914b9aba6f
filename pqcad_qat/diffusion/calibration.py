"""Full-precision trajectories: recorded once by the model's own sampler, kept in safetensors, reused by name of their hash.

Not here: what they are used for (ranges, training targets, parity, paired fidelity). The set never holds quantized states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pqcad_qat.content_store import content_digest, kept
from pqcad_qat.diffusion.denoiser import DiffusionModel, predict
from pqcad_qat.diffusion.sampling import ddim_trajectory, initial_noise, noise_schedule, timesteps
from pqcad_qat.errors import ModelError


@dataclass(frozen=True)
class CalibrationRecipe:
    """Everything that decides a calibration set; its hash is the set's name.

    Attributes:
        model_digest: of the full-precision model.
        sampler: its name.
        steps: N, of the sampler whose states are kept.
        trajectories: K.
        seed: of their noise.
        refinement: full-precision steps made where the sampler makes one; above 1 the states are nearer to the model's own ODE.
    """

    model_digest: str
    sampler: str
    steps: int
    trajectories: int
    seed: int
    refinement: int = 1

    @property
    def digest(self) -> str:
        return content_digest(asdict(self))


@dataclass(frozen=True)
class CalibrationSet:
    """Trajectories of the full-precision model.

    Attributes:
        states: (K, N + 1, C, H, W) float32; states[:, i] is x_t at timesteps[i], states[:, N] the image x_0.
        predictions: (K, N, C, H, W) float32, the model's prediction at each state.
        timesteps: the N time steps, falling.
    """

    states: Tensor
    predictions: Tensor
    timesteps: tuple[int, ...]

    @property
    def images(self) -> Tensor:
        """(K, C, H, W): where the trajectories end."""
        return self.states[:, -1]

    def inputs(self, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` model inputs (x_t (B, C, H, W), t (B,)), spread evenly over trajectories and time steps."""
        total = self.predictions.shape[0] * len(self.timesteps)
        flat = torch.linspace(0, total - 1, min(count, total)).long()
        flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))]
        t = torch.tensor(self.timesteps)
        for part in torch.split(flat, batch_size):
            row, column = part // len(self.timesteps), part % len(self.timesteps)
            yield self.states[row, column], t[column]


def calibration_set(
    model: DiffusionModel, recipe: CalibrationRecipe, batch_size: int, cache: Path, advance: Callable[[int], None] = lambda _: None
) -> tuple[CalibrationSet, Path]:
    """The set of a recipe, and its folder: read from `cache`, or recorded and written there.

    `advance` is told of every denoiser call of a batch as it is made (number of trajectories moved one step).
    """

    def make(draft: Path) -> None:
        found = record(model, recipe, batch_size, advance)
        save_file({"states": found.states, "predictions": found.predictions}, draft / "trajectories.safetensors")
        (draft / "recipe.json").write_text(json.dumps({**asdict(recipe), "timesteps": found.timesteps}, indent=2) + "\n", encoding="utf-8")

    folder = kept(cache, asdict(recipe), make)
    return read_calibration(folder), folder


@torch.no_grad()
def record(
    model: DiffusionModel, recipe: CalibrationRecipe, batch_size: int, advance: Callable[[int], None] = lambda _: None
) -> CalibrationSet:
    """Run the sampler from seeded noise and keep the state and prediction at every one of the recipe's N time steps.

    Raises:
        ModelError: the model gives values that are not finite, or the refined sampler passes by one of the N time steps.
    """
    schedule = noise_schedule(model.scheduler_config)
    fine, visited = recipe.steps * recipe.refinement, timesteps(schedule, recipe.steps)
    missed = set(visited) - set(timesteps(schedule, fine))
    if missed:
        raise ModelError(
            f"calibration.refinement: got {recipe.refinement}: with {schedule.timestep_spacing} spacing {fine} steps do not visit "
            f"{len(missed)} of the sampler's {recipe.steps} time steps; allowed 1, or more with leading or trailing spacing"
        )
    states, predictions = [], []
    for first in range(0, recipe.trajectories, batch_size):
        count = min(batch_size, recipe.trajectories - first)
        x_t = torch.from_numpy(initial_noise(recipe.seed, first, count, model.sample_shape))
        walk, image = [], x_t
        for step in ddim_trajectory(_caller(model.denoiser), x_t, schedule, fine):
            if step.t in visited:
                walk.append(step)
            image = step.x_s
            advance(count)
        states.append(torch.stack([*(step.x_t for step in walk), image], dim=1))
        predictions.append(torch.stack([step.prediction for step in walk], dim=1))
    found = CalibrationSet(torch.cat(states), torch.cat(predictions), visited)
    if not bool(torch.isfinite(found.states).all()):
        raise ModelError(f"{model.source}: its full-precision trajectories hold values that are not finite")
    return found


def _caller(denoiser: nn.Module) -> Callable[[Tensor, int], Tensor]:
    return lambda x_t, t: predict(denoiser, x_t, t)


def read_calibration(folder: Path) -> CalibrationSet:
    """Read a set that `calibration_set` wrote.

    Raises:
        ModelError: the folder is incomplete or damaged.
    """
    try:
        tensors = load_file(folder / "trajectories.safetensors")
        steps = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["timesteps"]
        return CalibrationSet(tensors["states"], tensors["predictions"], tuple(steps))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: damaged calibration set: {error}; delete the folder and it is recorded anew") from error
