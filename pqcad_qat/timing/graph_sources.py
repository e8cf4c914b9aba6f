"""Reading what is timed: a graph's xml, or a deployed folder, at a batch.

Not here: compiling and calling it (latency.py, cold_start.py). A process that needs no torch reads by this file, so it
does not import it.
"""

from __future__ import annotations

from pathlib import Path

import openvino as ov

from pqcad_qat.errors import ModelError
from pqcad_qat.models.families.latent_rows import PLACES
from pqcad_qat.serving.compiled_graph import reason
from pqcad_qat.serving.denoiser_graphs import read_float_graph, read_graph
from pqcad_qat.serving.deployed_folder import MANIFEST
from pqcad_qat.serving.manifest import FLOAT_GRAPH


class FixedBatchError(ModelError):
    """A graph does not take the batch, because sizes that follow from its own batch are constants in it."""


def read_source(source: Path, core: ov.Core, batch: int | None = None) -> ov.Model:
    """Read a graph's xml, or a deployed folder with its weights unpacked as our runtime does.

    ``batch`` replaces the graph's own batch; None keeps it.

    Raises:
        ModelError: ``source`` is neither, or cannot be read.
        FixedBatchError: its graph does not take that batch.
    """
    if (source / MANIFEST).is_file():
        model = read_graph(source, core)
    elif source.name == FLOAT_GRAPH:
        model = read_float_graph(source.parent.parent, core)
    elif not source.is_file():
        raise ModelError(f"{source}: got no such file; allowed an OpenVINO model's xml or a deployed folder")
    else:
        try:
            model = core.read_model(source)
        except RuntimeError as error:
            raise ModelError(
                f"{source}: got a file that OpenVINO cannot read: {reason(error)}; "
                "allowed an OpenVINO model's xml or a deployed folder"
            ) from None
    if batch is not None:
        _set_batch(model, batch, source)
    return model


def _set_batch(model: ov.Model, batch: int, source: Path) -> None:
    """Give the graph's inputs this batch, where theirs is another; positions of rows have no batch.

    Raises:
        FixedBatchError: the graph does not take that batch.
    """
    shapes = {port: list(port.shape) for port in model.inputs if port.get_any_name() not in PLACES}
    if fixed := {shape[0] for shape in shapes.values()} - {batch}:
        try:
            model.reshape({port: [batch, *shape[1:]] for port, shape in shapes.items()})
        except RuntimeError:
            raise FixedBatchError(
                f"{source}: got a batch of {batch}; allowed {fixed.pop()}, which is fixed in its graph"
            ) from None
