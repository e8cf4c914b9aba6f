"""The graphs of a deployed folder's denoiser, read from disk and given the batch and size that they run at.

Not here: the folder's other files (deployed_folder.py), and running a graph (compiled_sizes.py). Needs openvino and
numpy.
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


def read_graph(folder: Path, core: ov.Core) -> ov.Model:
    """The graph that the manifest names, at the manifest's batch and size, with every packed weight unpacked to int8.

    The graph is the same, bit for bit, whatever its format on disk.

    Raises:
        ModelError: the manifest is not valid, or OpenVINO cannot read the files.
    """
    manifest = unverified_manifest(folder)
    return _at_own_size(graph_on_disk(folder, core), manifest, folder / manifest["graph"])


def sized(graph: ov.Model, manifest: Mapping[str, Any], path: Path) -> ov.Model:
    """Give a graph of any size the batch and size of this manifest, and return it.

    Raises:
        ModelError: it does not take them; `path` names its file.
    """
    try:
        names = [port.get_names() for port in graph.inputs]
        expected = expected_ports(
            set().union(*names),
            manifest["batch_size"],
            manifest["sample_shape"],
            manifest.get("timestep_dtype", "int64"),
            conditions=manifest.get("conditions", ()),
        )
        ports = zip(graph.inputs, names, strict=True)
        graph.reshape({port: expected[name][0] for port, known in ports for name in known & expected.keys()})
    except UNREADABLE as error:
        sides = "x".join(map(str, manifest["sample_shape"][1:]))
        raise ModelError(
            f"{path}: got latents of {sides}: {reason(error)}; allowed sides that the network takes, within its table "
            "of positions where it has one"
        ) from error
    return graph


def float_graph(folder: Path) -> Path | None:
    """Path of the full-precision graph of a deployed folder; None where it has no float steps."""
    manifest = unverified_manifest(folder)
    return None if manifest.get("float_start") is None else folder / denoiser_part(manifest) / FLOAT_GRAPH


def read_float_graph(folder: Path, core: ov.Core) -> ov.Model:
    """The full-precision graph of a folder with float steps, at the manifest's batch and size.

    Raises:
        ModelError: as `read_graph`.
    """
    manifest = unverified_manifest(folder)
    graph = float_graph_on_disk(folder, manifest, core)
    return _at_own_size(graph, manifest, folder / denoiser_part(manifest) / FLOAT_GRAPH)


def _at_own_size(graph: ov.Model, manifest: Mapping[str, Any], path: Path) -> ov.Model:
    return sized(graph, manifest, path) if manifest.get("any_size", False) else graph


def float_graph_on_disk(folder: Path, manifest: Mapping[str, Any], core: ov.Core) -> ov.Model:
    """The full-precision graph of a folder with float steps, for the batch and size on disk, which may be any.

    Raises:
        ModelError: OpenVINO cannot read the files.
    """
    part = folder / denoiser_part(manifest)
    return read_text_and_weights(part / FLOAT_GRAPH, part / FLOAT_WEIGHTS, core)
