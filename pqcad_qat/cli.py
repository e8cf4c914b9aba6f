"""The command line: from its words to one of the commands, and the end of the program.

Not here: the commands (policy_commands.py, folder_commands.py).
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

import fire

from pqcad_qat import __version__, console
from pqcad_qat.arguments import HELP, fire_arguments, help_text
from pqcad_qat.folder_commands import assemble, benchmark, compare, demo, evaluate, export, features, report, sample
from pqcad_qat.machine.program import keep_freed_memory, keep_to_share_of_cores, reported_endings
from pqcad_qat.machine.usage_reports import report_no_usage
from pqcad_qat.policy_commands import plan, policies, pretrain, profile, rehearse, run, schema, sensitivity, sweep

COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        run,
        plan,
        sensitivity,
        profile,
        report,
        export,
        compare,
        sweep,
        pretrain,
        sample,
        demo,
        evaluate,
        benchmark,
        rehearse,
        assemble,
        features,
        policies,
        schema,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. It exits with 0, or with 2 and a message without traceback if the user can fix the cause.

    Args:
        arguments: words of the command line; those of the process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    report_no_usage()
    keep_to_share_of_cores()
    os.environ.setdefault("PAGER", "cat")  # Fire pages its help
    if isinstance(sys.stdout, io.TextIOWrapper):
        # for names that are not UTF-8, and for terminals that cannot show every character
        sys.stdout.reconfigure(errors="backslashreplace")
    with console.closed_pipe_is_no_fault():
        if HELP & set(words):
            sys.stdout.write(help_text(COMMANDS, words))
        elif words == ["--version"]:
            sys.stdout.write(f"pqcad-qat {__version__}\n")
        else:
            with reported_endings(words):
                fire.Fire(COMMANDS, command=fire_arguments(COMMANDS, words), name="pqcad-qat")
