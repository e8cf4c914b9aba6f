"""Sinusoids of time in an exported graph: tables, since BF16 would round the time before they are taken of it.

Not here: the other modules that stand in while a model is traced (traceable_modules.py). Of whole time steps a table is
indexed by the step, of the continuous time of flow matching by the nearest time that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from pqcad_qat.errors import ExportError
from pqcad_qat.models.families.family import LARGEST_SIZE
from pqcad_qat.models.families.latent_rows import THOUSANDTHS
from pqcad_qat.models.families.own_module import OWN_MODULE
from pqcad_qat.models.families.table import family_of
from pqcad_qat.sampling.trajectory import NoiseSchedule

if TYPE_CHECKING:
    from pqcad_qat.quantization.quantized_layer import IntegerLayer

Times = int | Tensor
"""The times that a table knows: T for the whole numbers below it, or float32 (K,) rising."""

PARTS = 16
"""Known continuous times to a training step, beside those that the model was trained at: the fastest sine is then at
most 1/32 off.
"""

GUIDANCES = torch.arange(2001) / 20
"""The embedded guidance that a graph knows: of FLUX.1-dev, in steps of 0.05 up to 100."""


class TimestepTable(nn.Module):
    """A module of the time step alone, as a table of its outputs for the times that are known: time steps (B,) -> (B,
    D).

    OpenVINO computes outside the plan in BF16 where the CPU has it, and a BF16 time step of 999 is 1000: sines of it
    are wrong by up to 2 radians. A table is right in every precision. Where the layer that reads it is planned, the
    table holds the integers of that layer's input quantizer: a quarter of the size, and BF16 rounds nothing that the
    quantizer has not rounded already.

    A continuous time is compared with the middles between known ones, which OpenVINO does in float32 as long as it is
    the graph's own
    input: nothing may be computed of it before.
    """

    table: Tensor
    middles: Tensor | None

    def __init__(
        self, module: nn.Module, times: Times, reader: IntegerLayer | None = None, factor: float = 1.0
    ) -> None:
        """`factor` is what the model multiplies a time with before the module sees it."""
        super().__init__()
        known = times if isinstance(times, Tensor) else torch.arange(times)
        with torch.no_grad():
            values = module(known * factor if factor != 1.0 else known).float()
        self.scale = None if reader is None else float(reader.input_scale)
        self.zero_point = 0 if reader is None else float(reader.input_zero_point)
        if reader is not None:
            integers = torch.round(values / reader.input_scale + reader.input_zero_point).clamp(
                reader.input_low, reader.input_high
            )
            values = integers.to(torch.int8 if reader.input_low < 0 else torch.uint8)
        self.register_buffer("table", values)
        self.register_buffer("middles", (known[1:] + known[:-1])[:, None] / 2 if isinstance(times, Tensor) else None)

    def forward(self, timesteps: Tensor) -> Tensor:
        rows = timesteps if self.middles is None else (self.middles < timesteps).sum(dim=0)
        values = F.embedding(rows, self.table)
        return values if self.scale is None else (values.float() - self.zero_point) * self.scale


class TablesInTurn(nn.Module):
    """Stands where a model calls one module of several continuous inputs in turn, and looks up the graph's own instead.

    What the model computes of an input before, as Flux takes 1000 times a thousandth of it, is passed by.
    """

    def __init__(self, tables: Mapping[str, TimestepTable]) -> None:
        """`tables` are by the names of the graph's inputs, in the order of the calls."""
        super().__init__()
        self.tables = nn.ModuleDict(tables)
        self._waiting: list[tuple[str, Tensor]] = []

    def begin(self, inputs: Mapping[str, Tensor]) -> None:
        """The graph's inputs, before the model is called with them."""
        self._waiting = [(name, inputs[name]) for name in self.tables]

    def forward(self, _: Tensor) -> Tensor:
        if not self._waiting:
            raise ExportError(
                f"sinusoids are taken of more than {', '.join(self.tables)}, which no exported graph of "
                "continuous time does"
            )
        name, given = self._waiting.pop(0)
        found: Tensor = self.tables[name](given)
        return found


def known_times(schedule: NoiseSchedule, visited: Sequence[float] = ()) -> Times:
    """The times that a graph's tables know: every training step; of continuous time PARTS to a step, and those
    `visited` exactly.
    """
    if schedule.timestep_dtype == "int64":
        return schedule.train_timesteps
    even = torch.arange(schedule.train_timesteps * PARTS + 1) / PARTS
    found: Tensor = torch.unique(torch.cat([even, torch.tensor(visited, dtype=torch.float32)]))
    return found


def timestep_tables(
    model: nn.Module, times: Times, layers: Mapping[str, IntegerLayer], parts: int = 1
) -> dict[str, nn.Module]:
    """Every sinusoidal embedding of the model, by path, as a table: of the time step, of SDXL's sizes in pixels, of
    Flux's guidance.

    Args:
        times: that the tables of time steps know.
        layers: the planned layers, in integers; {} for a model in floating point.
        parts: of a training step that the graph's continuous time is given in: 1000 where it is given in thousandths.
    """
    found: dict[str, nn.Module] = {}
    if family_of(model) is OWN_MODULE:  # a module of the user's own may take sinusoids of anything: see time_path.py
        return found
    config = getattr(model, "config", {})
    shared = config.get("class_embed_type") == "timestep"  # class labels go through it too
    for path, module in model.named_modules():
        if path == "add_time_proj":
            found[path] = TimestepTable(module, LARGEST_SIZE + 1)
        elif path == "time_proj" or isinstance(module, Timesteps):
            scope = path.removesuffix("time_proj")
            readers = [layers.get(f"{scope}{name}.linear_1") for name in ("time_embedding", "timestep_embedder")]
            reader = None if shared else next((layer for layer in readers if layer is not None), None)
            table = (
                TimestepTable(module, times / parts, reader, parts)
                if isinstance(times, Tensor)
                else TimestepTable(module, times, reader)
            )
            if isinstance(times, Tensor):
                tables = {"timestep": table}
                if config.get("guidance_embeds"):
                    guidance = layers.get(f"{scope}guidance_embedder.linear_1")
                    tables["guidance"] = TimestepTable(module, GUIDANCES, guidance, THOUSANDTHS)
                found[path] = TablesInTurn(tables)
            else:
                found[path] = table
    return found
