"""Group normalization as sums that take any layout: the same values, also beside BF16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F
from rewritten_graph import F32, A, B, Function, rewritten
from torch import Tensor, nn

from pqcad_qat.export.graph_rewrites import rewrite
from pqcad_qat.serving.packing import read_text_and_weights, write_graph

GAMMA, BETA = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("space", [(4, 5), (20,), (2, 2, 5)], ids=str)
def test_groups_of_channels_are_normalized_by_sums(groups: int, space: tuple[int, ...]) -> None:
    kinds = rewritten(lambda a, b: F.group_norm(b.reshape(2, 6, *space), groups, GAMMA, BETA, 1e-3), A, 3 * B + 2)
    assert (kinds["GroupNormalization"], kinds["ReduceMean"], kinds["ReduceL2"]) == (0, 2, 2)


def test_a_normalization_with_computed_gains_stays() -> None:
    assert rewritten(lambda a, b: F.group_norm(b, 2, GAMMA * a.mean(), BETA), A, B)["GroupNormalization"] == 1


@pytest.mark.parametrize(("turned", "transposes"), [(True, 1), (False, 0)])
def test_rows_of_pixels_are_normalized_as_the_image(turned: bool, transposes: int) -> None:
    """As diffusers' attention does it: x.view(B, C, H * W).transpose(1, 2), turned for the normalization and turned
    again.
    """

    def attention(_: Tensor, b: Tensor) -> Tensor:
        rows = F.group_norm(b.flatten(2).transpose(1, 2).transpose(1, 2), 2, GAMMA, BETA)
        return rows.transpose(1, 2) * 2 if turned else rows * 2

    kinds = rewritten(attention, A, 3 * B + 2)
    assert (kinds["GroupNormalization"], kinds["Transpose"]) == (0, transposes)


def test_a_rewritten_normalization_takes_another_batch() -> None:
    graph = ov.convert_model(Function(lambda a, b: F.group_norm(b, 2, GAMMA, BETA) + a.mean()), example_input=(A, B))
    graph.reshape({0: list(A.shape), 1: list(B.shape)})
    rewrite(graph)
    graph.reshape({0: list(A.shape), 1: [5, *B.shape[1:]]})
    more = torch.randn(5, *B.shape[1:], generator=torch.Generator().manual_seed(2))
    found = ov.compile_model(graph, "CPU", F32)([np.zeros(A.shape, np.float32), more.numpy()])[0]
    np.testing.assert_allclose(found, F.group_norm(more, 2, GAMMA, BETA).numpy(), rtol=1e-5, atol=1e-6)


class Normalized(nn.Module):
    """A normalization between convolutions, of values around a mean: OpenVINO computes it in BF16 with them."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.norm = nn.GroupNorm(8, 64).requires_grad_(False)
        self.register_buffer("weights", torch.randn(64, 64, 3, 3, generator=generator) / 24)
        self.register_buffer("bias", torch.full((64,), mean))
        self.register_buffer("same", torch.eye(64)[:, :, None, None])
        self.register_buffer("example", torch.randn(1, 64, 16, 16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.norm(F.conv2d(x, self.weights, self.bias, padding=1)), self.same)


@pytest.mark.skipif(
    "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="a CPU without BF16"
)
@pytest.mark.parametrize("mean", [0.0, 3.0, 10.0])
def test_statistics_of_a_normalization_stay_in_float32_beside_bf16(mean: float, tmp_path: Path) -> None:
    """From the file, as close as OpenVINO's own; squares rounded to BF16 would be 4 and 10 times as far off at means of
    3 and 10.
    """
    model = Normalized(mean)
    wanted, errors = model(model.example).numpy(), []
    own = ov.convert_model(model, example_input=(model.example,))
    own.reshape(list(model.example.shape))
    rewrite(ours := own.clone())
    for name, graph in (("own", own), ("ours", ours)):
        write_graph(graph, xml := tmp_path / f"{name}.xml")
        shipped = read_text_and_weights(xml, xml.with_suffix(".bin"), ov.Core())
        compiled = ov.compile_model(shipped, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        errors.append(float(np.sqrt(np.mean((compiled([model.example.numpy()])[0] - wanted) ** 2))))
    assert 0 < errors[1] < 1.5 * errors[0]
