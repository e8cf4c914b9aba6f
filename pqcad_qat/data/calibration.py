"""Calibration sets: trajectories of the full-precision model, recorded by its own sampler and stored as safetensors.

A set is stored under a hash of all settings that decide it, and reused wherever these are the same. It never holds
states of a quantized model.

Not here: its uses, which are quantizer ranges (quantization/conversion.py), training data and distillation targets
(training/), and the proof of a deployed model (export/).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.accelerators import on_accelerator
from pqcad_qat.machine.content_store import content_digest, parts_folder, shared_folder
from pqcad_qat.machine.files import write_file
from pqcad_qat.machine.processes import is_first
from pqcad_qat.machine.tensor_files import gathered, save_tensors
from pqcad_qat.models.conditions import CONDITION, ConditionSet
from pqcad_qat.models.denoiser import Condition, DenoiserInput, DiffusionModel, predict
from pqcad_qat.models.guidance import guided_call
from pqcad_qat.models.prompts import UNCONDITIONAL
from pqcad_qat.sampling.ddpm_schedule import Walk
from pqcad_qat.sampling.trajectory import NoiseSchedule, along, initial_noise, noise_schedule

TRAJECTORIES = "trajectories.safetensors"
"""Name of the file that holds a set's tensors."""


@dataclass(frozen=True)
class CalibrationRecipe:
    """All settings that decide a calibration set; their hash is the set's name.

    Attributes:
        model_digest: digest of the full-precision model.
        sampler: name of the sampler.
        steps: number N of sampling steps whose states are kept.
        trajectories: number K of trajectories.
        seed: seed of their noise and of their choice of conditions.
        refinement: number of full-precision steps for each sampling step. With more than 1, the states are nearer to
            the solution of the model's ODE.
        conditions: digest of the conditions that trajectories choose from; None for an unconditional model.
        guidance_scale: scale of classifier-free guidance; 1 for none.
        also: sampling steps of the students, whose states are kept as well where they visit other timesteps.
    """

    model_digest: str
    sampler: str
    steps: int
    trajectories: int
    seed: int
    refinement: int = 1
    conditions: str | None = None
    guidance_scale: float = 1.0
    also: tuple[int, ...] = ()

    @property
    def decides(self) -> dict[str, Any]:
        """The settings that are hashed, without those that the model does not use."""
        absent = {"conditions": None, "guidance_scale": 1.0, "also": ()}
        return {key: value for key, value in asdict(self).items() if key not in absent or value != absent[key]}

    @property
    def digest(self) -> str:
        """Hash that names the set."""
        return content_digest(self.decides)


@dataclass(frozen=True)
class CalibrationSet:
    """Trajectories of the full-precision model.

    Attributes:
        states: (K, N + 1, C, H, W) float32; states[:, i] is x_t at timesteps[i], and states[:, N] is the image x_0.
        predictions: (K, N, C, H, W) float32, the model's prediction at each state under its trajectory's condition.
        timesteps: the N timesteps in falling order; whole numbers, except in flow matching.
        condition: mapping from name to a tensor (K, ...), the condition of each trajectory; {} for an unconditional
            model.
        unconditional: mapping from name to a tensor (1, ...) for the unconditional pass; {} where the trajectories are
            not guided.
        unconditional_predictions: (K, N, C, H, W) float32, the predictions of the unconditional pass; None without
            guidance.
    """

    states: Tensor
    predictions: Tensor
    timesteps: tuple[float, ...]
    condition: Condition = field(default_factory=dict)
    unconditional: Condition = field(default_factory=dict)
    unconditional_predictions: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """The images (K, C, H, W) at which the trajectories end."""
        return self.states[:, -1]

    def below(self, start: float) -> CalibrationSet:
        """Return the set without the states at the time `start` and above, which full precision computes."""
        columns = [column for column, t in enumerate(self.timesteps) if t < start]
        if len(columns) == len(self.timesteps):
            return self
        guided = self.unconditional_predictions
        return replace(
            self,
            states=self.states[:, [*columns, -1]],
            predictions=self.predictions[:, columns],
            timesteps=tuple(self.timesteps[column] for column in columns),
            unconditional_predictions=None if guided is None else guided[:, columns],
        )

    def of(self, rows: slice) -> CalibrationSet:
        """The set of these trajectories alone."""
        guided = self.unconditional_predictions
        return replace(
            self,
            states=self.states[rows],
            predictions=self.predictions[rows],
            condition={name: value[rows] for name, value in self.condition.items()},
            unconditional_predictions=None if guided is None else guided[rows],
        )

    def inputs(self, count: int, batch_size: int) -> Iterator[DenoiserInput]:
        """Yield batches of denoiser inputs (x_t (B, C, H, W), t (B,), condition), `count` samples in all.

        The samples are spread evenly over trajectories and timesteps, in a seeded random order. With guided
        trajectories, every second sample belongs to the unconditional pass.
        """
        total = self.predictions.shape[0] * len(self.timesteps)
        # Flatten (trajectory, timestep) to one index, so that evenly spaced indices cover trajectories and timesteps
        # alike. The fixed shuffle mixes timesteps within each batch.
        flat = torch.linspace(0, total - 1, min(count, total)).long()
        flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))]
        t = torch.tensor(self.timesteps)
        for first, batch in zip(range(0, len(flat), batch_size), torch.split(flat, batch_size), strict=True):
            row, column = batch // len(self.timesteps), batch % len(self.timesteps)
            yield self.states[row, column], t[column], self.conditions_of(row, first)

    def conditions_of(self, rows: Tensor, first: int) -> dict[str, Tensor]:
        """Return the conditions (B, ...) for states of the trajectories `rows`, numbered from `first`; see `passes`."""
        chosen = {name: value[rows] for name, value in self.condition.items()}
        odd = self.passes(len(rows), first)
        for name, value in self.unconditional.items():
            chosen[name][odd] = value
        return chosen

    def passes(self, count: int, first: int) -> Tensor:
        """Return a mask (count,) that is true where a state belongs to the unconditional pass.

        With guidance that is every second state, otherwise none.
        """
        if not self.unconditional:
            return torch.zeros(count, dtype=torch.bool)
        return torch.arange(first, first + count) % 2 == 1


def calibration_set(
    model: DiffusionModel,
    recipe: CalibrationRecipe,
    batch_size: int,
    cache: Path,
    *,
    advance: Callable[[int], None] = lambda _: None,
    conditions: ConditionSet | None = None,
    together: bool = False,
) -> tuple[CalibrationSet, Path]:
    """Return the set of a recipe and its folder, read from `cache`, or else recorded and written there.

    `advance` is called after every sampling step of a batch with the number of trajectories in it. `conditions` are
    those that the recipe's digest stands for. With `together`, all processes of a run call this, and each records some.
    """

    def make(draft: Path) -> None:
        recorded = record(
            model,
            recipe,
            batch_size,
            advance,
            conditions=conditions,
            finished=parts_folder(draft),
            together=together,
        )
        if together and not is_first():
            return
        save_tensors(_tensors(recorded), draft / TRAJECTORIES)
        content = json.dumps({**recipe.decides, "timesteps": recorded.timesteps}, indent=2)
        write_file(draft / "recipe.json", content + "\n")

    folder = shared_folder(cache, recipe.decides, make, together=together)
    return read_calibration(folder), folder


@torch.no_grad()
def record(
    model: DiffusionModel,
    recipe: CalibrationRecipe,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
    *,
    conditions: ConditionSet | None = None,
    finished: Path | None = None,
    together: bool = False,
) -> CalibrationSet:
    """Run the sampler from seeded noise, and keep the state and the prediction at every timestep of the recipe.

    Finished batches are written to the folder `finished`, so that a later process can resume after the last of them.
    With `together`, all processes of a run make some of them.

    Raises:
        ModelError: the model's values are not finite.
        InterruptedByUserError: Ctrl-C was pressed, if `finished` is given.
    """
    schedule, conditions = noise_schedule(model.scheduler_config), conditions or ConditionSet()
    coarse = schedule.passing(recipe.steps, recipe.also)
    fine = schedule.finer(coarse, recipe.refinement)
    guiding = conditions.unconditional if recipe.guidance_scale != 1.0 else {}

    def batch(first: int, count: int) -> dict[str, Tensor]:
        passes = _Passes(model.denoiser)
        follow = guided_call(passes, conditions.drawn(recipe.seed, first, count), guiding, recipe.guidance_scale)
        noise = torch.from_numpy(initial_noise(recipe.seed, first, count, model.sample_shape))
        return _walked(noise, follow, passes, fine, schedule=schedule, advance=advance, source=model.source)

    with on_accelerator(model.denoiser):
        tensors = gathered(
            finished,
            recipe.trajectories,
            batch_size,
            batch,
            work="calibration: trajectories",
            advance=lambda rows: advance(rows * sum(map(len, fine))),
            together=together,
        )
    return CalibrationSet(
        states=tensors["states"],
        predictions=tensors["predictions"],
        timesteps=tuple(t for t, _ in coarse),
        condition=conditions.drawn(recipe.seed, 0, recipe.trajectories),
        unconditional=guiding,
        unconditional_predictions=tensors.get("unconditional_predictions"),
    )


def _walked(
    noise: Tensor,
    follow: Callable[[Tensor, float], Tensor],
    passes: _Passes,
    fine: Sequence[Walk],
    *,
    schedule: NoiseSchedule,
    advance: Callable[[int], None],
    source: str,
) -> dict[str, Tensor]:
    """Run one batch of trajectories, and return its tensors (B, ...) as in `CalibrationSet`.

    Each entry of `fine` holds the refined steps of one sampling step. The state and the predictions are kept at the
    first of them.
    """
    walk, image = [], noise
    for inner in fine:
        for index, step in enumerate(along(inner, follow, image, schedule)):
            if index == 0:
                walk.append((step.x_t, *passes.predictions))
            passes.predictions.clear()
            image = step.x_s
            advance(len(noise))
    states, *predictions = (torch.stack(column, dim=1) for column in zip(*walk, strict=True))
    states = torch.cat([states, image[:, None]], dim=1)
    if not bool(torch.isfinite(states).all()):
        raise ModelError(
            f"{source}: got full-precision trajectories with values that are not finite; allowed finite ones"
        )
    return {"states": states, **dict(zip(("predictions", "unconditional_predictions"), predictions, strict=False))}


class _Passes:
    """A denoiser that keeps the predictions it has made since the list was last cleared."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.predictions: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: float, condition: Condition) -> Tensor:
        self.predictions.append(predict(self.denoiser, x_t, t, condition))
        return self.predictions[-1]


def _tensors(trajectories: CalibrationSet) -> dict[str, Tensor]:
    """Return the set as the tensors of a file."""
    named = {"states": trajectories.states, "predictions": trajectories.predictions}
    if trajectories.unconditional_predictions is not None:
        named["unconditional_predictions"] = trajectories.unconditional_predictions
    prefixed = ((CONDITION, trajectories.condition), (UNCONDITIONAL, trajectories.unconditional))
    return named | {
        f"{prefix}{name}": value.contiguous() for prefix, values in prefixed for name, value in values.items()
    }


def read_calibration(folder: Path) -> CalibrationSet:
    """Read a set that `calibration_set` wrote.

    Raises:
        ModelError: the folder is incomplete or damaged.
    """
    try:
        tensors = load_file(folder / TRAJECTORIES)
        steps = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["timesteps"]
        condition, unconditional = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (CONDITION, UNCONDITIONAL)
        )
        guided_too = tensors.get("unconditional_predictions")
        return CalibrationSet(
            tensors["states"], tensors["predictions"], tuple(steps), condition, unconditional, guided_too
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: got a damaged calibration set: {error}; allowed one as it was recorded; delete the folder "
            "and it is recorded anew"
        ) from error
