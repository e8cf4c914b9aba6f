"""Damaged policies, studies, overrides and command lines: a result, or one error of exit code 2 that fits on a screen;
nothing is written.

What would train, sample or time is left out: a command ends where its work would begin. Not here: models and deployed
folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from fuzzing import FUZZ, bounded
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_runs import POLICIES, SCHEDULER
from torch import Tensor, nn

from pqcad_qat import cli, console
from pqcad_qat.errors import PqcadError
from pqcad_qat.models.own_model import OwnModel
from pqcad_qat.policy.loading import dump_policy, load_policy, load_pretrain_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.study_cells import load_study
from pqcad_qat.report.tables import plan_text
from pqcad_qat.stages import prepared
from pqcad_qat.stages.prepared import planned_shapes

SCREEN = 4096
"""Bytes that an error has at most."""

LOADERS: dict[str, Callable[[Path], Any]] = {
    "quantize": load_policy,
    "pretrain": load_pretrain_policy,
    "study": load_study,
}

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 9))

# fmt: off
SNIPPETS = (
    BOMB, MERGES, "&a [*a]", "&a {<<: *a}", "*nobody", "<<: 3\n", "{<<: [1]}", "? [a]\n: b\n", "? {a: b}\n: c\n",
    "? |\n  a\n: b\n",
    "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!python/name:os.system",
    "!!python/object/apply:os.system [ls]",
    "!!int x", "!!int ''", "!!float x", "!!bool x", "!!null x", "!!timestamp x", "!!map x", "!!seq x", "!!str [a]",
    "!!merge x", "!x y",
    "1e999", "-1e999", ".inf", ".nan", "0x" + "f" * 5000, "9" * 5000, "1" + ":59" * 300, "0b" + "1" * 9000, "1_0",
    "08", "0o7", "-0",
    "1e-400",
    "2024-11-02", "2024-13-45", "2024-11-02T25:00:00Z", "=", "<<", "~", "null", "yes", "off", "''", '""', "[]", "{}",
    "[[]]", "{a: {}}",
    "[" * 500, "{" * 500, "- " * 500, "{a: " * 500, "[" * 39 + "]" * 39, "\t", "\r", "\r\n", "\x00", "\x07",
    "\x1b[31m", "\ufeff", "\x85",
    "\u2028", "\U0001f600", "\\", '"\\e[31m\\0"', '"\\ud800"', "---\n", "...\n", "--- \n--- \n", "%YAML 1.2\n---\n",
    "%TAG ! x\n---\n",
    "%x\n",
    "|\n  a\n", ">-\n  a\n", "'", '"', "#", ": ", ", ", "@", "`", "&", "*", "!", "|", ">", "%", "- ", "? ",
    "x" * 5000 + ": 1\n",
    "x" * 5000,
    "extends: .\n", "extends: p.yaml\n", "extends: /dev/zero\n", "extends: pipe\n", "extends: loop\n",
    "extends: " + "a" * 300 + "\n",
    'extends: "a\\0b"\n', "extends: [w4a8.yaml]\n", "extends: ~nobody/x\n", "extends: ../..\n", "kind: study\n",
    "kind: [a]\n",
    "kind: {a: b}\n",
)
VALUES = (
    None, True, False, "", " ", "x", "x" * 5000, "\x00", "\x1b[31m", "\ud800", "-1", "1e4", "null", "~", "~nobody/x",
    "/", ".", "..",
    "a" * 300,
    "loop", "pipe", "/dev/zero", "a\nb", "re:(", "re:" + "(" * 3000, "re:a{99999999999}", "type:", "type:[", "[!",
    "re:.*|[/x]", "[bold]*",
    "*" * 300, "embedded:",
    "embedded:../..", "module:", "none", "auto", 0, 1, -1, 2, 3, 7, 8, 20, 64, 1000, 1001, 2**31, 2**32, 2**63,
    -(2**63), 10**30,
    10**4200,
    0.0, -0.0, 0.5, 1.0, 1e-320, 1e300, float("inf"), float("nan"), [], {}, [None], [[]], [0], [8, 8], [4, 8],
    list(range(300)), {"a": 1},
    {"bits": 8}, {"": 0}, {"x" * 5000: 1}, {"a.b": 1}, {"a[0]": {}}, [{"match": "*"}], {"match": "*",
    "keep_float": True}, ["x"] * 3000,
)
KEYS = ("", ".", "[", "[0]", "x", "x" * 5000, "a." * 300 + "b", "name", "kind", "extends", "seeds", "policies", "axes",
         "set",
    "model.source",
    "model", "quantization.layers", "quantization.layers[0]", "quantization.layers.1.weights.bits",
    "quantization.layers[99999999999]",
    "quantization.layers.-1", "sampler.steps", "sampler.name", "sampler.guidance_scale", "conditions.prompts",
    "conditions.embeddings",
    "conditions.classes", "evaluation.features", "evaluation.variants", "progressive.ladder",
    "distillation.student_steps", "training.seed",
    "export.batch_size", "pipeline.vae", "pipeline.text_encoder", "data.path", "data.size", "model.class",
    "model.block_out_channels",
)
WORDS = (
    "", "-", "--", "---", "-1", "-x", "--set", "--set=", "--help", "-h", "--version", "--", "--resume", "--noresume",
    "--resume=1",
    "--out", "out",
    "--model", "x", "x" * 5000, "1e999", "9" * 5000, "[" * 3000, "{" * 3000, "-" * 3000, "[1,8]", "(1,", "{'a': 1}",
    "None", "True",
    "\udcff",
    "\U0001f600", "'", '"', "\\", "a b", "/", ".", "..", "loop", "pipe", "/dev/null", "a" * 300, "p.yaml", "s.yaml",
    "t.yaml",
    "--interactive",
    "--trace", "--completion", "--verbose", "--separator", "embedded:digits", "embedded:", "module:x",
    "sdxl-base-1.0",
    "name=x",
    "seeds=[0]", "sampler.steps=10", "model.source=loop", "=", "a=b", "0.5x", "5MB", "1e9x", "*-seed0", "[", "[/x]",
    "run", "plan",
)
# fmt: on


class Fuzzed(nn.Module):
    """A denoiser of milliseconds whose layers are named as those of the embedded models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(4, 4)})
        self.mid_block = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, padding=1), "time_emb_proj": nn.Linear(4, 4)})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.mid_block["time_emb_proj"](
            F.silu(self.time_embedding["linear_1"](t[:, None].float().expand(-1, 4)))
        )
        found: Tensor = self.conv_out(F.silu(self.mid_block["conv"](self.conv_in(x)) + time[:, :, None, None]))
        return found


FUZZED = OwnModel("fuzzed", Fuzzed, (1, 8, 8), SCHEDULER)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: every policy that ships, a link that leads to itself, a pipe that nobody writes to."""
    path = tmp_path_factory.mktemp("fuzz")
    (path / "studies").mkdir()
    for shipped in (*POLICIES.glob("*.*"), *POLICIES.glob("studies/*.*")):
        (path / shipped.relative_to(POLICIES)).write_bytes(shipped.read_bytes())
    (path / "loop").symlink_to("loop")
    os.mkfifo(path / "pipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        # a second of work, which no policy damages
        patch.setattr(prepared, "try_training_and_export", lambda *_, **__: ())
        yield path


def shipped() -> dict[str, list[str]]:
    """Kind -> the files of it, from the folder of policies."""
    found: dict[str, list[str]] = {kind: [] for kind in LOADERS}
    for path in sorted((*POLICIES.glob("*.yaml"), *POLICIES.glob("studies/*.yaml"))):
        name = str(path.relative_to(POLICIES))
        found["study" if "/" in name else "pretrain" if name.startswith("pretrain") else "quantize"].append(name)
    return found


SHIPPED = [(kind, name) for kind, names in shipped().items() for name in names]


def held(work: Callable[[], object]) -> None:
    """Do it within the bounds; what is refused is one error that fits on a screen."""
    told = "a result"
    with bounded():
        try:
            work()
        except PqcadError as error:
            told = str(error)
    assert 0 < len(told.encode(errors="backslashreplace")) < SCREEN


def load_and_plan(kind: str, path: Path, overrides: tuple[str, ...] = ()) -> None:
    """Load a file of a kind; what is a policy still is planned on the small model."""
    if kind != "quantize":
        LOADERS[kind](path)
        return
    policy = load_policy(path, overrides)
    model = policy.model.model_copy(update={"source": FUZZED.source, "sample_size": None})
    small = policy.model_copy(update={"model": model, "conditions": Policy.model_fields["conditions"].default})
    denoiser, layers, _ = planned_shapes(small, FUZZED)
    plan_text(layers, denoiser)


# ---- text
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# ----------------------------------------------------------------------------------------------------------------------


@st.composite
def damaged_texts(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """(kind, name, content) of a shipped file after a few cuts, copies, exchanges and insertions in bytes and lines."""
    kind, name = draw(st.sampled_from(SHIPPED))
    content = (POLICIES / name).read_bytes()
    for _ in range(draw(st.integers(1, 4))):
        lines = content.splitlines(keepends=True) or [b""]
        at, line = draw(st.integers(0, len(content))), draw(st.integers(0, len(lines) - 1))
        snippet = draw(st.sampled_from(SNIPPETS)).encode(errors="surrogatepass")
        match draw(st.integers(0, 8)):
            case 0:
                content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
            case 1:
                content = content[:at]
            case 2:
                content = content[:at] + snippet + content[at:]
            case 3:
                content = b"".join(lines[:line] + lines[line + 1 :])
            case 4:
                content = b"".join([*lines[:line], snippet + b"\n", *lines[line:]])
            case 5:
                content = b"".join([*lines[: line + 1], lines[line], *lines[line + 1 :]])
            case 6:
                key, colon, _ = lines[line].partition(b":")
                content = b"".join([*lines[:line], key + colon + b" " + snippet + b"\n", *lines[line + 1 :]])
            case 7:
                content = b"".join([*lines[:line], b" " * draw(st.integers(1, 3)) + lines[line], *lines[line + 1 :]])
            case 8:
                content = content.decode(errors="replace").encode(
                    draw(st.sampled_from(["utf-16", "utf-8-sig", "latin-1", "utf-32"])), "replace"
                )
    return kind, name, content


@FUZZ
@given(damaged_texts())
def test_fuzz_a_damaged_text_is_loaded_and_planned_or_refused(folder: Path, damaged: tuple[str, str, bytes]) -> None:
    kind, name, content = damaged
    path = folder / Path(name).parent / "p.yaml"
    path.write_bytes(content)
    held(lambda: load_and_plan(kind, path))


# ---- trees -----------------------------------------------------------------------------------------------------------


def whole(kind: str, name: str) -> Any:
    """The plain data of a shipped file, with every key."""
    if kind == "study":
        return yaml.safe_load((POLICIES / name).read_text())
    return yaml.safe_load(dump_policy(LOADERS[kind](POLICIES / name)))


WHOLE = {(kind, name): whole(kind, name) for kind, name in SHIPPED}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every mapping or list in a value with each of its keys or indices."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []:
        yield value, key
        yield from places(value[key])


@st.composite
def damaged_trees(draw: st.DrawFn) -> tuple[str, str, str]:
    """(kind, name, text) of a shipped file some of whose values are exchanged, dropped, renamed, or moved elsewhere."""
    kind, name = draw(st.sampled_from(SHIPPED))
    data = yaml.safe_load(yaml.safe_dump(WHOLE[kind, name]))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(data))
        if not found:
            break
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        match draw(st.integers(0, 4)):
            case 0:
                holder[key] = deepcopy(draw(st.sampled_from(VALUES)))  # which the next round may change
            case 1:
                del holder[key]
            case 2:
                if isinstance(holder, dict):
                    holder[draw(st.sampled_from([*KEYS, f"{key}s", str(key)[:-1]]))] = holder.pop(key)
            case 3:
                other, there = found[draw(st.integers(0, len(found) - 1))]
                holder[key] = (
                    yaml.safe_load(yaml.safe_dump(other[there])) if there in other or isinstance(there, int) else None
                )
            case 4:
                holder[key] = draw(
                    st.sampled_from([st.integers(), st.floats(), st.text(max_size=40)]).flatmap(lambda one: one)
                )
    return kind, name, yaml.safe_dump(data, allow_unicode=draw(st.booleans()))


@FUZZ
@given(damaged_trees())
def test_fuzz_a_damaged_tree_is_loaded_and_planned_or_refused(folder: Path, damaged: tuple[str, str, str]) -> None:
    kind, name, text = damaged
    path = folder / Path(name).parent / "t.yaml"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    held(lambda: load_and_plan(kind, path))


# ---- overrides -------------------------------------------------------------------------------------------------------

VALUE_TEXTS = st.one_of(
    st.sampled_from(SNIPPETS),
    st.sampled_from(VALUES).map(
        lambda value: yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...")
    ),
    st.text(max_size=20),
)
LEAVES = sorted(
    {
        ".".join([section, key])
        for section, part in WHOLE["quantize", "w4a8.yaml"].items()
        if isinstance(part, dict)
        for key in part
    }
)
OVERRIDES = st.builds(
    "{}{}{}".format, st.sampled_from([*KEYS, *LEAVES]), st.sampled_from(["=", "=", "=", "", " = "]), VALUE_TEXTS
)


@FUZZ
@given(st.lists(OVERRIDES, min_size=1, max_size=3))
def test_fuzz_overrides_reach_the_plan_or_are_refused(folder: Path, overrides: list[str]) -> None:
    held(lambda: load_and_plan("quantize", folder / "smoke.yaml", tuple(overrides)))


@FUZZ
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_fuzz_overrides_of_a_study_reach_every_cell_or_are_refused(folder: Path, overrides: list[str]) -> None:
    held(lambda: load_study(folder / "studies" / "smoke.yaml", overrides))


# ---- command lines ---------------------------------------------------------------------------------------------------

FLAGS = ("--set", "--model", "--out", "--policy", "--only", "--jobs", "--dry_run", "--dry-run", "--count", "--seed",
         "--steps", "--prompt",
         "--negative", "--conditions", "--guidance", "--batches", "--isa", "--runs", "--throughput", "--widths",
         "--states", "--max-size",
         "--variant", "--weights", "--batch_size",
         "--images", "--features", "--data", "--path", "--size", "--resume", "--states=", "-o", "-s", "-m",
         "-c")  # fmt: skip
ARGUMENTS = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(FLAGS),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.sampled_from(WORDS)),
    OVERRIDES.map("--set={}".format),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12),
)
FILES = (
    "smoke.yaml",
    "w8a8.yaml",
    "pretrain-digits.yaml",
    "studies/smoke.yaml",
    "p.yaml",
    "nothing.yaml",
    "pipe",
    "loop",
    ".",
    "a" * 300,
)
WORK = (  # where a command's own work begins
    "pqcad_qat.commands.run.run",
    "pqcad_qat.commands.sweep.sweep",
    "pqcad_qat.commands.pretrain.pretrain",
    "pqcad_qat.commands.sensitivity.measure_sensitivity",
    "pqcad_qat.commands.profile.profile",
    "pqcad_qat.commands.open_folder.open_folder",
    "pqcad_qat.commands.export.export",
    "pqcad_qat.commands.benchmark.measure_speed",
    "pqcad_qat.commands.rehearse.rehearse",
    "pqcad_qat.commands.features.make_features",
    "pqcad_qat.commands.features.load_images",
    "pqcad_qat.serving.text_to_image.TextToImage.from_pretrained",
)


class BegunError(PqcadError):
    """A command has read all of its arguments and begins."""


def begin(*_: Any, **__: Any) -> None:
    raise BegunError("begun")


@pytest.fixture(scope="module")
def no_work() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in WORK:
            patch.setattr(name, begin)
        patch.setattr(console, "CONSOLE", Console(width=200, markup=False))
        patch.setattr("pqcad_qat.models.untrained.shapes_of", begin)
        patch.setattr("pqcad_qat.commands.sweep.check_cells", begin)
        yield


@FUZZ
@given(st.sampled_from([*cli.COMMANDS, "rn", ""]), st.sampled_from(FILES), st.lists(ARGUMENTS, max_size=5))
def test_fuzz_a_command_line_begins_its_work_or_is_refused(
    folder: Path, no_work: None, capsys: pytest.CaptureFixture[str], command: str, file: str, arguments: list[str]
) -> None:
    before = {path for path in folder.rglob("*") if path.name not in ("p.yaml", "t.yaml")}
    code: Any = 0
    with bounded():
        try:
            cli.main([command, file, *arguments])
        except SystemExit as end:
            code = end.code
    errors = capsys.readouterr().err
    assert code in (0, 2)
    assert "Traceback" not in errors
    assert code == 0 or 0 < len(errors.encode(errors="backslashreplace")) < SCREEN
    assert {path for path in folder.rglob("*") if path.name not in ("p.yaml", "t.yaml")} == before


def test_the_small_model_takes_the_rules_that_ship(folder: Path) -> None:
    """So that a damaged policy that is still one is planned, and not refused for its rules."""
    load_and_plan("quantize", folder / "smoke.yaml")
    assert Fuzzed()(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)
