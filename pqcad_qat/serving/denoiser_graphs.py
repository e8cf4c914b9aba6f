"""The graphs of a deployed folder's denoiser, read from disk and given the batch and size that they run at.

Not here: the folder's other files (deployed_folder.py), and running a graph (runtime.py). Needs openvino and numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openvino as ov

from pqcad_qat.errors import ModelError
from pqcad_qat.serving.compiled_graph import reason
from pqcad_qat.serving.deployed_folder import denoiser_part, graph_on_disk, unverified_manifest
from pqcad_qat.serving.graph_inputs import expected_ports
from pqcad_qat.serving.manifest import FLOAT_GRAPH, FLOAT_WEIGHTS
from pqcad_qat.serving.packing import UNREADABLE, read_text_and_weights
from pqcad_qat.serving.per_size import Size


def read_graph(folder: Path, core: ov.Core, size: Size | None = None) -> ov.Model:
    """The graph that the manifest names, at the manifest's batch, with every packed weight unpacked to int8.

    The graph is the same, bit for bit, whatever its format on disk.

    Args:
        folder: the deployed folder.
        core: the core that reads it.
        size: height and width of x_t, for a folder of any size; None takes the manifest's.

    Raises:
        ModelError: the manifest is not valid, or OpenVINO cannot read the files, or the graph does not take the size.
    """
    manifest, graph = unverified_manifest(folder), graph_on_disk(folder, core)
    if manifest.get("any_size", False):
        _set_size(graph, manifest, folder / manifest["graph"], size)
    return graph


def _set_size(graph: ov.Model, manifest: Mapping[str, Any], path: Path, size: Size | None) -> None:
    """Give the inputs of a graph the manifest's batch, and this size."""
    channels, *own = manifest["sample_shape"]
    sides = own if size is None else size
    try:
        names = [port.get_names() for port in graph.inputs]
        expected = expected_ports(
            set().union(*names),
            manifest["batch_size"],
            (channels, *sides),
            manifest.get("timestep_dtype", "int64"),
            conditions=manifest.get("conditions", ()),
        )
        graph.reshape(
            {
                port: expected[name][0]
                for port, known in zip(graph.inputs, names, strict=True)
                for name in known & expected.keys()
            }
        )
    except UNREADABLE as error:
        raise ModelError(
            f"{path}: got latents of {'x'.join(map(str, sides))}, which its graph does not take: {reason(error)}; "
            "allowed sides that its levels can halve, within its table of positions where it has one"
        ) from error


def float_graph(folder: Path) -> Path | None:
    """Path of the full-precision graph of a deployed folder; None where it has no float steps."""
    manifest = unverified_manifest(folder)
    return None if manifest.get("float_start") is None else folder / denoiser_part(manifest) / FLOAT_GRAPH


def read_float_graph(folder: Path, manifest: Mapping[str, Any], core: ov.Core, size: Size | None = None) -> ov.Model:
    """The full-precision graph of a folder with float steps; the arguments are those of `read_graph`.

    Raises:
        ModelError: as `read_graph`.
    """
    part = folder / denoiser_part(manifest)
    graph = read_text_and_weights(part / FLOAT_GRAPH, part / FLOAT_WEIGHTS, core)
    if size is not None:
        _set_size(graph, manifest, part / FLOAT_GRAPH, size)
    return graph
