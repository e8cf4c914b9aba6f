"""Rounding that is learned block by block: nearer outputs of states that were not seen, on the same grids, and the same
weights again after an interruption.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conditional_models import class_unet, conditions
from safetensors.torch import save_file
from small_networks import SkipNetwork, calibrated_network, error_of, example, rule, several_batches, skip_network
from torch import Tensor, nn

from pqcad_qat.models.denoiser import DenoiserInput, predict
from pqcad_qat.quantization import learned_rounding
from pqcad_qat.quantization.conversion import calibrate_ranges, quantize_model, quantized_layers
from pqcad_qat.quantization.gptq_rounding import round_weights, rounded_layers
from pqcad_qat.quantization.layer_sensitivity import relative_error
from pqcad_qat.quantization.layer_state import level_size, quantized_weight, weight_quantizer_of
from pqcad_qat.quantization.learned_rounding import BATCH, learn_rounding
from pqcad_qat.quantization.model_blocks import Block
from pqcad_qat.quantization.plan import plan_layers

STEPS = 100

BLOCKS = 8
"""Of the network: its layers, since no module of it holds some of them."""


def learned(
    steps: int = STEPS,
    kept: Path | None = None,
    bits: int = 4,
    done: list[int] | None = None,
    warn: Callable[[str], None] = pytest.fail,
) -> SkipNetwork:
    model = calibrated_network(bits)
    advance = [].append if done is None else done.append
    learn_rounding(
        model,
        skip_network(),
        rounded_layers(model),
        several_batches(),
        steps=steps,
        kept=kept,
        advance=advance,  # type: ignore[arg-type]
        warn=warn,
    )
    return model


@pytest.mark.parametrize("bits", [3, 4])
def test_a_model_predicts_better_of_states_that_it_has_not_seen(bits: int) -> None:
    nearest = error_of(calibrated_network(bits))
    assert error_of(learned(bits=bits)) < 0.7 * nearest


def test_weights_lie_on_the_grid_that_they_had_next_to_where_they_were() -> None:
    before, model, done = quantized_layers(calibrated_network()), None, []  # type: ignore[var-annotated]
    model = learned(done=done)
    assert sum(done) == len(before)
    moved = 0
    for name, layer in quantized_layers(model).items():
        assert torch.equal(
            weight_quantizer_of(layer).scaling_impl.value, weight_quantizer_of(before[name]).scaling_impl.value
        )
        torch.testing.assert_close(layer.weight, quantized_weight(layer), rtol=1e-6, atol=1e-7)
        levels = (layer.weight - quantized_weight(before[name])) / level_size(layer)
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert levels.abs().max() < 1.5
        moved += int((levels.round() != 0).sum())
        assert layer.weight_quant.frozen is None
        assert all(parameter.requires_grad for parameter in layer.parameters())
    assert moved > 50


def test_shifts_that_states_apart_do_not_confirm_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up the slopes instead of down."""
    down = learned_rounding._follow
    monkeypatch.setattr(learned_rounding, "_follow", lambda shifts, slopes, length: down(shifts, slopes, -length))
    before, model = quantized_layers(calibrated_network()), learned()
    for name, layer in quantized_layers(model).items():
        torch.testing.assert_close(quantized_weight(layer), quantized_weight(before[name]), rtol=1e-6, atol=1e-7)


def test_what_is_interrupted_goes_on_after_the_last_finished_block_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, learn, calls = learned(), learned_rounding._learn, []

    def stopping(*arguments: object, **named: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        learn(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(learned_rounding, "_learn", stopping)
    with pytest.raises(KeyboardInterrupt):
        learned(kept=tmp_path)
    again = learned(kept=tmp_path)
    assert len(calls) == 4 + BLOCKS - 3
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_few_states_fit_where_a_block_reads_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then that block alone learns from fewer, whatever the size of batches is, and it is told."""
    seen: dict[str, int] = {}
    learn = learned_rounding._learn

    def noted(module: object, block: Block, arguments: object, results: list[Tensor], **named: object) -> None:
        seen[block.name] = len(results[0])
        learn(module, block, arguments, results, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(learned_rounding, "_learn", noted)
    learned(steps=1, warn=[].append)
    assert set(seen.values()) == {32}
    of_state = 4 * 16 * 8 * 8  # bytes of what conv1 and the shortcut read of one state
    told: list[str] = []
    monkeypatch.setattr(learned_rounding, "LARGEST", 20 * of_state)
    learned(steps=1, warn=told.append)
    assert {name for name, count in seen.items() if count == 20} == {"conv1", "conv_shortcut"}
    assert told == [
        "ptq: conv1, conv_shortcut learned from fewer than 32 states, at least 20: more take too much memory"
    ]
    monkeypatch.setattr(learned_rounding, "LARGEST", 1)
    learned(steps=1, warn=told.append)
    assert set(seen.values()) == {BATCH}


def test_a_damaged_file_of_an_earlier_process_is_learned_anew(tmp_path: Path) -> None:
    whole = learned(kept=tmp_path)
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(b"")
    save_file({"other": torch.zeros(1)}, files[1])
    again = learned(kept=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_blocks_of_several_layers_and_conditions_learn_to_be_nearer() -> None:
    def batch(seed: int) -> DenoiserInput:
        dice = torch.Generator().manual_seed(seed)
        x_t = torch.randn(16, 1, 16, 16, generator=dice)
        return x_t, torch.randint(0, 1000, (16,), generator=dice), conditions("class_unet", 16, seed)

    full = class_unet().eval()
    states = [batch(seed) for seed in range(4)]
    model = quantize_model(copy.deepcopy(full), plan_layers(full, {"all": rule("*", bits=3)}, (), states[0]))
    calibrate_ranges(model, states)
    with torch.no_grad():
        reference = [predict(full, *batch(9))]
        before = relative_error(model, reference, [batch(9)])
        learn_rounding(model, full, rounded_layers(model), states, steps=60)
        assert relative_error(model, reference, [batch(9)]) < 0.8 * before


class Activated(nn.Module):
    """A denoiser whose activation may overwrite what the layer before it has returned."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.act = nn.ReLU(in_place)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.two(self.act(self.one(x)))
        return y


def test_what_a_block_returns_is_learned_although_it_is_overwritten_later() -> None:
    states = [(*example(8, seed), {}) for seed in range(4)]

    def weights(in_place: bool) -> list[Tensor]:
        torch.manual_seed(0)
        full = Activated(in_place).eval()
        model = quantize_model(copy.deepcopy(full), plan_layers(full, {"all": rule("*", bits=3)}, (), states[0]))
        calibrate_ranges(model, states)
        learn_rounding(model, full, rounded_layers(model), states, steps=20)
        return [layer.weight.detach() for layer in quantized_layers(model).values()]

    for own, other in zip(weights(in_place=True), weights(in_place=False), strict=True):
        assert torch.equal(own, other)


def test_narrow_inputs_are_made_up_for_where_gptq_cannot() -> None:
    """GPTQ looks at the outputs of one layer for the inputs that it gets; here what they lost is made up for."""

    def narrow() -> SkipNetwork:
        model = skip_network()
        rules = {"all": rule("type:Conv2d", "type:Linear", bits=4, inputs={"bits": 4})}
        quantize_model(model, plan_layers(model, rules, (), example()))
        calibrate_ranges(model, several_batches())
        return model

    ours, theirs = narrow(), narrow()
    learn_rounding(ours, skip_network(), rounded_layers(ours), several_batches(), steps=STEPS)
    round_weights(theirs, several_batches(), passes=BLOCKS)
    assert error_of(ours) < error_of(theirs)
