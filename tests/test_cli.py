"""The command line: help that reads well, what every command prints and writes, and mistakes that cost an exit code 2
and no traceback.

Not here: a whole `run` as a process (test_kills.py), the wording of a policy's faults (test_policy_loading.py).
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from small_networks import unet_config
from tiny_runs import (
    POLICIES,
    REPOSITORY,
    CommandLine,
    FinishedRun,
    environment,
    program,
    tiny_overrides,
    without_trials,
)

from pqcad_qat import __version__, cli, console
from pqcad_qat.arguments import fire_arguments
from pqcad_qat.errors import UsageError
from pqcad_qat.policy.variants import FP32, NNCF_INT8, OV_BF16, OV_FP32, PQCAD_OPENVINO
from pqcad_qat.stages.open_run import open_run

SMOKE = str(POLICIES / "smoke.yaml")
STUDY = str(POLICIES / "studies" / "smoke.yaml")

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Call the console script's function in this process, in an empty folder; (exit code, output, errors)."""
    monkeypatch.setattr(console, "CONSOLE", Console(width=200, markup=False))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code: int | str | None = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        assert isinstance(code, int)
        return code, printed.out, printed.err

    return run


def sets(model: Path, *more: str) -> list[str]:
    return [f"--set={override}" for override in tiny_overrides(model, *more)]


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_every_command_with_what_it_does(call: Call, arguments: list[str]) -> None:
    code, output, errors = call(*arguments)
    assert (code, errors) == (0, "")
    for name, command in cli.COMMANDS.items():
        assert re.search(rf"^ +{name}$", output, re.MULTILINE)
        assert (inspect.getdoc(command) or "").splitlines()[0] in output


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_a_command_says_what_each_argument_is_in_plain_types(call: Call, name: str) -> None:
    code, output, errors = call(name, "--help")
    assert (code, errors) == (0, "")
    described = (inspect.getdoc(cli.COMMANDS[name]) or "").partition("Args:\n")[2]
    for words in re.findall(r"^    \w+: (.*(?:\n     .*)*)", described, re.MULTILINE):
        assert " ".join(words.split()) in " ".join(output.split())
    assert "Optional[" not in output
    assert "FIRE" not in output
    assert "GROUP" not in output


def test_help_says_how_a_shell_completes_commands_and_flags(call: Call) -> None:
    assert "source <(pqcad-qat -- --completion)" in call("--help")[1]
    assert "--completion" not in call("run", "--help")[1]
    script = call("--", "--completion")[1]
    assert "complete -F" in script
    assert all(name in script for name in cli.COMMANDS)
    assert "--dry-run" in script


def test_help_the_list_of_policies_and_a_policys_faults_come_without_loading_torch() -> None:
    script = (
        "import sys; from pqcad_qat.cli import main; main(['run', '--help']); main(['policies'])\n"
        "try: main(['run', 'no-such.yaml'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert not {'torch', 'diffusers', 'brevitas', 'openvino', 'nncf'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_console_script_is_the_program() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["pqcad-qat"].partition(":")
    assert getattr(import_module(module), function) is cli.main


def test_the_program_runs_from_any_folder(command_line: CommandLine, tmp_path: Path) -> None:
    done = command_line("schema", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["$defs"]["Policy"]
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--version"], ["schema"], ["policies"], ["--", "--completion"]])
def test_a_reader_that_goes_away_ends_the_program_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does once it has its lines
    with os.fdopen(writer, "w") as output:
        done = subprocess.run(
            program(arguments), env=environment(), stdout=output, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (console.CLOSED_PIPE, "")


# ---- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no such command": (["bogus"], r"bogus: got an unknown command; allowed run, plan, .*, --help or --version"),
    "a misspelt command": (["rn"], r"rn: got an unknown command; .*did you mean run\?"),
    "a method of what Fire reads": (["keys"], r"keys: got an unknown command"),
    "Fire's own flags": (["--", "--interactive"], r"--: got an unknown command"),
    "a missing argument": (["run"], r"required argument: policy\nUsage: pqcad-qat run POLICY"),
    "an unknown flag": (["run", SMOKE, "--otu", "x"], r"--otu: got an unknown flag of `run`; .*did you mean --out\?"),
    "an argument too many": (["run", SMOKE, "runs/x"], r"runs/x: got an argument too many for `run`; allowed POLICY"),
    "a flag twice": (["run", SMOKE, "--out", "x", "--out=y"], r"--out: got it a second time; allowed once"),
    "a policy twice": (
        ["run", SMOKE, "--policy", SMOKE],
        r"smoke\.yaml: got an argument too many for `run`; allowed none, and flags",
    ),
    "a switch with a word": (["run", SMOKE, "--resume=maybe"], r"--resume: got maybe; allowed --resume alone"),
    "many digits": (
        ["sample", "embedded:digits", "--count", "9" * 5000],
        r"--count: got '9{57}\.\.\.'; allowed a whole number",
    ),
    "a number without an end": (
        ["sample", "embedded:digits", "--guidance", "1e999"],
        r"--guidance: got '1e999'; allowed a number",
    ),
    "a nesting for a number": (
        ["sample", "embedded:digits", "--seed", "[" * 5000],
        r"--seed: got '\[{57}\.\.\.'; allowed a whole number",
    ),
    "batches that are no numbers": (
        ["benchmark", "x", "--batches", "[1,two]"],
        r"--batches: got 'two'; allowed a whole number",
    ),
    "a flag with nothing": (["run", SMOKE, "--out="], r"--out: got no value; allowed --out VALUE"),
    "a name that no file system takes": (
        ["run", "a" * 400],
        r"a{297}\.\.\.: got File name too long; allowed a policy file",
    ),
    "an output that no file system takes": (
        ["benchmark", "x", "--out", "a" * 300],
        r"a: got File name too long; allowed a path",
    ),
    "a flag without a value": (["run", SMOKE, "--out"], r"--out: got no value"),
    "no such policy": (["run", "no-such.yaml"], r"no-such\.yaml: got No such file"),
    "a folder for a policy": (["run", str(POLICIES)], r"policies: got "),
    "a policy of another kind": (["run", str(POLICIES / "pretrain-fashion-mnist.yaml")], r"the command `pretrain`"),
    "a policy of another kind, too": (["pretrain", SMOKE], r"kind: got quantize, a policy for the command `run`"),
    "no key and value": (["run", SMOKE, "--set", "steps"], r"--set steps: got no key and value; allowed key=value"),
    "an unknown key": (["plan", SMOKE, "--set", "sampler.stesp=4"], r"--set sampler\.stesp.*did you mean steps\?"),
    "a value out of bounds": (["plan", SMOKE, "--set", "sampler.steps=0"], r"sampler\.steps: got 0; allowed"),
    "no time to train": (["run", SMOKE, "--minutes", "0"], r"--minutes: got 0\.0; allowed a number over 0"),
    "an unknown embedded model": (["plan", SMOKE, "--model", "embedded:nothing"], r"got 'embedded:nothing'; allowed"),
    "a model that is not there": (["plan", SMOKE, "--model", "./nothing"], r"got './nothing', which is no folder"),
    "no images": (
        ["sample", "embedded:fashion-mnist", "--count", "0"],
        r"--count: got 0; allowed a whole number from 1",
    ),
    "a count that is no number": (
        ["sample", "embedded:fashion-mnist", "--count", "many"],
        r"--count: got 'many'; allowed a whole number",
    ),
    "a negative seed": (
        ["sample", "embedded:fashion-mnist", "--seed", "-1"],
        r"--seed: got -1; allowed a whole number from 0",
    ),
    "no steps": (
        ["sample", "embedded:fashion-mnist", "--steps", "0"],
        r"--steps: got 0; allowed a whole number from 1",
    ),
    "a picture of no known kind": (
        ["sample", "embedded:fashion-mnist", "--out", "2.50"],
        r"--out: got '2\.50'; allowed a name in \.png",
    ),
    "a folder without a model": (["sample", str(POLICIES)], r"policies: got a folder with none of manifest\.json"),
    "an image too few": (
        ["evaluate", "embedded:fashion-mnist", "--images", "1"],
        r"--images: got 1; allowed a whole number from 2",
    ),
    "no timed runs": (["benchmark", str(POLICIES), "--runs", "0"], r"--runs: got 0"),
    "nothing to time": (
        ["benchmark", str(POLICIES)],
        r"policies: got nothing to time; allowed a run, .*ddpm-cifar10-32",
    ),
    "a policy that is not there": (
        ["benchmark", "ddpm-cifar10-32", "--policy", "no-such.yaml"],
        r"no-such\.yaml: got no such file; .* --policy FILE",
    ),
    "a name that no policy has": (
        ["run", "w4a9"],
        r"w4a9: got no file and no policy of that name; allowed a policy file, or one that ships: .*smoke, .*"
        r"did you mean w4a8\?",
    ),
    "a name of another kind": (["sweep", "w4a8"], r"w4a8: got no file and no policy of that name; .* bits, "),
    "a copy of nothing": (["policies", "--copy", "my.yaml"], r"got 0 names of policies; allowed one"),
    "a copy of two": (["policies", "w4a8", "w8a8", "--copy", "my.yaml"], r"got 2 names of policies; allowed one"),
    "a copy that is no policy": (["policies", "w4a8", "--copy", "x.txt"], r"--copy: got 'x\.txt'; allowed a name in"),
    "a copy of what does not ship": (["policies", "w4a9", "--copy", "x.yaml"], r"w4a9: got no policy that ships"),
    "a report of no run": (["report", str(POLICIES)], r"policies: got a folder without policy\.yaml; allowed"),
    "nothing to rehearse": (
        ["rehearse", str(POLICIES / "w4a8-sd15.yaml"), "--out", "x"],
        r"--model: got 'stable-diffusion-v1-5/.*'; allowed a denoiser's config\.json, .* architecture: "
        r".*sdxl-base-1\.0",
    ),
    "a file for a rehearsal": (
        ["rehearse", SMOKE, "--model", "ddpm-cifar10-32", "--out", SMOKE],
        r"--out: got .*, a file; allowed a folder",
    ),
    "a size that is none": (
        ["sensitivity", SMOKE, "--max-size", "small"],
        r"--max-size: got 'small'; allowed a share of float32 as 0\.15x, or megabytes as 2\.5MB",
    ),
    "no batch": (["benchmark", "x", "--batches", "[]"], r"--batches: got an empty list; allowed one value or more"),
    "a batch of none": (["benchmark", "x", "--batches", "[1,0]"], r"--batches: got 0; allowed a whole number from 1"),
    "a batch twice": (["benchmark", "x", "--batches", "[2,2]"], r"--batches: got 2 twice; allowed once"),
    "an unknown instruction set": (
        ["benchmark", "x", "--isa", "[native,sse]"],
        r"--isa: got 'sse'; allowed native, avx2, avx2_vnni, avx512",
    ),
    "a switch that is no switch": (
        ["benchmark", "x", "--throughput=3"],
        r"--throughput: got 3; allowed --throughput or --nothroughput",
    ),
    "a file for a folder": (
        ["benchmark", "x", "--out", SMOKE],
        r"--out: got '.*smoke\.yaml', a file; allowed a folder",
    ),
    "nothing to compare": (["compare"], r"got no run; allowed one or more folders of finished runs"),
    "a run that is not finished": (
        ["compare", "/no/such/run"],
        r"/no/such/run/report\.json: got no such file; allowed the folder of a finished run",
    ),
    "a run twice": (["compare", "runs/a", "runs/../runs/a"], r"runs/a: got the same folder twice; allowed once"),
    "a page of no known kind": (
        ["compare", "runs/a", "--out", "a.pdf"],
        r"--out: got 'a\.pdf'; allowed a name in \.html, or a folder",
    ),
    "a policy for a study": (
        ["sweep", SMOKE],
        r"smoke\.yaml:6: kind: got quantize, a policy for the command `run`; allowed study",
    ),
    "a study for a policy": (
        ["run", STUDY],
        r"studies/smoke\.yaml:6: kind: got study, a policy for the command `sweep`; allowed quantize",
    ),
    "no data to pretrain on": (
        ["pretrain", str(POLICIES / "pretrain-fashion-mnist.yaml"), "--set", "data.path=/no/such/data"],
        r"/no/such/data",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_code_2_and_a_message_and_leaves_nothing(call: Call, tmp_path: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    code, output, errors = call(*arguments)
    assert code == 2
    assert output == ""
    assert re.search(message, errors), errors
    assert len(errors) < 4096
    assert "Traceback" not in errors
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_typo_in_a_policy_is_named_with_file_line_and_key_from_the_shell(
    command_line: CommandLine, tmp_path: Path
) -> None:
    policy = tmp_path / "mine.yaml"
    policy.write_text(f"extends: {SMOKE}\nname: mine\nsampler:\n  steps: 10\n  sped: 3\n")
    done = command_line("run", policy, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(
        r"mine\.yaml:5: sampler\.sped: got an unknown key; allowed name, steps, float_steps, guidance_scale",
        done.stderr,
    )
    assert "Traceback" not in done.stderr


def test_a_rule_that_matches_nothing_is_an_error_before_any_training(call: Call, tiny_folder: Path) -> None:
    rules = '[{match: no_such_layer, weights: {bits: 8}, inputs: {bits: 8}}, {match: "type:Conv2d", keep_float: true}]'
    code, output, errors = call("plan", SMOKE, *sets(tiny_folder, f"quantization.layers={rules}"))
    assert (code, output) == (2, "")
    assert "no_such_layer" in errors


def test_feature_networks_that_do_not_fit_are_an_error(call: Call, tiny_folder: Path) -> None:
    code, _, errors = call("evaluate", tiny_folder, "--images", "2", "--steps", "1", "--features", "embedded:nothing")
    assert code == 2
    assert "--features: got 'embedded:nothing'; allowed embedded:digits, embedded:fashion-mnist" in errors


def test_faults_of_several_overrides_are_reported_at_once(call: Call) -> None:
    code, _, errors = call(
        "plan", SMOKE, "--set", "nme=x", "--set=training.seed=-3", "--set", "progressive.ladder=[4, 8]"
    )
    assert code == 2
    for key in ("nme", "training.seed", "progressive.ladder"):
        assert f"--set {key}" in errors


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["run", "a.yaml", "--resume"], ["run", '"a.yaml"', "--resume=True"]),
        (["run", "--resume", "a.yaml"], ["run", '"a.yaml"', "--resume=True"]),
        (["run", "a.yaml", "--out", "1e3"], ["run", '"a.yaml"', '--out="1e3"']),
        (["run", "a.yaml", "-o", "x"], ["run", '"a.yaml"', '--out="x"']),
        (["run", "--set", "a=1", "a.yaml", "--set=b=[1, 2]"], ["run", '"a.yaml"', '--set=["a=1", "b=[1, 2]"]']),
        (["sample", "x", "--count", "3", "--seed", "-1"], ["sample", '"x"', "--count=3", "--seed=-1"]),
        (["compare", "1", "a", "--out", "2", "b"], ["compare", '"1"', '"a"', '"b"', '--out="2"']),
        (["sweep", "a.yaml", "--dry-run"], ["sweep", '"a.yaml"', "--dry_run=True"]),
        (
            ["benchmark", "x", "--nothroughput", "--isa", "[avx2]"],
            ["benchmark", '"x"', "--throughput=False", '--isa=["avx2"]'],
        ),
        (["benchmark", "x", "--batches", "1, 8"], ["benchmark", '"x"', "--batches=[1,8]"]),
        (["run", "größe \U0001f600.yaml"], ["run", '"größe \U0001f600.yaml"']),
        (["run", "\udcff"], ["run", r"'\udcff'"]),
        (["schema"], ["schema"]),
        (["--", "--completion"], ["--", "--completion"]),
    ],
)
def test_arguments_reach_fire_so_that_it_reads_what_was_meant(given: list[str], read: list[str]) -> None:
    assert fire_arguments(cli.COMMANDS, given) == read


@pytest.mark.parametrize(
    "given",
    [
        ["benchmark", "x", "--noruns"],
        ["run", "a", "--noresume"],
        ["schema", "x"],
        ["schema", "--x"],
        ["run", "a", "--set"],
        ["run", "a", "-x", "1"],
        ["run", "a", "--"],
        ["compare", "--runs", "a"],
        ["bogus", "--x"],
    ],
)
def test_arguments_that_no_command_takes_are_refused(given: list[str]) -> None:
    with pytest.raises(UsageError):
        fire_arguments(cli.COMMANDS, given)


def test_a_folder_whose_name_is_a_number_stays_a_name(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "1e3").symlink_to(tiny_folder)
    code, output, _ = call("sample", "1e3", "--count", "1", "--steps", "1", "--out", "7.png")
    assert code == 0
    assert output.startswith("7.png: 1 images, 1 steps, pytorch")


# ---- commands --------------------------------------------------------------------------------------------------------


def test_plan_shows_every_layer_with_its_rule_and_bits_and_writes_nothing(
    call: Call, tiny_folder: Path, tiny_run: FinishedRun
) -> None:
    code, output, _ = call("plan", SMOKE, *sets(tiny_folder))
    assert code == 0
    layers = json.loads((tiny_run.path / "plan.json").read_text())["layers"]
    lines = output.splitlines()
    for layer in layers:
        found = [line for line in lines if re.search(rf"\b{re.escape(layer['name'])}\b", line)]
        assert any(layer["rule"] in line and str(layer["parameters"]) in line.replace(",", "") for line in found), (
            layer["name"]
        )
    assert not Path("runs").exists()


def test_overrides_on_the_command_line_reach_the_plan(call: Call, tiny_folder: Path) -> None:
    rules = '[{match: ["type:Conv2d", "type:Linear"], weights: {bits: 3}, inputs: {bits: 8}}]'
    more = ["--set", f"quantization.layers={rules}", "--set", "progressive.ladder=[8, 3]"]
    code, output, _ = call("plan", SMOKE, *sets(tiny_folder), *more)
    assert code == 0
    assert "type:Conv2d" in output
    assert "conv_in" in output
    assert "time_embedding.*" not in output


def test_what_looks_like_markup_is_shown_as_it_is(call: Call, tiny_folder: Path) -> None:
    rule = "quantization.layers.body.match=['re:(conv|[/a-z0-9._]+)', 'type:[L]inear']"
    code, output, _ = call("plan", SMOKE, *sets(tiny_folder, rule))
    assert code == 0
    assert "re:(conv|[/a-z0-9._]+)" in output
    code, _, errors = call("plan", SMOKE, *sets(tiny_folder, "quantization.layers.body.match='[/bold]'"))
    assert code == 2
    assert "got '[/bold]', which matches no Conv2d or Linear" in errors


def test_plan_says_which_pattern_that_fits_every_model_claims_nothing_of_this_one(
    call: Call, tiny_folder: Path
) -> None:
    def rules(pattern: str) -> str:
        every, more = (f"{{match: '{match}', weights: {{bits: 4}}, inputs: {{bits: 8}}}}" for match in ("*", pattern))
        return f"quantization.layers=[{every}, {more}]"

    code, output, _ = call("plan", SMOKE, *sets(tiny_folder, rules("role:input")))
    assert code == 0
    message = "quantization.layers[1].match: 'role:input' matches only layers that earlier rules have: [0] ('*')"
    assert f"note: {message}" in output
    code, _, errors = call("plan", SMOKE, *sets(tiny_folder, rules("role:first")))
    assert code == 2
    assert "got 'role:first'; allowed role:input, role:output, role:time" in errors


def test_model_on_the_command_line_wins_over_the_policy(call: Call, tiny_folder: Path) -> None:
    assert call("plan", SMOKE, "--model", tiny_folder) == call("plan", SMOKE, "--set", f"model.source={tiny_folder}")


@pytest.mark.parametrize(
    ("kind", "steps", "runtime"),
    [("", 2, "openvino"), ("openvino", 2, "openvino"), ("student", 2, "pytorch"), ("full", 20, "pytorch")],
)
def test_sample_takes_every_kind_of_folder(
    call: Call, tiny_run: FinishedRun, tiny_folder: Path, tmp_path: Path, kind: str, steps: int, runtime: str
) -> None:
    folder = tiny_folder if kind == "full" else tiny_run.path / kind
    code, output, _ = call("sample", folder, "--count", "2", "--out", "deep/grid.png")
    assert code == 0
    assert output == f"deep/grid.png: 2 images, {steps} steps, {runtime}\n"
    with Image.open(tmp_path / "deep" / "grid.png") as grid:
        assert grid.size == (3 * (33 * 2 - 1), 3 * 32)


def test_sampling_a_seed_twice_writes_the_same_bytes_and_another_seed_others(
    call: Call, tiny_run: FinishedRun, tmp_path: Path
) -> None:
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        call("sample", tiny_run.path / "student", "--count", "1", "--seed", str(seed), "--out", f"{name}.png")
    one, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other


def test_a_comparison_lies_beside_the_runs_unless_told_otherwise(
    call: Call, tiny_run: FinishedRun, tmp_path: Path
) -> None:
    code, output, _ = call("compare", tiny_run.path)
    assert code == 0
    page = tiny_run.path.parent / "comparison.html"
    assert output.endswith(f"page: {page}\n")
    assert page.is_file()
    assert list(tmp_path.iterdir()) == []
    assert call("compare", tiny_run.path, "--out", "mine.html")[1].endswith("page: mine.html\n")
    elsewhere = tmp_path / "elsewhere" / "run"
    elsewhere.mkdir(parents=True)
    report = json.loads((tiny_run.path / "report.json").read_text())
    (elsewhere / "report.json").write_text(json.dumps(report | {"seed": report["seed"] + 1}))
    code, output, errors = call("compare", tiny_run.path, elsewhere)
    assert (code, errors) == (0, "")
    assert output.endswith(f"page: {page}\n")  # beside the first


def test_a_finished_runs_report_is_made_again_from_its_folder_alone(
    call: Call, tiny_run: FinishedRun, tmp_path: Path
) -> None:
    page = tiny_run.path / "report.html"
    before, page_before = json.loads((tiny_run.path / "report.json").read_text()), page.read_bytes()
    page.unlink()
    code, output, _ = call("report", tiny_run.path)
    assert code == 0
    assert f"report:   {page}" in output
    after = json.loads((tiny_run.path / "report.json").read_text())
    assert {**after, "created": ""} == {**before, "created": ""}
    assert abs(len(page.read_bytes()) - len(page_before)) < 64
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(
    call: Call, tiny_run: FinishedRun, tiny_folder: Path, tmp_path: Path
) -> None:
    code, output, _ = call("run", SMOKE, *sets(tiny_folder), "--dry-run")
    assert code == 0
    assert re.search(r"(\d+) of \1 stages to do", output)
    assert "folder: runs/tiny" in output
    assert re.search(r"^ *pq +to do +\d+", output, re.MULTILINE)
    assert "MB are wanted at most" in output
    assert "layers quantized" in output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_on_a_run_says_which_stages_stay(call: Call, tiny_run: FinishedRun) -> None:
    policy, before = tiny_run.path / "policy.yaml", content(tiny_run.path)
    code, output, _ = call("run", policy, "--out", tiny_run.path, "--resume", "--dry-run")
    assert code == 0
    assert re.search(r"\b0 of \d+ stages to do", output)
    more = ("--set", "evaluation.seed=7")
    code, output, _ = call("run", policy, "--out", tiny_run.path, "--resume", "--dry-run", *more)
    assert code == 0
    assert re.search(r"^ *pq +kept", output, re.MULTILINE)
    assert re.search(rf"^ *samples-{FP32} +again: evaluation\.seed", output, re.MULTILINE)
    assert call("run", policy, "--out", tiny_run.path, "--dry-run")[0] == 2
    assert content(tiny_run.path) == before


def test_the_policies_that_ship_are_listed_shown_and_copied(call: Call, tmp_path: Path) -> None:
    code, output, _ = call("policies")
    assert code == 0
    assert re.search(r"^ *w4a8 +run +The default: 4-bit weights", output, re.MULTILINE)
    assert call("policies", "w4a8")[1] == (POLICIES / "w4a8.yaml").read_text()
    assert call("policies", "w4a8-sd15", "--copy", "my.yaml")[1] == "written: my.yaml\nwritten: prompts.txt\n"
    code, _, errors = call("policies", "w4a8-sd15", "--copy", "my.yaml")
    assert (code, errors) == (2, "error: --copy: got my.yaml, which is there; allowed a new file\n")


@pytest.mark.parametrize("columns", [80, 50])
def test_narrow_terminals_are_shown_whole_names(
    call: Call, tiny_run: FinishedRun, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(console, "CONSOLE", Console(width=columns, markup=False))
    output = call("plan", SMOKE, *sets(tiny_folder))[1] + call("report", tiny_run.path)[1]
    layers = json.loads((tiny_run.path / "plan.json").read_text())["layers"]
    assert all(layer["name"] in output for layer in layers)
    assert PQCAD_OPENVINO in output
    assert "…" not in output


def test_the_version_is_that_of_the_package(call: Call) -> None:
    assert call("--version") == (0, f"pqcad-qat {__version__}\n", "")


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (None, 0), (False, 3)])
def test_check_ends_with_a_code_of_its_own_where_a_target_does_not_hold(
    call: Call, tiny_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holds: bool | None, code: int
) -> None:
    report = json.loads((tiny_run.path / "report.json").read_text())
    goal = {"name": "a goal", "measured": 1.0, "comparison": "<=", "bound": 2.0, "holds": holds, "unit": "", "note": ""}
    (tmp_path / "report.json").write_text(json.dumps({**report, "targets": [goal]}))
    monkeypatch.setattr("pqcad_qat.commands.run.run", lambda *_, **__: tmp_path / "report.html")
    ended, output, _ = call("run", SMOKE, "--out", tmp_path, "--check")
    assert (ended, "1 of 1 targets do not hold" in output) == (code, code == 3)
    assert call("run", SMOKE, "--out", tmp_path)[0] == 0


def test_evaluate_prints_json_that_agrees_with_the_runs_own_report(call: Call, tiny_run: FinishedRun) -> None:
    code, output, _ = call("evaluate", tiny_run.path, "--images", "8")
    assert code == 0
    found = json.loads(output)
    report = json.loads((tiny_run.path / "report.json").read_text())
    reported = next(row["fid_real"] for row in report["variants"] if row["name"] == PQCAD_OPENVINO)
    assert found["fid_real"] == pytest.approx(reported, rel=1e-3)
    assert found["fid_protocol"].items() >= {**report["fid_protocol"], "steps": 2}.items()


def test_an_embedded_model_is_evaluated_with_the_features_of_its_data(call: Call) -> None:
    code, output, _ = call("evaluate", "embedded:digits", "--images", "2", "--steps", "1")
    assert code == 0
    assert json.loads(output)["fid_protocol"]["features"] == "embedded:digits"


@pytest.mark.long
def test_benchmark_of_a_run_counts_whole_images_and_leaves_json_and_a_page(
    call: Call, tiny_run: FinishedRun, tmp_path: Path
) -> None:
    """A copy of full precision's graph stands for NNCF's."""
    with without_trials():
        code, output, _ = call("benchmark", tiny_run.path, "--batches", "2", "--runs", "1", "--nothroughput")
    assert code == 0
    for name in (FP32, OV_FP32, NNCF_INT8, PQCAD_OPENVINO):
        assert re.search(rf"^ *{name} +\d", output, re.MULTILINE)
    assert "an image takes ours 2" in output
    document = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())
    assert document["command"].startswith("python -m pqcad_qat")
    assert [(part["isa"], part["batch"]) for part in document["measurements"]] == [("native", 2)]
    assert (tmp_path / "benchmark" / "benchmark.html").is_file()


@pytest.mark.long
def test_benchmark_of_an_architecture_under_a_smaller_instruction_set_says_so_in_its_json(
    command_line: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(unet_config()))
    flags = [
        "--isa",
        "avx2",
        "--batches",
        "1",
        "--runs",
        "1",
        "--nothroughput",
        "--policy",
        str(POLICIES / "w4a8.yaml"),
        "--out",
        "found",
    ]
    done = command_line("benchmark", "tiny.json", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (measurement,) = json.loads((tmp_path / "found" / "benchmark.json").read_text())["measurements"]
    assert (measurement["isa"], measurement["hardware"]["settings"]["ONEDNN_MAX_CPU_ISA"]) == ("avx2", "AVX2")
    assert measurement["left_out"] == {OV_BF16: "bfloat16 is emulated here"}
    rows = {row["name"]: row for row in measurement["rows"]}
    assert set(rows) == {FP32, OV_FP32, NNCF_INT8, PQCAD_OPENVINO}
    assert {row["throughput"] for row in rows.values()} == {None}
    ours = rows[PQCAD_OPENVINO]
    assert (ours["inference_precision"], ours["planned_float"]) == ("f32", [])
    kernels = [kernel for row in measurement["rows"] for kernel in row["kernels"]]
    assert kernels
    assert not [kernel for kernel in kernels if "avx512" in kernel or "amx" in kernel]


# ---- runs that are not begun -----------------------------------------------------------------------------------------


def content(path: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(path.rglob("*"))}


def test_an_existing_run_is_refused_without_resume_and_left_untouched(
    call: Call, tiny_run: FinishedRun, tiny_folder: Path
) -> None:
    before = content(tiny_run.path)
    code, _, errors = call("run", SMOKE, *sets(tiny_folder), "--out", tiny_run.path)
    assert code == 2
    assert "holds a run already; allowed --resume, which goes on with it" in errors
    assert content(tiny_run.path) == before


def test_a_second_process_on_a_run_is_refused(call: Call, tiny_run: FinishedRun, tiny_folder: Path) -> None:
    with open_run(tiny_run.path, tiny_run.policy, resume=True):
        code, _, errors = call("run", SMOKE, *sets(tiny_folder), "--out", tiny_run.path, "--resume")
    assert code == 2
    assert "a run that another process is running" in errors
