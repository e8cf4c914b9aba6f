"""Result of a rehearsal as data: the dataclasses behind rehearsal.json.

Not here: how it was measured (timing/stage_costs.py, commands/rehearse.py), or how it looks (tables.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pqcad_qat.report.record import Hardware


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage.

    Attributes:
        name: name of the stage.
        seconds: wall time of the stage.
        peak_bytes: largest resident memory during the stage; None if the system reports no peak for part of a process's
            life.
        kept_bytes: resident memory after the stage, once all memory that can be returned has been returned; None
            likewise.
    """

    name: str
    seconds: float
    peak_bytes: int | None
    kept_bytes: int | None


@dataclass(frozen=True)
class Rehearsal:
    """Result of a rehearsal.

    Attributes:
        policy, model: name of the policy whose rules apply, and the architecture.
        parameters: number of parameters of the full-precision denoiser.
        planned, executed_int8: numbers of layers planned for INT8, and of those that executed in INT8 from the shipped
            file.
        attention: attention planned for INT8 -> precision its matrix products executed in.
        exact: number of layers whose integers equal PyTorch's.
        sizes: bytes of the float32 weights, and of the folders by the format of their weights.
        stages: costs of the stages in order.
        peak_bytes: largest resident memory over all stages.
        hardware: machine of the rehearsal.
        command: command that repeats the rehearsal.
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
