"""Every exception that a user can cause, under one root that the command line turns into exit code 2.

Not here: our own invariants (those are asserts), and faults of the machine (those keep their traceback).
"""

from __future__ import annotations

from collections.abc import Sequence

MESSAGE = 3600
"""Characters of a whole message: what a terminal shows at once."""


class PqcadError(Exception):
    """A mistake that the user can mend; the message names what, where, the rule, and what was got."""


class PolicyError(PqcadError):
    """A policy file is unreadable or breaks a rule; the message lists every fault as ``file:line: key: got X; allowed
    Y``.
    """


class PlanError(PqcadError):
    """The rules of a policy do not fit the model: a rule matches nothing, or two rules conflict over a layer."""


class ModelError(PqcadError):
    """A model, data set or feature network is missing, damaged, or of a kind that cannot be used."""


class CheckpointError(PqcadError):
    """A checkpoint or an unfinished run is damaged, incomplete, or belongs to another policy."""


class DiskError(PqcadError):
    """A disk is full, over its quota, or read-only; the message names the file, the bytes wanted and the bytes that are
    free.
    """


class ExportError(PqcadError):
    """The exported model is not what the plan says: a layer left INT8, differs from PyTorch, or could not be
    converted.
    """


class UsageError(PqcadError):
    """A command line that names what there is not, a value too many or of another type, or a flag without its value."""


class StudyError(PqcadError):
    """Runs cannot stand in one table, or some cells of a study failed."""


class DivergedError(PqcadError):
    """Training diverged; the message names the step, the layer where one is known, and what to do.

    Attributes:
        step: finished steps when it was noticed.
        stepped: False where the step at hand was not made, since its loss or a gradient is not finite.
    """

    def __init__(self, step: int, message: str, stepped: bool = True) -> None:
        super().__init__(message)
        self.step, self.stepped = step, stepped


class DiedError(PqcadError):
    """What was done in a process of its own could not be done; the message is the reason alone."""


class InterruptedByUserError(PqcadError):
    """Ctrl-C or a request to terminate; the message says where it came and what is kept."""


class LaunchError(PqcadError):
    """The processes were not started as they are to be, or what they share has come apart."""


class OtherProcessError(PqcadError):
    """Another of the processes that share the run has failed, and says why: this one ends without a word."""


def shortened(text: str, most: int = 60) -> str:
    """What was got, as a message quotes it: on one line, of what can be printed, and never more than fits beside what
    is allowed.
    """
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def abridged(lines: Sequence[str]) -> str:
    """The faults of a message, one a line, as many as can be read, and how many more there are."""
    shown: list[str] = []
    for line in lines:
        shown.append(shortened(line, 900))
        if len("\n".join(shown)) > MESSAGE:
            shown.pop()
            break
    more = len(lines) - len(shown)
    return "\n".join(shown + ([f"and {more} more"] if more else []))
