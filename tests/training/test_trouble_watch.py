"""Trouble is provoked for real and found with its layer and step; what is healthy is left alone.

Not here: what follows from a divergence (test_rollback.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_stage import STEPS, Matching, batches, input_range, network, weight_range
from tiny_runs import FinishedRun
from torch import nn

from pqcad_qat.errors import DivergedError
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.quantization.layer_state import set_weight_bits
from pqcad_qat.training.callback import Batch
from pqcad_qat.training.checkpoint import CheckpointFolder
from pqcad_qat.training.loss_level import allowed_rise
from pqcad_qat.training.oscillation import MEMORY, Flips
from pqcad_qat.training.trainer import LoopSettings
from pqcad_qat.training.training_stage import StageSettings, train_stage
from pqcad_qat.training.trouble_watch import TRACKED_WEIGHTS, WEIGHTS_EVERY


def train(
    folder: Path,
    rate: float = 1e-4,
    model: nn.Module | None = None,
    source: Callable[[int], Batch] = batches,
    **hooks: object,
) -> list[str]:
    """Train a stage that stops at a divergence; returns its warnings."""
    model = model or network()
    told: list[str] = []
    loop = LoopSettings(steps=STEPS, learning_rate=rate, ema=0.9)
    settings = StageSettings("toy", loop, "fp32", CheckpointFolder(folder / "checkpoints", every=10), folder / "logs")
    matching = Matching(quantized_layers(model), **hooks)  # type: ignore[arg-type]
    train_stage(model, [matching], source, settings, console=Console(quiet=True), warn=told.append)
    return told


def at(
    step: int, change: Callable[[nn.Module], None], layer: str = "2"
) -> Callable[[int, Mapping[str, nn.Module]], None]:
    def meddle(now: int, layers: Mapping[str, nn.Module]) -> None:
        if now == step:
            with torch.no_grad():
                change(layers[layer])

    return meddle


# ---- divergence
# ------------------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_infinite_is_named_with_its_layer_and_step(tmp_path: Path) -> None:
    def broken(layer: nn.Module) -> None:
        layer.weight[0, 0, 0, 0] = math.inf  # type: ignore[index,operator]

    with pytest.raises(
        DivergedError, match=r"step 7: training diverged: .*layer 2: weights \(1 of 576 values\) not finite"
    ):
        train(tmp_path, meddle=at(7, broken))


def test_a_range_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 7: .*layer 0: range of the input \(1 of 1 values\) not finite"):
        train(tmp_path, meddle=at(7, lambda layer: input_range(layer).fill_(math.nan), "0"))


def test_a_gradient_that_is_not_a_number_is_named_although_the_loss_is_finite(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 0: .*gradient norm nan; layer 0: gradient not finite") as caught:
        train(tmp_path, extra=lambda layers: (layers["0"].weight.sum() * 0).sqrt())  # type: ignore[union-attr,operator]
    assert not caught.value.stepped


def test_a_batch_that_is_not_finite_is_told_from_a_model_that_is_not(tmp_path: Path) -> None:
    def source(step: int) -> Batch:
        return {name: value / (0.0 if step == 3 and name == "target" else 1.0) for name, value in batches(step).items()}

    with pytest.raises(DivergedError, match=r"step 3: .*target of the batch not finite"):
        train(tmp_path, source=source)


def test_a_learning_rate_of_a_thousand_is_a_divergence_long_before_anything_is_infinite(tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError,
        match=r"step \d: training diverged: the smoothed loss is .* times its lowest.*training.learning_rate",
    ):
        train(tmp_path, rate=1e3)


def test_a_loss_that_jumps_after_a_bit_drop_is_named_with_the_layer_the_widths_and_both_steps(tmp_path: Path) -> None:
    def drop(layer: nn.Module) -> None:
        set_weight_bits(layer, 4, reestimate=False)  # type: ignore[arg-type]
        weight_range(layer).mul_(100)

    with pytest.raises(DivergedError) as caught:
        train(tmp_path, meddle=at(20, drop))
    assert 21 <= caught.value.step <= 25
    assert f"step {caught.value.step}: training diverged" in str(caught.value)
    assert "last change of width was at step 20: layer 2 from 8 to 4 bits" in str(caught.value)


def test_a_bit_drop_that_only_rounds_more_coarsely_is_no_trouble(tmp_path: Path) -> None:
    assert train(tmp_path, meddle=at(20, lambda layer: set_weight_bits(layer, 4))) == []  # type: ignore[arg-type]


def test_a_loss_may_rise_as_far_as_rounding_explains() -> None:
    assert [allowed_rise(bits) for bits in (0, 2, 4, 6)] == [100, 100, 256, 4096]


# ---- ranges and oscillations
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda layer: weight_range(layer).fill_(1e-12), "the range of the weights collapsed"),
        (lambda layer: weight_range(layer).mul_(1e4), "the range of the weights collapsed"),
        (lambda layer: weight_range(layer)[3].fill_(1e-12), "the range of the weights collapsed"),
        (lambda layer: weight_range(layer).mul_(0.3), "the range of the weights saturates"),
        (lambda layer: input_range(layer).fill_(1e-12), "the range of the inputs collapsed"),
        (lambda layer: input_range(layer).mul_(0.05), "the range of the inputs saturates"),
    ],
    ids=["weights 1e-12", "weights all zero", "one channel", "weights clipped", "inputs 1e-12", "inputs clipped"],
)
def test_a_range_that_collapsed_or_saturates_is_told_once_with_layer_and_step(
    tmp_path: Path, change: Callable[[nn.Module], None], said: str
) -> None:
    told = train(tmp_path, rate=1e-12, meddle=at(0, change))
    assert len(told) == 1, told
    assert told[0].startswith(f"toy: step {5 if 'weights' in said else 1}: {said}")
    assert "layer 2 (" in told[0]
    assert "layer 0" not in told[0]
    assert "%" in told[0]


def test_weights_that_oscillate_are_told_with_their_share(tmp_path: Path) -> None:
    def meddle(step: int, layers: Mapping[str, nn.Module]) -> None:
        layer = layers["2"]
        with torch.no_grad():
            distance = weight_range(layer).reshape(8) / 127
            layer.weight[:2] += (-1) ** step * distance[:2, None, None, None]  # type: ignore[index,operator]

    told = train(tmp_path, rate=1e-12, meddle=meddle)
    assert len(told) == 1, told
    assert "weights oscillate between two integers" in told[0]
    assert "layer 2 (25%)" in told[0]


def test_the_frequency_of_flips_is_that_of_the_paper() -> None:
    dice = torch.Generator().manual_seed(0)
    looks = torch.randint(-1, 2, (30, 5), generator=dice).float()
    flips = Flips.at_first_look(looks[0])
    for look in looks[1:]:
        flips.look(look)
    wanted = []
    for weight in looks.T.tolist():
        frequency, last = 0.0, 0.0
        for before, now in pairwise(weight):
            oscillates = now != before and math.copysign(1, now - before) == -last
            frequency = MEMORY * frequency + (1 - MEMORY) * oscillates
            last = math.copysign(1, now - before) if now != before else last
        wanted.append(frequency)
    torch.testing.assert_close(flips.frequency, torch.tensor(wanted))


def test_looks_are_at_odd_distances_and_their_state_fits_a_checkpoint() -> None:
    assert WEIGHTS_EVERY % 2 == 1
    assert TRACKED_WEIGHTS <= 256


@pytest.mark.parametrize("scale", ["learned", "statistics"])
def test_nothing_is_told_of_a_healthy_stage(tmp_path: Path, scale: str) -> None:
    assert train(tmp_path, model=network(scale)) == []


def test_nothing_is_told_of_a_healthy_run(tiny_run: FinishedRun) -> None:
    assert not (tiny_run.path / "warnings.json").exists()
