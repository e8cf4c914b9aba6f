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

Float32 = npt.NDArray[np.float32]

SAMPLE, STATES, TIME = "sample", "hidden_states", "timestep"
"""The port of x_t in a UNet's graph and in a transformer's; and that of t."""

PLACES = ("img_ids", "txt_ids")
"""Ports of Flux's graph alone: (H/2 W/2, 3) and (tokens, 3). They hold nothing that the graph does not know: it has one
size.
"""

THOUSANDTHS = 1000
"""Of Flux time is given in them."""

TEXT = "encoder_hidden_states"


def ports_of(transformer: bool, packed: bool, conditions: Collection[str]) -> tuple[str, ...]:
    """The inputs of an exported graph, in order: of a UNet or a transformer, whose states its pipeline packs or not."""
    return (STATES if transformer else SAMPLE, TIME, *conditions, *(PLACES if packed else ()))


def spelled(ports: Sequence[Collection[str]], given: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a graph that has these ports, in their order.

    Args:
        ports: the names of each; a compiled graph has some of the inside's among them.
        given: `sample` (B, C, H, W), `timestep` (B,), and the conditions (B, ...), by name.
    """
    found = dict(given)
    known = set().union(*ports)
    if SAMPLE not in known:
        found[STATES] = found.pop(SAMPLE)
    if PLACES[0] in known:
        _, _, height, width = found[STATES].shape
        found |= {
            STATES: packed(found[STATES]),
            TIME: np.asarray(found[TIME], np.float32) / np.float32(THOUSANDTHS),
            PLACES[0]: places(height, width),
            PLACES[1]: np.zeros((found[TEXT].shape[1], 3), np.float32),
        }
    return {name: found[name] for names in ports for name in names if name in found}


def expected_ports(
    known: Collection[str], batch: int, sample_shape: Sequence[int], time: str, conditions: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[list[int], str]]:
    """Name of a port -> its shape and dtype, in a graph that knows these names, for a batch of samples and their
    conditions.
    """
    channels, height, width = sample_shape
    found = {condition["name"]: ([batch, *condition["shape"]], condition["dtype"]) for condition in conditions}
    found[TIME] = ([batch], time)
    rows = [height // 2 * (width // 2), 4 * channels]
    if PLACES[0] in known:
        tokens = next(
            (condition["shape"][0] for condition in conditions if condition["name"] == TEXT and condition["shape"]), 0
        )
        return found | {
            STATES: ([batch, *rows], "float32"),
            PLACES[0]: ([rows[0], 3], "float32"),
            PLACES[1]: ([tokens, 3], "float32"),
        }
    return found | {SAMPLE if SAMPLE in known else STATES: ([batch, *sample_shape], "float32")}


def prediction(output: Float32, height: int, width: int) -> Float32:
    """A graph's output as (B, C, H, W)."""
    return output if output.ndim == 4 else unpacked(output, height, width)


def packed(x: Float32) -> Float32:
    """(B, C, H, W) -> (B, H/2 W/2, 4C), as FluxPipeline lays latents out."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(patches.reshape(batch, height // 2 * (width // 2), 4 * channels))


def unpacked(rows: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[Any]:
    """(B, H/2 W/2, 4C) -> (B, C, H, W): the inverse of `packed`."""
    batch, _, channels = rows.shape
    patches = rows.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def places(height: int, width: int) -> Float32:
    """(H/2 W/2, 3): row and column of every patch of latents (H, W), behind a zero."""
    rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.float32)
