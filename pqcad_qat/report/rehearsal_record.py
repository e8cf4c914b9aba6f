"""What a rehearsal found, as data: the dataclasses behind rehearsal.json.

Not here: how it was measured (timing/stage_costs.py, commands/rehearse.py), or how it looks (tables.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pqcad_qat.report.record import Hardware


@dataclass(frozen=True)
class StageCost:
    """One stage.

    Attributes:
        name: of the stage.
        seconds: that it took.
        peak_bytes: most resident memory meanwhile; None where the system does not tell it of a part of a process's
            life.
        kept_bytes: resident memory after it, all that can be given back being given back; None likewise.
    """

    name: str
    seconds: float
    peak_bytes: int | None
    kept_bytes: int | None


@dataclass(frozen=True)
class Rehearsal:
    """What was found.

    Attributes:
        policy, model: whose rules, and which architecture.
        parameters: of the full-precision denoiser.
        planned, executed_int8: layers planned for INT8, and those that executed so from the shipped file.
        attention: those planned for INT8, and what their products executed in.
        exact: layers whose integers equal PyTorch's.
        sizes: float32 weights, and the folders by the format of their weights, in bytes.
        stages: in order.
        peak_bytes: most resident memory of all stages.
        hardware: of this machine.
        command: that makes it again.
    """

    policy: str
    model: str
    parameters: int
    planned: int
    executed_int8: int
    attention: Mapping[str, str]
    exact: int
    sizes: Mapping[str, int]
    stages: tuple[StageCost, ...]
    peak_bytes: int
    hardware: Hardware
    command: str
