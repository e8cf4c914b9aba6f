"""Activations that the backward pass computes again: the same gradients and the same statistics from less memory.

Not here: the rest of a training step (test_trainer.py, test_step_profile.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conditional_models import conditions, saved
from diffusers import UNet2DModel
from rich.console import Console
from tiny_runs import tiny_unet
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import recomputed_activations
from pqcad_qat.models.families.table import family_of
from pqcad_qat.policy.layer_rules import LayerRule, numbered
from pqcad_qat.policy.schema import Policy
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_state import begin_blend, set_blend
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.stages.prepared import prepare
from pqcad_qat.training import trouble_watch
from pqcad_qat.training.callback import Batch
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.quantization_aware import FullPrecisionMatching
from pqcad_qat.training.step_profile import profile_steps
from pqcad_qat.training.trainer import LoopSettings
from pqcad_qat.training.training_stage import StageSettings, train_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calibrated(tiny_policy: Policy) -> nn.Module:
    """The tiny model quantized, every other layer in a transition; tests copy it, so that their first forward pass is
    its first.
    """
    prepared = prepare(tiny_policy)
    model = quantize_model(prepared.split, prepared.plan)
    calibrate_ranges(model, [(batch(0)["x_t"], batch(0)["t"])])
    for layer in list(quantized_layers(model).values())[::2]:
        if len(layer.plan.ladder) > 1:
            begin_blend(layer, layer.plan.ladder[1])
            set_blend(layer, 0.5)
    return model


def batch(step: int) -> Batch:
    dice = torch.Generator().manual_seed(step)
    x, target = (torch.randn(4, 1, 32, 32, generator=dice) for _ in range(2))
    return {"x_t": x, "t": torch.tensor([900, 600, 300, 0]), "target": target, "weight": torch.ones(4)}


def gradients(model: nn.Module, again: bool) -> dict[str, Tensor]:
    model.train().zero_grad()
    data = batch(1)
    with recomputed_activations(model, again):
        (model(data["x_t"], data["t"], return_dict=False)[0] - data["target"]).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_are_the_same_to_the_last_bit_and_no_statistic_moves(calibrated: nn.Module) -> None:
    model = copy.deepcopy(calibrated)
    kept, recomputed = gradients(copy.deepcopy(calibrated), again=False), gradients(model, again=True)
    assert kept.keys() == recomputed.keys() == dict(calibrated.named_parameters()).keys()
    assert [name for name, value in kept.items() if not torch.equal(value, recomputed[name])] == []
    assert [
        name for name, value in model.state_dict().items() if not torch.equal(value, calibrated.state_dict()[name])
    ] == []


LEARNED = LayerRule.model_validate(
    {"match": ["*"], "weights": {"bits": 8}, "inputs": {"bits": 8, "symmetric": False, "scale": "learned"}}
)

CONDITIONAL = {  # several blocks each, so that what one of them quantizes might be missed by another
    "class_unet": {},
    "text_unet": {},
    "text_and_size_unet": {},
    "dit": {},
    "pixart": {"num_layers": 2},
    "sd3": {},
    "flux": {"num_layers": 2, "num_single_layers": 2},
}


@dataclass(frozen=True)
class Learner:
    """A conditional model whose every layer is quantized, and what one step of it learns from."""

    model: nn.Module
    x: Tensor
    condition: dict[str, Tensor]

    def step(
        self, again: bool, mixed: bool = False, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    ) -> dict[str, Tensor]:
        """The prediction, and every gradient by name."""
        self.model.train().zero_grad()
        family, times = family_of(self.model), torch.tensor([40, 900])
        with recomputed_activations(self.model, again):
            network = wrap(self.model)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                prediction = family.call(network, self.x, times, family.keywords(self.condition))[0]
            prediction.float().square().mean().backward()
        found = {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return {"prediction": prediction.detach(), **found}


def learner(name: str, folder: Path) -> Learner:
    full, condition = saved(name, folder, **CONDITIONAL[name]), conditions(name, 2)
    x = torch.randn(2, *full.sample_shape, generator=torch.Generator().manual_seed(0))
    model = quantize_model(full.denoiser, plan_layers(full.denoiser, numbered([LEARNED]), (8,), full.example))
    calibrate_ranges(model, [(x, torch.tensor([40, 900]), condition)])
    return Learner(model, x, condition)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_models_compute_again_what_they_had_whoever_shares_an_input(name: str, tmp_path: Path) -> None:
    """Values and gradients to the last bit; and but for the order of sums those of layers that share no quantized
    input.
    """
    sharing = learner(name, tmp_path)
    shared = [
        layer.shared_input for layer in quantized_layers(sharing.model).values() if getattr(layer, "shared_input", None)
    ]
    assert len(shared) > 3
    apart = copy.deepcopy(sharing)
    for layer in quantized_layers(apart.model).values():
        layer.shared_input = None
    for mixed, tolerance in ((False, 1e-4), (True, 0.05)):
        kept = sharing.step(again=False, mixed=mixed)
        assert len(kept) > len(quantized_layers(sharing.model))
        assert differing(kept, sharing.step(again=True, mixed=mixed)) == []
        assert differing(kept, sharing.step(again=True, mixed=mixed)) == []
        assert [result for result in shared if result.shared is not None] == []
        alone = apart.step(again=False, mixed=mixed)
        assert torch.equal(kept["prediction"], alone["prediction"])
        sizes = {name: float(value.abs().max()) for name, value in kept.items()}
        for (
            name,
            size,
        ) in sizes.items():  # gradients that cancel to nothing are rounding alone: softmax does not see a bias of to_k
            atol = tolerance * max(size, 1e-2 * max(sizes.values()))
            torch.testing.assert_close(kept[name], alone[name], rtol=0, atol=atol, msg=name)


def test_data_parallel_training_computes_again_what_it_had(tmp_path: Path) -> None:
    """As above, in torch's wrapper, with one process."""
    alone = learner("text_unet", tmp_path)
    found = alone.step(again=False)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = alone.step(
            again=True, wrap=lambda model: DistributedDataParallel(model, find_unused_parameters=True)
        )
    finally:
        distributed.destroy_process_group()
    assert differing(found, parallel) == []


class Parts(nn.Module):
    """One module that checkpoints two parts of itself, both of which read x, as may a layer outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor, again: bool = False) -> Tensor:
        def half(layers: tuple[nn.Module, ...]) -> Tensor:
            def call(x: Tensor) -> Tensor:
                return torch.stack([layer(x).sin() for layer in layers]).sum(0)

            found: Tensor = checkpoint(call, x, use_reentrant=False) if again else call(x)
            return found

        return self.first(x).cos() + half((self.second,)) + half((self.third, self.fourth))


def test_a_module_may_checkpoint_parts_of_itself() -> None:
    torch.manual_seed(0)
    model, x, t = Parts(), torch.randn(3, 8), torch.tensor([1, 2, 3])
    quantize_model(model, plan_layers(model, numbered([LEARNED]), (8,), (x, t)))
    calibrate_ranges(model, [(x, t)])
    found = []
    for again in (False, True):
        model.zero_grad()
        y = model(x, t, again)
        y.square().sum().backward()
        found.append(
            {"y": y.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}
        )
    assert found[0].keys() == found[1].keys() >= {"first.weight", "fourth.weight"}
    assert torch.equal(found[0]["y"], found[1]["y"])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


def stage(model: nn.Module, folder: Path, again: bool) -> nn.Module:
    settings = StageSettings(
        "toy",
        LoopSettings(2, learning_rate=1e-4),
        "fp32",
        CheckpointFolder(folder),
        folder / "logs",
        activation_checkpointing=again,
    )
    train_stage(model, [FullPrecisionMatching()], batch, settings, console=Console(quiet=True))
    return model


def test_a_stage_ends_with_the_same_weights_and_inputs_are_looked_at_once(
    calibrated: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch reads every layer's input at step 0 of 2; what is computed again is not read again."""
    looked: list[Any] = []
    use = trouble_watch.input_use
    monkeypatch.setattr(trouble_watch, "input_use", lambda layer, *rest: looked.append(id(layer)) or use(layer, *rest))
    ends = [stage(copy.deepcopy(calibrated), tmp_path / str(again), again) for again in (False, True)]
    assert [
        name for name, value in ends[0].state_dict().items() if not torch.equal(value, ends[1].state_dict()[name])
    ] == []
    assert len(looked) == len(set(looked)) == 2 * len(quantized_layers(calibrated))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in ends[1].modules())


def test_a_profile_shows_that_less_is_kept_and_less_is_needed_at_once(calibrated: nn.Module) -> None:
    plain, again = copy.deepcopy(calibrated), copy.deepcopy(calibrated)
    with recomputed_activations(again, True):
        found = profile_steps(
            {name: (model, [FullPrecisionMatching()]) for name, model in (("plain", plain), ("again", again))},
            batch,
            "fp32",
            0.0,
            runs=1,
        )
    assert found["again"].kept_bytes < 0.7 * found["plain"].kept_bytes
    assert found["again"].peak_bytes < 0.8 * found["plain"].peak_bytes
    assert found["plain"].peak_bytes > found["plain"].kept_bytes


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: nn.Linear(2, 2), "Linear"),
        (
            lambda: UNet2DModel(**{**dict(tiny_unet().config), "down_block_types": ("SkipDownBlock2D", "DownBlock2D")}),
            r"down_blocks\.0 \(SkipDownBlock2D\)",
        ),
    ],
    ids=["no diffusers model", "a block without it"],
)
def test_an_architecture_that_cannot_is_an_error_that_names_what_cannot(model: Any, named: str) -> None:
    with (
        pytest.raises(ModelError, match=f"training.activation_checkpointing: got true; allowed false: .*{named}"),
        recomputed_activations(model(), True),
    ):
        pass
    with recomputed_activations(model(), False):
        pass
