"""Inputs of a deployed graph, in the names and layout of the denoiser's class.

A UNet takes a sample, a transformer takes hidden states, and Flux takes rows of patches. Names and layouts are those of
optimum-intel, which follow diffusers' pipelines.

Not here: who calls the graph (runtime.py), and how it gets these ports (export_model.py). Needs numpy.
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
"""Array of float32."""

SAMPLE, STATES, TIME = "sample", "hidden_states", "timestep"
"""Names of ports: x_t in a UNet's graph, x_t in a transformer's graph, and t."""


def ports_of(family: Family, conditions: Collection[str]) -> tuple[str, ...]:
    """The inputs of an exported graph of this family, in order.

    In a graph of one size, the positions of rows are inputs only to match diffusers' signature: it knows them already.
    """
    states = STATES if family.part == "transformer" else SAMPLE
    return (states, TIME, *conditions, *(PLACES if family.takes_rows else ()))


def port_values(
    ports: Sequence[Collection[str]], values: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a graph with these ports, in the order of the ports.

    Args:
        ports: all names of each port; in a compiled graph, some of them are internal.
        values: `sample` (B, C, H, W), `timestep` (B,), and the conditions (B, ...), by name.
    """
    inputs = dict(values)
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
    """Shape and dtype of each port, by name, for a batch of samples and their conditions.

    Args:
        known: names of the graph's ports; they decide between sample, hidden states and rows.
        batch: number of samples.
        sample_shape: shape (C, H, W) of one sample.
        time: dtype of the time.
        conditions: the manifest's conditions.
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


def free_shape(port: str, shape: Sequence[int]) -> list[int]:
    """The shape of a port in a graph for any batch, height and width; -1 stands for any size.

    The number of text tokens stays as it is.
    """
    if port == PLACES[1]:
        return list(shape)
    if port in (SAMPLE, STATES):
        return [-1, shape[1], -1, -1] if len(shape) == 4 else [-1, -1, shape[2]]
    return [-1, *shape[1:]]


def prediction(output: Float32, height: int, width: int) -> Float32:
    """A graph's output as (B, C, H, W), unpacked from rows where necessary."""
    return output if output.ndim == 4 else unpacked(output, height, width)
