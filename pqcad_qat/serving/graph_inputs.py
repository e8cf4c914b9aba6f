"""What a deployed graph is given, by the names and in the layout of its class: a UNet's sample, a transformer's states,
Flux's patches.

Not here: who calls it (runtime.py), or how it came to have such ports (export_model.py). Needs numpy. Names and layouts
are optimum-intel's, which are those of diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pqcad_qat.models.families.family import TEXT, Family
from pqcad_qat.models.families.latent_rows import (
    PLACES,
    THOUSANDTHS,
    packed,
    places,
    rows_shape,
    text_places,
    unpacked,
)

Float32 = npt.NDArray[np.float32]

SAMPLE, STATES, TIME = "sample", "hidden_states", "timestep"
"""The port of x_t in a UNet's graph and in a transformer's; and that of t."""


def ports_of(family: Family, conditions: Collection[str]) -> tuple[str, ...]:
    """The inputs of an exported graph of this family, in order.

    The places of rows hold nothing that the graph does not know, since it has one size.
    """
    states = STATES if family.part == "transformer" else SAMPLE
    return (states, TIME, *conditions, *(PLACES if family.takes_rows else ()))


def spelled(ports: Sequence[Collection[str]], given: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a graph that has these ports, in their order.

    Args:
        ports: the names of each; a compiled graph has some of the inside's among them.
        given: `sample` (B, C, H, W), `timestep` (B,), and the conditions (B, ...), by name.
    """
    inputs = dict(given)
    known = set().union(*ports)
    if SAMPLE not in known:
        inputs[STATES] = inputs.pop(SAMPLE)
    if PLACES[0] in known:
        _, _, height, width = inputs[STATES].shape
        inputs |= {
            STATES: np.ascontiguousarray(packed(inputs[STATES])),
            TIME: np.asarray(inputs[TIME], np.float32) / np.float32(THOUSANDTHS),
            PLACES[0]: places(height, width),
            PLACES[1]: text_places(inputs[TEXT].shape[1]),
        }
    return {name: inputs[name] for names in ports for name in names if name in inputs}


def expected_ports(
    known: Collection[str],
    batch: int,
    sample_shape: Sequence[int],
    time: str,
    *,
    conditions: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[list[int], str]]:
    """Name of a port -> its shape and dtype, in a graph that knows these names, for a batch of samples and their
    conditions.
    """
    expected = {condition["name"]: ([batch, *condition["shape"]], condition["dtype"]) for condition in conditions}
    expected[TIME] = ([batch], time)
    if PLACES[0] in known:
        tokens = next(
            (condition["shape"][0] for condition in conditions if condition["name"] == TEXT and condition["shape"]), 0
        )
        channels, height, width = sample_shape
        rows, width_of_row = rows_shape(channels, height, width)
        return expected | {
            STATES: ([batch, rows, width_of_row], "float32"),
            PLACES[0]: ([rows, 3], "float32"),
            PLACES[1]: ([tokens, 3], "float32"),
        }
    return expected | {SAMPLE if SAMPLE in known else STATES: ([batch, *sample_shape], "float32")}


def prediction(output: Float32, height: int, width: int) -> Float32:
    """A graph's output as (B, C, H, W)."""
    return output if output.ndim == 4 else unpacked(output, height, width)
