"""How sensitive layers are, against one layer quantized by hand; and the command, from a policy to a policy that plans
what was chosen.

Not here: the choice itself (test_mixed_precision.py).
"""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import POLICIES, tiny_overrides
from torch import Tensor, nn

from pqcad_qat import cli, console
from pqcad_qat.commands.sensitivity import CHOSEN, OWN, measure_sensitivity
from pqcad_qat.errors import PlanError
from pqcad_qat.export.traceable_modules import needs_vnni
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.quantization.conversion import calibrate_ranges, integer_layers, quantize_model, quantized_layers
from pqcad_qat.quantization.layer_sensitivity import LayerSensitivity, layer_sensitivities, output_error
from pqcad_qat.quantization.layer_state import quantized_weight, set_weight_bits
from pqcad_qat.quantization.mixed_precision import weight_costs
from pqcad_qat.quantization.plan_facts import expected_bytes
from pqcad_qat.report.sensitivity_page import SensitivityReport, decibels, render, sensitivity_table
from pqcad_qat.stages.prepared import Prepared, prepare

WIDTHS = (2, 4, 7)
FEW = "quantization.layers.body.match=['mid_block.*', 'down_blocks.1.*']"
"""Override for half of the tiny model's layers: attention is among them."""

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def prepared(tiny_folder: Path) -> Prepared:
    torch.set_num_threads(1)  # for networks as small as this
    return prepare(load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, FEW)))


@pytest.fixture(scope="module")
def batches(prepared: Prepared) -> list[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, *prepared.model.sample_shape, generator=noise), torch.tensor([900, 500, 100, 0]))
        for _ in range(2)
    ]


@pytest.fixture
def quantized(prepared: Prepared, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    return calibrated(prepared, batches)


def calibrated(prepared: Prepared, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    model = quantize_model(copy.deepcopy(prepared.split), prepared.plan)
    calibrate_ranges(model, batches)
    return model.eval()


def moved(model: nn.Module, reference: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The relative squared error of one model's outputs to another's, all states at once."""
    with torch.no_grad():
        ours, known = (torch.cat([found(*batch).sample for batch in batches]) for found in (model, reference))
    return float((ours - known).square().mean() / known.square().mean())


@pytest.fixture(scope="module")
def found(prepared: Prepared, batches: list[tuple[Tensor, Tensor]]) -> dict[str, LayerSensitivity]:
    """The sensitivity of every layer at all `WIDTHS`."""
    return {layer.name: layer for layer in layer_sensitivities(calibrated(prepared, batches), WIDTHS, batches)}


def test_a_layers_error_is_that_of_the_full_precision_model_with_its_weights_alone_replaced(
    found: dict[str, LayerSensitivity],
    prepared: Prepared,
    quantized: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    layers = quantized_layers(quantized)
    assert list(found) == list(layers)
    for name in (next(iter(layers)), list(layers)[-1]):
        for bits in WIDTHS:
            set_weight_bits(layers[name], bits)
            by_hand = copy.deepcopy(prepared.split)
            by_hand.get_parameter(f"{name}.weight").data = quantized_weight(layers[name])
            assert found[name].weights[bits] == pytest.approx(moved(by_hand, prepared.split, batches), rel=1e-4)
        assert found[name].weights[2] > 4 * found[name].weights[4] > 16 * found[name].weights[7] > 0


def test_layers_that_read_one_tensor_share_its_error(found: dict[str, LayerSensitivity], quantized: nn.Module) -> None:
    groups: dict[str, list[str]] = {}
    for name, layer in quantized_layers(quantized).items():
        groups.setdefault(layer.plan.input_group, []).append(name)
    assert any(len(members) > 1 for members in groups.values())
    for members in groups.values():
        assert len({found[name].inputs for name in members}) == 1
        assert found[members[0]].inputs > 0


def test_measuring_leaves_the_model_quantized_and_counts_its_measurements(
    quantized: nn.Module, prepared: Prepared, batches: list[tuple[Tensor, Tensor]]
) -> None:
    for layer in quantized_layers(quantized).values():
        set_weight_bits(layer, 4)
    before, done = moved(quantized, prepared.split, batches), []
    layer_sensitivities(quantized, (7, 4), batches, lambda: done.append(1))
    layers = quantized_layers(quantized)
    assert moved(quantized, prepared.split, batches) == before > 0
    assert len(done) == 2 * len(layers) + len({layer.plan.input_group for layer in layers.values()})


def test_the_error_of_all_layers_is_that_of_the_quantized_model(
    quantized: nn.Module, prepared: Prepared, batches: list[tuple[Tensor, Tensor]]
) -> None:
    bits = {name: 3 + index % 2 for index, name in enumerate(quantized_layers(quantized))}
    error = output_error(quantized, bits, batches)
    assert error == pytest.approx(moved(quantized, prepared.split, batches), rel=1e-4)
    assert {name: layer.weight_bits for name, layer in integer_layers(quantized).items()} == bits


# ---- the command
# ---------------------------------------------------------------------------------------------------------------------

Measure = Callable[..., tuple[SensitivityReport, str | None]]


@pytest.fixture(scope="module")
def measure(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    policy, cache = (
        load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, FEW)),
        tmp_path_factory.mktemp("sensitivity"),
    )

    def run(size: str | None = None) -> tuple[SensitivityReport, str | None]:
        return measure_sensitivity(
            policy,
            WIDTHS,
            8,
            size,
            cache=cache / ".calibration",
            command="python -m pqcad_qat sensitivity",
            console=QUIET,
        )

    return run


@pytest.fixture(scope="module")
def chosen(measure: Measure, prepared: Prepared) -> tuple[SensitivityReport, str]:
    sizes = weight_costs(prepared.split, prepared.plan, {4, 7}, packed=True)
    report, text = measure(
        f"{(sizes.total(dict.fromkeys(sizes.layers, 4)) + sizes.total(dict.fromkeys(sizes.layers, 7))) / 2e6}MB"
    )
    assert text is not None
    return report, text


def test_the_chosen_widths_keep_to_the_size_and_move_the_output_less_than_smaller_ones(
    chosen: tuple[SensitivityReport, str],
) -> None:
    report, _ = chosen
    found = report.assignments[CHOSEN]
    assert report.budget_bytes is not None
    assert report.assignments[OWN].bytes < found.bytes <= report.budget_bytes
    assert found.error < report.assignments[OWN].error
    assert {4, 7} <= set(found.bits.values()) <= set(WIDTHS)
    assert found.predicted == pytest.approx(
        sum(layer.inputs + layer.weights[found.bits[layer.name]] for layer in report.layers)
    )


def test_the_policy_that_is_written_plans_the_chosen_widths_at_the_size_that_is_told(
    chosen: tuple[SensitivityReport, str], tmp_path: Path
) -> None:
    report, text = chosen
    (tmp_path / "policy.yaml").write_text(text)
    policy = load_policy(tmp_path / "policy.yaml")
    again = prepare(policy)
    found = report.assignments[CHOSEN]
    assert {layer.name: layer.weights.bits for layer in again.plan} == found.bits
    assert expected_bytes(again.split, again.plan, packed=True) == found.bytes
    assert (policy.name, policy.export.weights) == ("tiny-mixed", "packed")
    assert not any(needs_vnni(layer) for layer in _integers(again).values())


def _integers(prepared: Prepared) -> dict:  # type: ignore[type-arg]
    model = quantize_model(
        copy.deepcopy(prepared.split), [replace(layer, ladder=(layer.weights.bits,)) for layer in prepared.plan]
    )
    calibrate_ranges(model, [(torch.randn(2, *prepared.model.sample_shape), torch.tensor([500, 1]))])
    return integer_layers(model)


def test_a_size_that_no_widths_have_is_refused_before_anything_is_measured(measure: Measure) -> None:
    with pytest.raises(
        PlanError,
        match=r"^--max-size: got 0.010x \([\d,]+ bytes of weights\); allowed at least 0\.\d+x .* widths 2, 4, 7$",
    ):
        measure("0.01x")


def test_terminal_and_page_show_every_layer_with_its_errors_and_width(chosen: tuple[SensitivityReport, str]) -> None:
    report, _ = chosen
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sensitivity_table(report))
    shown, page = console.export_text(), render(report)
    for layer in report.layers:
        for text in (layer.name, decibels(layer.weights[2]), decibels(layer.inputs)):
            assert text in shown
            assert text in page
        assert f"{layer.name} at 4 bits: {decibels(layer.weights[4])} dB" in page
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", page) == []


def test_the_command_writes_page_numbers_and_policy(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "CONSOLE", Console(width=160))
    flags = [f"--set={override}" for override in tiny_overrides(tiny_folder)]
    cli.main(
        [
            "sensitivity",
            str(POLICIES / "smoke.yaml"),
            "--states",
            "4",
            "--widths",
            "[4,7]",
            "--max-size",
            "0.9x",
            *flags,
        ]
    )
    folder = tmp_path / "runs" / "tiny-sensitivity"
    assert sorted(path.name for path in folder.iterdir()) == ["policy.yaml", "sensitivity.html", "sensitivity.json"]
    document = json.loads((folder / "sensitivity.json").read_text())
    assert set(document["assignments"][CHOSEN]["bits"].values()) == {7}
    assert "together, dB" in capsys.readouterr().out
