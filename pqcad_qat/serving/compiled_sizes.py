"""A deployed denoiser compiled for each size of image that it is called with.

A graph is compiled for one batch and size, where OpenVINO is fastest and its results are proven. A folder of any size
is compiled anew for another size, and the last few sizes are kept (per_size.py).

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
from pqcad_qat.serving.denoiser_graphs import float_graph_on_disk, sized
from pqcad_qat.serving.deployed_folder import denoiser_part, graph_on_disk
from pqcad_qat.serving.graph_checks import check_graph
from pqcad_qat.serving.graph_inputs import SAMPLE, port_values, prediction
from pqcad_qat.serving.manifest import FLOAT_GRAPH
from pqcad_qat.serving.per_size import PerSize, SampleSizes, Size

Float32 = npt.NDArray[np.float32]
"""Array of float32."""

FULL_PRECISION: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
"""OpenVINO property of the graph: BF16 would round as coarsely as INT8."""


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


@dataclass(frozen=True)
class _Graphs:
    """The graphs of a deployed folder, and how they are compiled for a size.

    Attributes:
        folder: the deployed folder.
        manifest: its manifest.
        device: OpenVINO's name of the device.
        properties: OpenVINO properties that override the defaults.
        resized: whether the folder takes other sizes than its own.
        int8: the graph in INT8.
        full: the graph in full precision of the float steps; None without such steps.
    """

    folder: Path
    manifest: Mapping[str, Any]
    device: str
    properties: Mapping[str, Any]
    resized: bool
    int8: ov.Model
    full: ov.Model | None

    @property
    def channels(self) -> int:
        """Number of channels of a sample."""
        channels: int = self.manifest["sample_shape"][0]
        return channels

    def compiled(self, size: Size) -> CompiledDenoiser:
        """The denoiser for samples of this size."""
        manifest = {**self.manifest, "sample_shape": [self.channels, *size]}
        graph = self._sized(self.int8, manifest)
        made = compile_graph(graph, shared_core(), self.device, self.properties)
        ports = [port.get_names() for port in graph.inputs]
        return CompiledDenoiser(made, ports, Requests(made), self._in_float(manifest))

    def _in_float(self, manifest: Mapping[str, Any]) -> Requests | None:
        """What runs the graph of the float steps, for this manifest's size."""
        if self.full is None:
            return None
        of_full = {**manifest, "graph": f"{denoiser_part(manifest)}/{FLOAT_GRAPH}", "layers": {}}
        graph = self._sized(self.full, of_full)
        return Requests(compile_graph(graph, shared_core(), self.device, {**FULL_PRECISION, **self.properties}))

    def _sized(self, graph: ov.Model, manifest: Mapping[str, Any]) -> ov.Model:
        """The graph, or a copy for this manifest's size, after its check."""
        if self.resized:
            graph = sized(graph.clone(), manifest, self.folder / manifest["graph"])
        check_graph(graph, manifest, self.folder)
        return graph


class CompiledSizes:
    """The denoiser of a deployed folder, compiled for its own size and for others as they come; any number of threads
    may ask.

    The graphs are read once: what becomes of the files later does not matter.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        device: str,
        properties: Mapping[str, Any] | None,
        *,
        in_float: bool,
        sizes: SampleSizes,
    ) -> None:
        """Read, check and compile the folder's graphs.

        Args:
            folder: the deployed folder.
            manifest: its manifest.
            device: OpenVINO's name of the device.
            properties: OpenVINO properties that override the defaults.
            in_float: whether full precision computes some steps.
            sizes: the sizes that the folder takes.
        """
        self._sizes, core = sizes, shared_core()
        full = float_graph_on_disk(folder, manifest, core) if in_float else None
        int8 = graph_on_disk(folder, core)
        self._graphs = _Graphs(folder, manifest, device, properties or {}, sizes.free, int8, full)
        # not a method of this object, which would then hold itself: the graphs are freed as soon as it is dropped
        self._made = PerSize(self._graphs.compiled, sizes.own)
        self._made.at(sizes.own)

    @property
    def own(self) -> CompiledDenoiser:
        """The denoiser for the folder's own size."""
        return self._made.at(self._sizes.own)

    def at(self, shape: Sequence[int]) -> CompiledDenoiser:
        """The denoiser for samples of this shape (B, C, H, W).

        Raises:
            ModelError: the folder has no such samples, or OpenVINO cannot compile for them.
        """
        channels = self._graphs.channels
        fits = len(shape) == 4 and shape[1] == channels and shape[0] > 0
        if not fits or not self._sizes.take((shape[2], shape[3])):
            free = self._sizes.free
            sides = f"H and W multiples of {self._sizes.multiple}" if free else ""
            height, width = ("H", "W") if free else self._sizes.own
            allowed = f"(B, {channels}, {height}, {width}){f' with {sides}' if sides else ''}"
            raise ModelError(f"{self._graphs.folder}: samples: got shape {tuple(shape)}; allowed {allowed}")
        return self._made.at((shape[2], shape[3]))
