"""The command line's arguments before Fire reads them: what Fire would take wrongly is refused or rewritten, and its
help made plain.

Not here: the commands (cli.py). Fire runs a command first and complains of an unknown flag afterwards, when a typo has
cost a whole run.
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
from typing import Literal

import fire

from pqcad_qat.errors import UsageError, shortened
from pqcad_qat.machine.processes import launched
from pqcad_qat.policy.sections import known_keys

Commands = Mapping[str, Callable[..., None]]
HELP = {"-h", "--help"}

COMPLETION = """
COMPLETION
    Fire prints a script by which a shell completes commands and flags. For this shell, or at the end of its start file:

     bash
       source <(pqcad-qat -- --completion)

     fish
       pqcad-qat -- --completion fish | source
"""
"""What the help says of shell completion."""


def fire_arguments(commands: Commands, words: Sequence[str]) -> list[str]:
    """The arguments as Fire reads them rightly: switches spelled out, every --set in one list.

    Raises:
        UsageError: no such command, a flag that it does not have, one without a value or with one of another type, or
            an argument too many.
    """
    if not words or list(words[:2]) == ["--", "--completion"]:
        return list(words)  # Fire's own page, and its completion for shells
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
    """A value as Fire reads it, which is as Python: a folder 1e3 stays text, and what is no number is refused here.

    Raises:
        UsageError: a value that is not of the parameter's type.
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
    """What a list holds that is written as [a, b] or a,b."""
    return [item.strip(" '\"") for item in re.sub(r"^\s*[\[(]|[\])]\s*$", "", text).split(",") if item.strip()]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


def _places(
    command: str, parameters: Mapping[str, inspect.Parameter], positional: Sequence[str], flags: Mapping[str, str]
) -> list[inspect.Parameter]:
    """The parameter of each argument without a flag: those that the command needs and no flag gives, or the one that
    takes many.

    Raises:
        UsageError: an argument too many.
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
    """(flag, its value), or (None, value) for an argument without a flag."""
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
    """The switch that --noSWITCH turns off, where the command has it and it is on by default."""
    name = spelled.removeprefix("--no")
    return f"--{name}" if name in parameters and parameters[name].default is True else None


def _flag(command: str, parameters: Mapping[str, inspect.Parameter], spelled: str) -> str:
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
    """What --help shows: Fire's text, with types as a user would write them."""
    text = io.StringIO()
    named = [argument for argument in words[:1] if argument in commands]
    with redirect_stderr(text), suppress(SystemExit):
        fire.Fire(dict(commands), command=[*named, "--", "--help"], name="pqcad-qat")
    plain = re.sub(r"Type: Optional\['(\w+) \| None'\]\n *Default: None", r"Type: \1", text.getvalue())
    dashed = re.sub(r"--[a-z]+_[a-z_]+(?==)", lambda flag: flag[0].replace("_", "-"), plain)
    return re.sub(r"Type: '(.*)'", r"Type: \1", dashed) + ("" if named else COMPLETION)


def several(flag: str, value: object) -> tuple[object, ...]:
    """The values of a flag that takes a list, as Fire has read it: one value, or a list such as [1,8].

    Raises:
        UsageError: no value, or one twice.
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values:
        raise UsageError(f"--{flag}: got an empty list; allowed one value or more")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UsageError(f"--{flag}: got {twice[0]!r} twice; allowed once")
    return values


def one_of(flag: str, values: Sequence[object], allowed: Sequence[str]) -> list[str]:
    """The values of a flag, each a name of a fixed set.

    Raises:
        UsageError: another one.
    """
    for value in values:
        if value not in allowed:
            raise UsageError(f"--{flag}: got {shortened(str(value))!r}; allowed {', '.join(allowed)}")
    return [str(value) for value in values]


def whole_number(flag: str, value: object, least: int = 1, most: int | None = None) -> int:
    """The value of a flag that is a whole number.

    Raises:
        UsageError: another one, or out of bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise UsageError(
            f"--{flag}: got {value!r}; allowed a whole number from {least}" + ("" if most is None else f" to {most}")
        )
    return value


def output_folder(path: str | Path) -> Path:
    """The value of --out where that is a folder, there or not.

    Raises:
        UsageError: a file.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"--out: got {str(path)!r}, a file; allowed a folder")
    return Path(path)


def size_limit(flag: str, text: str) -> tuple[float, Literal["x", "MB"]]:
    """A size: how much, and whether as a share of float32 or in megabytes.

    Raises:
        UsageError: no such size.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(x|MB)", text)
    if size is None:
        raise UsageError(
            f"--{flag}: got {shortened(text)!r}; allowed a share of float32 as 0.15x, or megabytes as 2.5MB"
        )
    return float(size[1]), "x" if size[2] == "x" else "MB"


def with_model(overrides: Sequence[str], model: str | None) -> list[str]:
    """The overrides of a policy, with that of its model where one is given."""
    return [*overrides, *([f"model.source={json.dumps(model)}"] if model is not None else [])]


def guidance_scale(value: object) -> float | None:
    """The value of --guidance, where it is given.

    Raises:
        UsageError: no number from 1.
    """
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value < 1):
        raise UsageError(f"--guidance: got {value!r}; allowed a number from 1")
    return value


def command_line() -> str:
    """The command that makes a run again, from its beginning."""
    count = launched()[1]
    start = f"accelerate launch --multi_gpu --num_processes {count}" if count > 1 else "python"
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "-r")]
    line = f"{start} -m pqcad_qat {shlex.join(arguments)}"
    return line.encode(errors="backslashreplace").decode()  # it is written into pages
