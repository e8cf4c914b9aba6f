"""A deployed denoiser compiled for each size of image that it is called with.

A graph is compiled for one batch and size, where OpenVINO is fastest and its results are proven. A folder of any size
is compiled anew for another size, once.

Not here: the calls (runtime.py), and how a graph gets a size (denoiser_graphs.py). Needs openvino and numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from pqcad_qat.errors import ModelError
from pqcad_qat.serving.compiled_graph import Requests, compile_graph, shared_core
from pqcad_qat.serving.denoiser_graphs import read_graph
from pqcad_qat.serving.float_steps import float_requests
from pqcad_qat.serving.graph_checks import check_graph
from pqcad_qat.serving.graph_inputs import SAMPLE, port_values, prediction
from pqcad_qat.serving.per_size import PerSize, Size

Float32 = npt.NDArray[np.float32]
"""Array of float32."""


@dataclass(frozen=True)
class CompiledDenoiser:
    """A denoiser for one batch and size.

    Attributes:
        compiled: its graph.
        ports: all names of each input.
        requests: what runs the graph.
        in_float: what runs the graph of the float steps; None without such steps.
    """

    compiled: ov.CompiledModel
    ports: Sequence[set[str]]
    requests: Requests
    in_float: Requests | None

    def infer(self, inputs: Mapping[str, npt.NDArray[Any]], *, in_float: bool = False) -> Float32:
        """Predictions (B, C, H, W) for a whole batch, by the INT8 graph or by full precision."""
        requests = self.in_float if in_float else self.requests
        assert requests is not None
        _, _, height, width = inputs[SAMPLE].shape
        return prediction(requests.infer(port_values(self.ports, inputs), [0])[0], height, width)


class CompiledSizes:
    """The denoiser of a deployed folder, compiled for its own size and for others as they come; any number of threads
    may ask.

    Attributes:
        own: the denoiser for the folder's own size.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        device: str,
        properties: Mapping[str, Any] | None,
        *,
        in_float: bool,
    ) -> None:
        """Read, check and compile the folder's graphs; with `in_float` that of its float steps, too."""
        self._folder, self._manifest, self._in_float = folder, manifest, in_float
        self._device, self._properties = device, properties
        self._others = PerSize(self._compile)
        self.own = self._compile(None)

    def at(self, shape: Sequence[int]) -> CompiledDenoiser:
        """The denoiser for samples of this shape (B, C, H, W).

        Raises:
            ModelError: the folder has no such samples, or OpenVINO cannot compile for them.
        """
        channels, *own = self._manifest["sample_shape"]
        if list(shape[1:]) == [channels, *own] and shape[0]:
            return self.own
        any_size = self._manifest.get("any_size", False)
        if not any_size or len(shape) != 4 or shape[1] != channels or not shape[0]:
            sides = "any height, any width" if any_size else ", ".join(map(str, own))
            raise ModelError(f"{self._folder}: samples: got shape {tuple(shape)}; allowed (B, {channels}, {sides})")
        return self._others.at((shape[2], shape[3]))

    def _compile(self, size: Size | None) -> CompiledDenoiser:
        core = shared_core()
        graph = read_graph(self._folder, core, size)
        height, width = size or self._manifest["sample_shape"][1:]
        own = {**self._manifest, "sample_shape": [self._manifest["sample_shape"][0], height, width]}
        check_graph(graph, own, self._folder)
        ports = [port.get_names() for port in graph.inputs]
        compiled = compile_graph(graph, core, self._device, self._properties)
        full = (
            float_requests(own, self._folder, core, device=self._device, properties=self._properties, size=size)
            if self._in_float
            else None
        )
        return CompiledDenoiser(compiled, ports, Requests(compiled), full)
