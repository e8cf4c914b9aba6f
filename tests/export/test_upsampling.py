"""Convolutions of an upsampled image, computed before it is upsampled: the same integers from half the products."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F
from deployed_fixture import Quantized, quantized
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from vnni_here import VNNI

from pqcad_qat.export.execution import execution_precision
from pqcad_qat.export.proof import layer_parity
from pqcad_qat.export.traceable_modules import needs_vnni
from pqcad_qat.serving.denoiser_graphs import read_graph
from pqcad_qat.serving.runtime import OVUNet2DModel

W4, A8 = {"bits": 4}, {"bits": 8, "symmetric": False}


class Enlarging(nn.Module):
    """diffusers' own upsampling between two convolutions, and back to the size it came in."""

    def __init__(self, mode: str = "nearest", factor: int = 2, kernel: int = 3, **settings: Any) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 8, 3, padding=1)
        self.upsampler = Upsample2D(
            8, use_conv=True, out_channels=6, kernel_size=kernel, padding=kernel // 2, **settings
        )
        self.conv_out = nn.Conv2d(6, 1, 3, stride=2, padding=1)
        self.time = nn.Linear(1, 8)
        self.mode, self.factor = mode, factor

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.conv_in(x) + self.time(timestep[:, None] / 1000)[:, :, None, None]
        if (self.mode, self.factor) == ("nearest", 2):
            h = self.upsampler(h)
        else:
            h = self.upsampler.conv(F.interpolate(h, scale_factor=float(self.factor), mode=self.mode))
        y: Tensor = F.interpolate(self.conv_out(h), size=x.shape[2:])
        return y


def enlarging(weights: dict[str, Any], inputs: dict[str, Any], **settings: Any) -> Quantized:
    torch.manual_seed(0)
    return quantized(Enlarging(**settings), weights, inputs)


def kinds(folder: Path) -> Counter[str]:
    return Counter(node.get_type_name() for node in read_graph(folder, ov.Core()).get_ops())


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        (W4, A8),
        ({"bits": 4, "symmetric": False}, {"bits": 8, "symmetric": True, "signed": True}),
        ({"bits": 5, "granularity": "per_tensor"}, {"bits": 7, "symmetric": False}),
        ({"bits": 2}, {"bits": 6, "symmetric": True, "signed": True}),
    ],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_gives_pytorchs_integers_in_int8(
    weights: dict[str, Any], inputs: dict[str, Any], bias: bool, tmp_path: Path
) -> None:
    model = enlarging(weights, inputs, bias=bias)
    folder = model.export(tmp_path / "openvino")
    found = kinds(folder)
    assert (found["DepthToSpace"], found["Interpolate"]) == (1, 1), (
        "upsampling became phases; going back to the size did not"
    )
    assert execution_precision(folder, model.layers).float_layers == ()
    parity = layer_parity(folder, model.layers, model.inputs)
    assert parity.layers_exact == parity.layers_checked == 4


@pytest.mark.parametrize("weights", ["int8", "packed"])
def test_weights_on_disk_are_the_layers_own(weights: Any, tmp_path: Path) -> None:
    model = enlarging({"bits": 3}, A8)
    folder = model.export(tmp_path / "openvino", weights)
    constants = [
        node for node in read_graph(folder, ov.Core()).get_ops() if list(node.get_output_shape(0)) == [6, 8, 3, 3]
    ]
    own = [node.get_data() for node in constants if node.get_type_name() == "Constant"]
    assert [array.dtype for array in own] == [np.int8]
    np.testing.assert_array_equal(own[0], model.layers["upsampler.conv"].weight_int)
    assert layer_parity(folder, model.layers, model.inputs).layers_exact == 4


@pytest.mark.parametrize(
    ("weights", "settings"),
    [
        pytest.param({"bits": 8}, {}, id="sums that no CPU without VNNI adds up exactly"),
        pytest.param(W4, {"mode": "bilinear"}, id="other pixels than copies"),
        pytest.param(W4, {"factor": 3}, id="threefold"),
        pytest.param(W4, {"kernel": 5}, id="a larger kernel"),
    ],
)
def test_another_convolution_stays(weights: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    model = enlarging(weights, A8, **settings)
    folder = model.export(tmp_path / "openvino")
    found = kinds(folder)
    assert (found["DepthToSpace"], found["Interpolate"]) == (0, 2)
    needing = {name for name, layer in model.layers.items() if needs_vnni(layer)}
    parity = layer_parity(folder, model.layers, model.inputs)
    assert {layer.name for layer in parity.layers if not layer.exact} <= (set() if VNNI else needing)


def test_any_batch_is_predicted_as_in_pytorch(tmp_path: Path) -> None:
    model = enlarging(W4, A8)
    deployed = OVUNet2DModel.from_pretrained(
        model.export(tmp_path / "openvino"), properties={"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = deployed.predict(model.states.numpy(), model.timesteps.numpy())
    np.testing.assert_allclose(found, model.prediction, atol=0.02 * np.abs(model.prediction).max())
