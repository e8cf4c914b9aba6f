"""Which planned layers of a deployed folder execute in INT8, as OpenVINO's runtime model of any compiled graph says.

It needs nothing of this package, so that it runs where other runtimes alone are installed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

PRODUCTS = ("Convolution", "FullyConnected")
"""Types of nodes that compute a layer's product."""


def int8_layers(compiled: Any, planned: Collection[str]) -> set[str]:
    """Paths of the planned layers of which a product executes in INT8."""
    names: set[str] = set()
    for node in compiled.get_runtime_model().get_ops():
        info = {key: str(getattr(value, "value", value)) for key, value in dict(node.get_rt_info().items()).items()}
        if info["layerType"] in PRODUCTS and info["runtimePrecision"] in ("i8", "u8"):
            names |= {name.removeprefix("layer.").partition("/")[0] for name in info["originalLayersNames"].split(",")}
    return names & set(planned)
