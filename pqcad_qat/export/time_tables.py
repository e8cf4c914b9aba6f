"""Time embeddings of an exported graph as look-up tables of sinusoids, because BF16 rounds the time too coarsely.

Method: the sinusoids of every known time are computed in advance, in float32. A table of whole time steps is indexed by
the step. A table of the continuous time of flow matching is indexed by the nearest time that it knows.

Not here: the other modules that stand in while a model is traced (traceable_modules.py).
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
from pqcad_qat.models.families.plain_module import OWN_MODULE
from pqcad_qat.models.families.table import family_of
from pqcad_qat.sampling.trajectory import NoiseSchedule

if TYPE_CHECKING:
    from pqcad_qat.quantization.integer_layer import IntegerLayer

Times = int | Tensor
"""Times that a table knows: T for the whole numbers 0 to T - 1, or an ascending float32 tensor (K,)."""

TIMES_PER_STEP = 16
"""Number of known continuous times in a training step, besides the times that the model is trained at. The argument of
the fastest sine is then off by 1/32 at most.
"""

GUIDANCES = torch.arange(2001) / 20
"""Embedded guidance scales that a graph knows: for FLUX.1-dev, from 0 to 100 in steps of 0.05."""


class TimestepTable(nn.Module):
    """A module that depends on the time step alone, as a table of its outputs: time steps (B,) -> (B, D).

    Outside the plan OpenVINO computes in BF16 where the CPU supports it. BF16 rounds time step 999 to 1000, which
    changes its sines by up to 2 radians; a table is right in every precision. Where the layer that reads the table is
    planned, the table holds the integers of that layer's input quantizer. It then takes a quarter of the memory, and
    BF16 rounds nothing that the quantizer has not rounded already.

    For a continuous time, the row is the number of midpoints between neighbouring known times that lie below it.
    OpenVINO compares in float32 as long as the time is the graph's own input, so nothing may be computed from the time
    before the comparison.

    Attributes:
        table: the outputs, one row for each known time; integers where a planned layer reads them.
        middles: the midpoints (K - 1, 1) of a continuous time; None for whole time steps.
    """

    table: Tensor
    middles: Tensor | None

    def __init__(
        self, module: nn.Module, times: Times, reader: IntegerLayer | None = None, factor: float = 1.0
    ) -> None:
        """Tabulate `module` at `times`, each multiplied by `factor`.

        Args:
            module: the embedding, (K,) -> (K, D).
            times: the times that the table knows.
            reader: the planned layer that reads the output; None leaves the table in float32.
            factor: number by which the model multiplies a time before the module reads it.
        """
        super().__init__()
        if reader is not None and reader.input_factors is not None:
            reader = None  # its input is multiplied before the quantizer
        known = times if isinstance(times, Tensor) else torch.arange(times)
        with torch.no_grad():
            values = module(known * factor if factor != 1.0 else known).float()
        self.scale = None if reader is None else float(reader.input_scale)
        self.zero_point = 0 if reader is None else float(reader.input_zero_point)
        if reader is not None:
            # the same rounding as in the reader's quantizer, done once for each known time
            integers = torch.round(values / reader.input_scale + reader.input_zero_point).clamp(
                reader.input_low, reader.input_high
            )
            values = integers.to(torch.int8 if reader.input_low < 0 else torch.uint8)
        self.register_buffer("table", values)
        self.register_buffer("middles", (known[1:] + known[:-1])[:, None] / 2 if isinstance(times, Tensor) else None)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Look up the rows of these times; integers are dequantized by the reader's scale."""
        # the number of midpoints below a time is the index of the nearest known time
        rows = timesteps.long() if self.middles is None else (self.middles < timesteps).sum(dim=0)
        values = F.embedding(rows, self.table)
        return values if self.scale is None else (values.float() - self.zero_point) * self.scale


class TablesInTurn(nn.Module):
    """A stand-in for one module that a model calls with several continuous inputs in turn.

    Each call looks up the graph's own input in that input's table. The value that the call passes is ignored, because
    the model has computed it from the input: Flux, for example, multiplies the time that it gets by 1000.
    """

    def __init__(self, tables: Mapping[str, TimestepTable]) -> None:
        """Take the tables by name of the graph's input, in the order of the calls."""
        super().__init__()
        self.tables = nn.ModuleDict(tables)
        self._waiting: list[tuple[str, Tensor]] = []

    def begin(self, inputs: Mapping[str, Tensor]) -> None:
        """Store the graph's inputs, just before the model is called with them."""
        self._waiting = [(name, inputs[name]) for name in self.tables]

    def forward(self, _: Tensor) -> Tensor:
        """Look up the input whose turn it is.

        Raises:
            ExportError: the model calls the module more often than there are tables.
        """
        if not self._waiting:
            raise ExportError(
                f"sinusoids in a graph of continuous time: got more calls than inputs; allowed one call for each of "
                f"{', '.join(self.tables)}"
            )
        name, value = self._waiting.pop(0)
        embedding: Tensor = self.tables[name](value)
        return embedding


def known_times(schedule: NoiseSchedule, visited: Sequence[float] = ()) -> Times:
    """The times that a graph's tables know.

    For a schedule of whole time steps these are all training steps. For continuous time there are TIMES_PER_STEP in a
    training step, plus every time of `visited` exactly.
    """
    if schedule.timestep_dtype == "int64":
        return schedule.train_timesteps
    even = torch.arange(schedule.train_timesteps * TIMES_PER_STEP + 1) / TIMES_PER_STEP
    times: Tensor = torch.unique(torch.cat([even, torch.tensor(visited, dtype=torch.float32)]))
    return times


def timestep_tables(
    model: nn.Module, times: Times, layers: Mapping[str, IntegerLayer], divisor: int = 1
) -> dict[str, nn.Module]:
    """Replacements by module path: each sinusoidal embedding of the model as a table.

    The embedded quantity is the time step, or SDXL's sizes in pixels, or Flux's guidance.

    Args:
        model: the denoiser.
        times: the times that the tables of time steps know.
        layers: the planned layers as integers; {} for a model in floating point.
        divisor: divisor of a continuous time on its way into the graph: 1000 where the graph takes t / 1000.
    """
    if family_of(model) is OWN_MODULE:  # a user's own module may embed anything: see float32_paths.py
        return {}
    replacements: dict[str, nn.Module] = {}
    config = getattr(model, "config", {})
    shared = config.get("class_embed_type") == "timestep"  # class labels use the same module
    for path, module in model.named_modules():
        if path == "add_time_proj":
            replacements[path] = TimestepTable(module, LARGEST_SIZE + 1)
        elif path == "time_proj" or isinstance(module, Timesteps):
            scope = path.removesuffix("time_proj")
            readers = [layers.get(f"{scope}{name}.linear_1") for name in ("time_embedding", "timestep_embedder")]
            reader = None if shared else next((layer for layer in readers if layer is not None), None)
            if not isinstance(times, Tensor):
                replacements[path] = TimestepTable(module, times, reader)
                continue
            tables = {"timestep": TimestepTable(module, times / divisor, reader, divisor)}
            if config.get("guidance_embeds"):
                guidance = layers.get(f"{scope}guidance_embedder.linear_1")
                tables["guidance"] = TimestepTable(module, GUIDANCES, guidance, THOUSANDTHS)
            replacements[path] = TablesInTurn(tables)
    return replacements
