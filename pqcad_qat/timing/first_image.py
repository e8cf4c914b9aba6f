"""What a process of its own does for cold_start.py: it loads a denoiser, makes an image, and measures itself.

It has OpenVINO, numpy, and this package's files for reading a folder, and imports nothing else, since that would count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pqcad_qat.machine.memory import peak_resident
from pqcad_qat.serving.compiled_graph import compile_graph, shared_core
from pqcad_qat.serving.deployed_folder import MANIFEST, read_manifest
from pqcad_qat.serving.graph_inputs import port_values
from pqcad_qat.timing.graph_sources import read_source

INPUTS, RESULT = "inputs.npz", "result.json"
"""Names of the files with the inputs of a call, and with what was measured."""


def first_image(begun: float, folder: str, graphs: Sequence[tuple[str, Mapping[str, str], int]]) -> None:
    """In the new process: load, make one image, and write the seconds since `begun`, by the system's clock."""
    inputs = dict(np.load(Path(folder) / INPUTS))
    core, loaded = shared_core(), []
    for source, properties, count in graphs:
        if (Path(source) / MANIFEST).is_file():
            read_manifest(Path(source))  # compares every file with its checksum, as our runtime does
        compiled = compile_graph(read_source(Path(source), core, len(inputs["sample"])), core, properties=properties)
        named = port_values([port.get_names() for port in compiled.inputs], inputs)
        loaded.append((compiled.create_infer_request(), named, count))
    for request, named, count in loaded:
        for _ in range(count):
            request.infer(named, share_inputs=True)
    measured = {"seconds": time.time() - begun, "peak_bytes": peak_resident()}
    (Path(folder) / RESULT).write_text(json.dumps(measured), encoding="utf-8")
