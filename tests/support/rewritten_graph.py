"""A function converted to a graph and rewritten, compared with its result in PyTorch: for the tests of rewrites.

Not here: any test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from pqcad_qat.export.graph_rewrites import rewrite

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


def rewritten(function: Callable[..., Tensor], a: Tensor, b: Tensor) -> Counter[str]:
    """Count the kinds of nodes after the rewrite, and check that the result equals PyTorch's."""
    graph = ov.convert_model(Function(function), example_input=(a, b))
    graph.reshape({0: list(a.shape), 1: list(b.shape)})
    rewrite(graph)
    found = ov.compile_model(graph, "CPU", F32)([a.numpy(), b.numpy()])[0]
    np.testing.assert_allclose(found, function(a, b).numpy(), rtol=1e-5, atol=1e-6)
    return Counter(node.get_type_name() for node in graph.get_ops())


A, B = (
    torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)),
    torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(1)),
)
