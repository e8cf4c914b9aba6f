"""Attention's products in INT8: what they read, what the graph computes, and what it executed in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deployed_fixture import SCHEDULER, SHAPE, Quantized, quantized
from diffusers import UNet2DModel
from small_networks import SkipNetwork
from tiny_runs import POLICIES
from torch import Tensor, nn

from pqcad_qat.errors import ExportError, PlanError
from pqcad_qat.export.execution import execution_precision
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.export.int8_attention import AttentionRange, attention_ranges, masked_attention, quantized_attention
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.stages.prepared import planned_shapes

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Attends(nn.Module):
    """Attention in a submodule, with the keywords given, beside one that does not attend."""

    def __init__(self, **keywords: object) -> None:
        super().__init__()
        self.same, self.attention = nn.Identity(), Attention(keywords)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y: Tensor = self.attention(x) + self.same(x)
        return y


class Attention(nn.Module):
    def __init__(self, keywords: dict[str, object]) -> None:
        super().__init__()
        self.keywords = keywords

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(2 * x, x, 3 * x, **self.keywords)  # type: ignore[arg-type]


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("keywords", [{}, {"scale": 0.2}, {"dropout_p": 0.0, "is_causal": False, "attn_mask": None}])
def test_ranges_are_the_largest_magnitudes_of_all_batches(keywords: dict[str, object]) -> None:
    found = attention_ranges(Attends(**keywords), [(X, T, {}), (X / 2, T, {})])
    scale = keywords.get("scale", 8**-0.5)
    assert isinstance(scale, float)
    probability = max(float(torch.softmax(2 * x @ x.mT * scale, -1).max()) for x in (X, X / 2))
    largest = float(X.abs().max())
    assert list(found) == ["attention"]
    np.testing.assert_allclose(
        list(vars(found["attention"]).values()), [2 * largest, largest, 3 * largest, probability], rtol=1e-6
    )


@pytest.mark.parametrize("keywords", [{"is_causal": True}, {"attn_mask": torch.ones(8, 8).tril().bool()}])
def test_masked_attention_is_left_as_it_is(keywords: dict[str, object]) -> None:
    model = Attends(**keywords)
    assert masked_attention(model, (X, T, {})) == ("attention",)
    assert attention_ranges(model, [(X, T, {})]) == {}


def test_quantized_products_are_near_and_only_within_the_context() -> None:
    model = Attends().eval()
    exact = model(X, T)
    ranges = attention_ranges(model, [(X, T, {})])
    assert masked_attention(model, (X, T, {})) == ()
    with quantized_attention(model, ranges):
        near = model(X, T)
    assert 0 < float((near - exact).abs().max()) < 0.05 * float(exact.abs().max())
    torch.testing.assert_close(model(X, T), exact, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_attention_computes_no_size() -> None:
    """In a graph of any size that would be one input more to the node of both products, which OpenVINO fuses with VNNI,
    and the node would not be known.
    """
    model = Attends()
    with quantized_attention(model, attention_ranges(model, [(X, T, {})])):
        traced = torch.jit.trace(model, (X, T), check_trace=False)
    assert "aten::softmax" in str(traced.inlined_graph)
    assert "aten::size" not in str(traced.inlined_graph)


def test_values_that_are_no_numbers_are_named() -> None:
    with pytest.raises(ExportError, match="attention: its attention got NaN or infinity"):
        attention_ranges(Attends(), [(X * torch.inf, T, {})])


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SkipNetwork()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.net(x, timestep)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model() -> Quantized:
    torch.manual_seed(0)
    return quantized(Wrapped(), {"bits": 4}, {"bits": 8, "symmetric": False})


@pytest.fixture(scope="module")
def ranges(model: Quantized) -> dict[str, AttentionRange]:
    return attention_ranges(model.model, [(model.states, model.timesteps, {})])


@pytest.fixture(scope="module")
def folder(model: Quantized, ranges: dict[str, AttentionRange], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("attention") / "openvino"
    request = ExportRequest(model.model, SCHEDULER, model.layers, SHAPE, batch_size=2, attention=ranges)
    return export_model(request, place).path


def test_both_products_execute_in_int8_beside_every_layer(model: Quantized, folder: Path) -> None:
    executed = execution_precision(folder, model.layers)
    assert set(executed.attention.values()) <= {"i8", "u8"}
    assert list(executed.attention) == ["net"]
    assert executed.float_layers == ()
    parity = layer_parity(folder, model.layers, model.inputs)
    assert parity.layers_exact == parity.layers_checked == len(model.layers)


def test_a_folder_without_it_says_nothing_of_attention(model: Quantized, tmp_path: Path) -> None:
    assert execution_precision(model.export(tmp_path / "openvino"), model.layers).attention == {}


def test_the_graph_computes_what_pytorch_simulates(
    model: Quantized, ranges: dict[str, AttentionRange], folder: Path
) -> None:
    with torch.no_grad(), quantized_attention(model.model, ranges):
        wanted = model.model(model.states, model.timesteps).numpy()
    found = OVUNet2DModel.from_pretrained(folder, properties=F32).predict(model.states.numpy(), model.timesteps.numpy())
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_the_manifest_holds_the_ranges(ranges: dict[str, AttentionRange], folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {path: AttentionRange(**seen) for path, seen in manifest["attention"].items()} == ranges


def test_attention_under_a_mask_is_refused_before_anything_is_trained() -> None:
    """As PixArt's: its policy leaves attention in floating point."""
    refused = (
        r"quantization.attention: got int8; attention under a mask has no INT8 here: .*\.0\.attn2, .* and 25 "
        r"more; allowed float"
    )
    with pytest.raises(PlanError, match=refused):
        planned_shapes(
            load_policy(
                POLICIES / "w8a8-pixart.yaml", ["model.source=PixArt-XL-2-512x512", "quantization.attention=int8"]
            )
        )


def test_a_model_without_attention_has_nothing_to_refuse(tmp_path: Path) -> None:
    blocks = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (32,),
        "add_attention": False,
    }
    UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, **blocks).save_config(tmp_path)
    assert planned_shapes(load_policy(POLICIES / "w4a8.yaml", [f"model.source={tmp_path}"]))[1]
