"""Training in bf16 and fp16: what stays float32, how near it comes to float32, and overflows that are no divergence.

Not here: what a divergence is in any precision (test_trouble_watch.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from small_stage import Matching, batches, network
from torch import Tensor, nn

from pqcad_qat.commands import run as pipeline
from pqcad_qat.errors import DivergedError, PolicyError
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.value_types import Precision
from pqcad_qat.quantization.conversion import integer_layers, quantized_layers
from pqcad_qat.training.callback import Batch, Callback, TrainState
from pqcad_qat.training.checkpoint import CheckpointFolder, load_checkpoint, write_checkpoint
from pqcad_qat.training.metrics_log import read_metrics
from pqcad_qat.training.trainer import LoopSettings, fit, new_accelerator, new_state
from pqcad_qat.training.training_stage import StageSettings, train_stage

SETTINGS = LoopSettings(steps=12, learning_rate=0.01)


class Dtypes(Callback):
    """Keeps in which precision layers compute and quantizers give their values."""

    def __init__(self, layer: nn.Module) -> None:
        self.name, self.seen, self.layer = "dtypes", set[tuple[str, torch.dtype]](), layer

    def before_step(self, state: TrainState) -> None:
        if state.step == 0:
            self.layer.register_forward_hook(lambda _layer, _inputs, output: self.seen.add(("layer", output.dtype)))
            for name in ("weight_quant", "input_quant"):
                quantizer = getattr(self.layer, name)
                quantizer.register_forward_hook(
                    lambda _module, _inputs, output, name=name: self.seen.add((name, output.dtype))
                )


def trained(folder: Path, precision: Precision) -> tuple[nn.Module, list[float], set[tuple[str, torch.dtype]]]:
    model = network()
    layers = quantized_layers(model)
    dtypes = Dtypes(layers["2"])
    settings = StageSettings(
        "toy",
        LoopSettings(40, learning_rate=1e-3),
        precision,
        CheckpointFolder(folder / "checkpoints"),
        folder / "logs",
    )
    train_stage(model, [Matching(layers), dtypes], batches, settings, console=Console(quiet=True))
    return model, [row["loss"] for row in read_metrics(folder / "logs" / "toy.jsonl")], dtypes.seen


def test_in_bf16_layers_compute_in_bf16_on_what_quantizers_round_to_it(tmp_path: Path) -> None:
    _, _, seen = trained(tmp_path, "bf16")
    assert seen == {("layer", torch.bfloat16), ("weight_quant", torch.bfloat16), ("input_quant", torch.bfloat16)}


def test_a_copy_of_a_trained_model_trains_in_bf16_too(tmp_path: Path) -> None:
    """A student starts as a copy of its teacher, and Accelerate leaves alone what bears its mark."""
    teacher, _, _ = trained(tmp_path, "bf16")
    seen = []
    student = copy.deepcopy(teacher)
    quantized_layers(student)["2"].register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))
    new_state(student, SETTINGS, new_accelerator("bf16")).network(batches(0)["x"])
    assert seen == [torch.bfloat16]


def test_training_in_bf16_comes_near_to_float32_and_leaves_a_float32_model_with_exact_integers(tmp_path: Path) -> None:
    _, plain, _ = trained(tmp_path / "fp32", "fp32")
    model, losses, _ = trained(tmp_path / "bf16", "bf16")
    assert losses[0] == pytest.approx(plain[0], rel=0.1)
    assert sum(losses[-5:]) == pytest.approx(sum(plain[-5:]), rel=0.25)
    assert "forward" not in vars(model)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    x = batches(0)["x"]
    assert model(x).dtype == torch.float32
    for name, layer in integer_layers(model).items():  # which asserts that they give the weight back exactly
        quantized = quantized_layers(model)[name]
        weight = quantized.weight_quant(quantized.weight).detach().numpy()
        assert ((layer.weight_int.astype("float32") - layer.weight_zero_point) * layer.weight_scale == weight).all()


def test_fp16_on_a_cpu_is_an_error_before_anything_is_written(tiny_policy: Policy, tmp_path: Path) -> None:
    training = tiny_policy.training.model_copy(update={"precision": "fp16"})
    with pytest.raises(
        PolicyError, match=r"training\.precision: got fp16 on cpu; allowed fp32 or bf16: fp16 needs a GPU"
    ):
        pipeline.run(
            tiny_policy.model_copy(update={"training": training}), tmp_path / "run", "command", Console(quiet=True)
        )
    assert list(tmp_path.iterdir()) == []


# ---- fp16's scaler, with float32 in its place
# ------------------------------------------------------------------------------------


class Least(Callback):
    """Least squares; the gradient is multiplied by what `spoil` says, the loss is not."""

    def __init__(self, spoil: float = 1.0) -> None:
        self.name, self.spoil = "least", spoil

    def loss_terms(self, state: TrainState, batch: Batch) -> Mapping[str, Tensor]:
        loss = 1024 * (state.network(batch["x"]) - batch["y"]).square().mean()
        loss.register_hook(lambda gradient: gradient * self.spoil)
        return {"squared": loss}


def pairs(step: int) -> Batch:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x.sum(dim=1, keepdim=True)}


def scaled(scale: float) -> tuple[TrainState, Accelerator]:
    """A state whose loss is scaled as fp16's is, on a CPU: float32 overflows where the scale is large enough."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    torch.manual_seed(0)
    state = new_state(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), SETTINGS, accelerator)
    accelerator.native_amp = True
    return state, accelerator


def weights(state: TrainState) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def test_steps_whose_gradients_overflow_are_made_again_at_a_lower_scale_to_the_weights_without_a_scale() -> None:
    state, accelerator = scaled(2.0**127)
    fit(state, [Least()], pairs, SETTINGS, accelerator=accelerator)
    assert state.step == SETTINGS.steps
    assert state.scaler is not None
    assert 2.0**100 < state.scaler.get_scale() < 2.0**127

    plain = new_accelerator("fp32")
    torch.manual_seed(0)
    reference = new_state(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), SETTINGS, plain)
    fit(reference, [Least()], pairs, SETTINGS, accelerator=plain)
    assert torch.equal(weights(state), weights(reference))  # a power of two scales exactly


def test_gradients_that_are_not_finite_at_any_scale_are_a_divergence_and_change_no_weight() -> None:
    state, accelerator = scaled(2.0**16)
    before = weights(state)
    with pytest.raises(DivergedError, match="step 0: training diverged"):
        fit(state, [Least(math.inf)], pairs, SETTINGS, accelerator=accelerator)
    assert state.scaler is not None
    assert state.scaler.get_scale() == 1.0
    assert torch.equal(weights(state), before)


def test_a_loss_that_is_not_finite_is_a_divergence_at_once() -> None:
    state, accelerator = scaled(2.0**16)

    def broken(step: int) -> Batch:
        return {name: value * math.inf for name, value in pairs(step).items()}

    with pytest.raises(DivergedError, match="step 0: training diverged"):
        fit(state, [Least()], broken, SETTINGS, accelerator=accelerator)
    assert state.scaler is not None
    assert state.scaler.get_scale() == 2.0**16


def test_a_checkpoint_keeps_the_scale(tmp_path: Path) -> None:
    state, accelerator = scaled(2.0**127)
    fit(state, [Least()], pairs, SETTINGS, accelerator=accelerator)
    path = write_checkpoint(CheckpointFolder(tmp_path), state, [])
    again, _ = scaled(2.0**16)
    load_checkpoint(path, again, [])
    assert again.scaler is not None
    assert state.scaler is not None
    assert again.scaler.state_dict() == state.scaler.state_dict()
