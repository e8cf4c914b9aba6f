"""Arguments of the command line: checked and rewritten before Fire reads them, their values checked after it, and help.

Not here: the command line (cli.py). Fire alone would run a command first and report an unknown flag afterwards, when a
typo has already cost a whole run.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path

import fire

from pqcad_qat.errors import UsageError, shortened
from pqcad_qat.machine.processes import launched
from pqcad_qat.policy.sections import known_keys
from pqcad_qat.policy.value_types import SIZE_LIMIT

Commands = Mapping[str, Callable[..., None]]
"""Mapping from the name of a command to its function."""

HELP = {"-h", "--help"}
"""Flags that ask for help."""

COMPLETION = """
COMPLETION
    Fire prints a script by which a shell completes commands and flags. For this shell, or at the end of its start file:

     bash
       source <(pqcad-qat -- --completion)

     fish
       pqcad-qat -- --completion fish | source
"""
"""Section of the help on shell completion."""


def fire_arguments(commands: Commands, words: Sequence[str]) -> list[str]:
    """Rewrite a command line so that Fire reads it as meant: switches are spelled out, and all --set make one list.

    Raises:
        UsageError: the command or a flag does not exist, a flag has no value or one of another type, or there is an
            argument too many.
    """
    if not words or list(words[:2]) == ["--", "--completion"]:
        return list(words)  # Fire prints its own page, or its completion script
    name, *rest = words
    if name not in commands:
        raise UsageError(
            f"{shortened(name)}: got an unknown command; allowed {known_keys(list(commands), name)}, "
            "--help or --version"
        )
    parameters = inspect.signature(commands[name]).parameters
    positional: list[str] = []
    flags: dict[str, str] = {}
    overrides: list[str] = []
    for flag, value in _pairs(name, parameters, rest):
        if flag is None:
            positional.append(value)
        elif flag == "set":
            overrides.append(value)
        elif flag in flags:
            raise UsageError(f"--{flag}: got it a second time; allowed once")
        else:
            flags[flag] = value
    places = _places(name, parameters, positional, flags)
    return [
        name,
        *(_literal(parameter, value) for parameter, value in zip(places, positional, strict=False)),
        *(f"--{flag}={_literal(parameters[flag], value)}" for flag, value in flags.items()),
        *([f"--set=[{', '.join(map(_quoted, overrides))}]"] if overrides else []),
    ]


def _literal(parameter: inspect.Parameter, text: str) -> str:
    """Spell a value as the Python literal that Fire parses. A folder 1e3 stays text; a number must be a number.

    Raises:
        UsageError: the value is not of the parameter's type.
    """
    flag, kind = f"--{parameter.name.replace('_', '-')}", str(parameter.annotation).removesuffix(" | None")
    match kind:
        case "int":
            return _whole(flag, text)
        case "float":
            if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", text):
                raise UsageError(f"{flag}: got {shortened(text)!r}; allowed a number")
            return repr(float(text))
        case "bool":
            if text.lower() not in ("true", "false"):
                allowed = f"{flag} or --no{parameter.name}" if parameter.default is True else f"{flag} alone"
                raise UsageError(f"{flag}: got {shortened(text)}; allowed {allowed}")
            return text.capitalize()
        case "tuple[int, ...]":
            return f"[{','.join(_whole(flag, item) for item in _items(text))}]"
        case "tuple[str, ...]":
            return f"[{','.join(_quoted(item) for item in _items(text))}]"
    return _quoted(text)


def _whole(flag: str, text: str) -> str:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise UsageError(f"{flag}: got {shortened(text)!r}; allowed a whole number")
    return str(int(text))


def _items(text: str) -> list[str]:
    """Items of a list that is written as [a, b] or a,b."""
    return [item.strip(" '\"") for item in re.sub(r"^\s*[\[(]|[\])]\s*$", "", text).split(",") if item.strip()]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


def _places(
    command: str, parameters: Mapping[str, inspect.Parameter], positional: Sequence[str], flags: Mapping[str, str]
) -> list[inspect.Parameter]:
    """Parameters that the arguments without a flag fill, in order.

    They are the required parameters that no flag fills; or, for every argument, the parameter that takes many.

    Raises:
        UsageError: there is an argument too many.
    """
    if many := [parameter for parameter in parameters.values() if parameter.kind is parameter.VAR_POSITIONAL]:
        return many * len(positional)
    free = [
        parameter
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in flags
    ]
    if len(positional) > len(free):
        surplus = shortened(" ".join(positional[len(free) :]))
        wanted = " ".join(parameter.name.upper() for parameter in free) or "none"
        raise UsageError(f"{surplus}: got an argument too many for `{command}`; allowed {wanted}, and flags")
    return free


def _pairs(
    command: str, parameters: Mapping[str, inspect.Parameter], rest: Sequence[str]
) -> Iterator[tuple[str | None, str]]:
    """Yield (flag, value) for every flag, and (None, value) for every argument without one."""
    waiting = iter(rest)
    for argument in waiting:
        if not re.match(r"--?[A-Za-z]", argument):
            yield None, argument
            continue
        spelled, sign, value = argument.partition("=")
        positive = _switched_off(parameters, spelled)
        flag = _flag(command, parameters, positive or spelled)
        if not sign and isinstance(parameters[flag].default, bool):
            value = str(positive is None)
        else:
            value = value if sign else next(waiting, "")
            if not value:
                raise UsageError(f"{spelled}: got no value; allowed {spelled} VALUE")
        yield flag, value


def _switched_off(parameters: Mapping[str, inspect.Parameter], spelled: str) -> str | None:
    """Switch that --noSWITCH turns off; None unless the command has that switch and it is on by default."""
    name = spelled.removeprefix("--no")
    return f"--{name}" if name in parameters and parameters[name].default is True else None


def _flag(command: str, parameters: Mapping[str, inspect.Parameter], spelled: str) -> str:
    """Parameter that a flag names, in full or by its first letter.

    Raises:
        UsageError: the command has no such flag.
    """
    name = spelled.lstrip("-").replace("-", "_")
    flags = [known for known, parameter in parameters.items() if parameter.kind is not parameter.VAR_POSITIONAL]
    short = [known for known in flags if known[0] == name] if not spelled.startswith("--") else []
    if len(short) == 1:
        return short[0]
    if not spelled.startswith("--") or name not in flags:
        allowed = known_keys([f"--{known}" for known in flags], spelled) if flags else "none"
        raise UsageError(f"{shortened(spelled)}: got an unknown flag of `{command}`; allowed {allowed}")
    return name


def help_text(commands: Commands, words: Sequence[str]) -> str:
    """Text of --help: Fire's own, with types as a user would write them."""
    text = io.StringIO()
    named = [argument for argument in words[:1] if argument in commands]
    with redirect_stderr(text), suppress(SystemExit):
        fire.Fire(dict(commands), command=[*named, "--", "--help"], name="pqcad-qat")
    plain = re.sub(r"Type: Optional\['(\w+) \| None'\]\n *Default: None", r"Type: \1", text.getvalue())
    dashed = re.sub(r"--[a-z]+_[a-z_]+(?==)", lambda flag: flag[0].replace("_", "-"), plain)
    return re.sub(r"Type: '(.*)'", r"Type: \1", dashed) + ("" if named else COMPLETION)


def several(flag: str, value: object) -> tuple[object, ...]:
    """Values of a flag that takes a list; Fire has read one value, or a list such as [1,8].

    Raises:
        UsageError: there is no value, or a value occurs twice.
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values:
        raise UsageError(f"--{flag}: got an empty list; allowed one value or more")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UsageError(f"--{flag}: got {twice[0]!r} twice; allowed once")
    return values


def one_of(flag: str, values: Sequence[object], allowed: Sequence[str]) -> list[str]:
    """Values of a flag, each of which is one of a fixed set of names.

    Raises:
        UsageError: a value is not in the set.
    """
    for value in values:
        if value not in allowed:
            raise UsageError(f"--{flag}: got {shortened(str(value))!r}; allowed {', '.join(allowed)}")
    return [str(value) for value in values]


def whole_number(flag: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Value of a flag that takes a whole number.

    Raises:
        UsageError: the value is not a whole number, or is out of bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise UsageError(
            f"--{flag}: got {value!r}; allowed a whole number from {least}" + ("" if most is None else f" to {most}")
        )
    return value


def output_folder(path: str | Path) -> Path:
    """Value of --out for a command that writes into a folder, which need not exist yet.

    Raises:
        UsageError: it is a file.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"--out: got {str(path)!r}, a file; allowed a folder")
    return Path(path)


def size_limit(flag: str, text: str) -> str:
    """The text of a size limit, which is a share of the float32 size or a number of megabytes.

    Raises:
        UsageError: the text is not a size.
    """
    if re.fullmatch(SIZE_LIMIT, text) is None:
        raise UsageError(
            f"--{flag}: got {shortened(text)!r}; allowed a share of float32 as 0.15x, or megabytes as 2.5MB"
        )
    return text


def height_and_width(flag: str, text: str) -> tuple[int, int]:
    """Value of a flag that takes one number for both sides, or two as 64,96.

    Raises:
        UsageError: it is something else.
    """
    if (sides := re.fullmatch(r"\[?(\d{1,4})(?:, ?(\d{1,4}))?\]?", text)) is None or int(sides[1]) < 1:
        raise UsageError(f"--{flag}: got {shortened(text)!r}; allowed one number, or height and width as 64,96")
    return int(sides[1]), int(sides[2] or sides[1])


def with_model(overrides: Sequence[str], model: str | None) -> list[str]:
    """Overrides of a policy, including the one of its model if --model is given."""
    return [*overrides, *([f"model.source={json.dumps(model)}"] if model is not None else [])]


def with_minutes(overrides: Sequence[str], minutes: object) -> list[str]:
    """Overrides of a policy, including training.minutes if --minutes is given.

    Raises:
        UsageError: the value is not a number over 0.
    """
    if minutes is None:
        return list(overrides)
    if not isinstance(minutes, int | float) or isinstance(minutes, bool) or minutes <= 0:
        raise UsageError(f"--minutes: got {minutes!r}; allowed a number over 0")
    return [*overrides, f"training.minutes={float(minutes)}"]


def scaled_file(text: str) -> tuple[str, float]:
    """File and factor of FILE:FACTOR; the factor is 1 where there is none.

    Raises:
        UsageError: the factor is not a number.
    """
    file, colon, factor = text.rpartition(":")
    if not colon or "/" in factor:
        return text, 1.0
    if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", factor) is None:
        raise UsageError(
            f"{shortened(text)}: got {shortened(factor)!r} after the colon; allowed a number, as in {file}:0.8"
        )
    return file, float(factor)


def guidance_scale(value: object) -> float | None:
    """Value of --guidance; None without the flag.

    Raises:
        UsageError: the value is not a number from 1.
    """
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value < 1):
        raise UsageError(f"--guidance: got {value!r}; allowed a number from 1")
    return value


def command_line() -> str:
    """Command line that repeats this command from its beginning."""
    count = launched()[1]
    start = f"accelerate launch --multi_gpu --num_processes {count}" if count > 1 else "python"
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "-r")]
    line = f"{start} -m pqcad_qat {shlex.join(arguments)}"
    return line.encode(errors="backslashreplace").decode()  # it is written into pages
