"""Every exception that a user can cause, under one base class that the command line turns into exit code 2.

Not here: broken invariants of our own code (asserts), and faults of the computer (they keep their traceback).
"""

from __future__ import annotations

from collections.abc import Sequence

MESSAGE = 3600
"""Largest number of characters of a whole message: what a terminal shows at once."""


class PqcadError(Exception):
    """A mistake that the user can fix.

    A message has the form ``WHERE: got X; allowed Y``. WHERE is the file, key, flag, layer or argument.
    """


class PolicyError(PqcadError):
    """A policy file is unreadable or breaks a rule; the message lists every fault, with its file, line and key."""


class PlanError(PqcadError):
    """The rules of a policy do not fit the model: a rule matches nothing, or two rules conflict over a layer."""


class ModelError(PqcadError):
    """A model, data set or feature network is missing, damaged, or of a kind that cannot be used."""


class CheckpointError(PqcadError):
    """A checkpoint or an unfinished run is damaged, incomplete, or belongs to another policy."""


class DiskError(PqcadError):
    """A disk is full, over its quota, or read-only; the message names the file, the bytes needed and the bytes free."""


class ExportError(PqcadError):
    """The exported model does not match the plan.

    A layer does not run in INT8, differs from PyTorch, or could not be converted.
    """


class UsageError(PqcadError):
    """A command line names something unknown, has a surplus value or one of a wrong type, or lacks a value."""


class StudyError(PqcadError):
    """Runs cannot be compared in one table, or some cells of a study failed."""


class DivergedError(PqcadError):
    """Training diverged; the message names the training step, the layer where one is known, and a remedy.

    Attributes:
        step: number of finished training steps when the divergence was noticed.
        stepped: False if the current training step was not made, because its loss or a gradient is not finite.
    """

    def __init__(self, step: int, message: str, stepped: bool = True) -> None:
        super().__init__(message)
        self.step, self.stepped = step, stepped


class DiedError(PqcadError):
    """Work in a separate process failed; the message is the reason alone."""


class InterruptedByUserError(PqcadError):
    """Ctrl-C or a request to terminate; the message says where it came and what is kept."""


class LaunchError(PqcadError):
    """The processes of a run were not started correctly, or their shared state differs."""


class OtherProcessError(PqcadError):
    """Another process that shares the run has failed and reports why; this process ends silently."""


def shortened(text: str, most: int = 60) -> str:
    """A text as messages quote it: on one line, printable, and at most `most` characters long."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[: most + 1]
    )
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def abridged(lines: Sequence[str]) -> str:
    """The faults of a message, one on each line, as many as can be read, and the number of the rest."""
    shown: list[str] = []
    for line in lines:
        shown.append(shortened(line, 900))
        if len("\n".join(shown)) > MESSAGE:
            shown.pop()
            break
    more = len(lines) - len(shown)
    return "\n".join(shown + ([f"and {more} more"] if more else []))
