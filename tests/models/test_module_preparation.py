"""Modules of a user's own: what cannot be deployed is told by the plan, what the plan takes ends in INT8 with PyTorch's
integers.

Not here: diffusers' classes, and that an `OwnModel` is a source of models (test_architectures.py).
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_networks import DEPLOYED, REFUSED, SHAPE, WIDTH, Network, conv, image, network, rows
from rich.console import Console
from small_networks import rule
from tiny_runs import POLICIES, QUIET, TINY
from torch import nn
from torch.nn.utils import parametrizations

from pqcad_qat import cli
from pqcad_qat.commands import run as pipeline
from pqcad_qat.errors import ModelError, PqcadError, UsageError
from pqcad_qat.models.denoiser import predict
from pqcad_qat.models.families.family import ConditionInput
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.module_preparation import hold_statistics, plain_module
from pqcad_qat.models.own_model import OwnModel, built, own_model_of, schedule_notes
from pqcad_qat.policy.layer_rules import numbered
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FIXED_BIT, FP32, PQCAD_OPENVINO
from pqcad_qat.quantization.plan import plan_layers
from pqcad_qat.quantization.plan_facts import expected_bytes, float_layers
from pqcad_qat.quantization.quantizable_layers import float_kind, quantizable_layers
from pqcad_qat.stages.prepared import planned_shapes, with_own_model

SCHEDULER = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": False}
EVERY_LAYER = '[{match: ["type:Conv2d", "type:Linear"], weights: {bits: 4}, inputs: {bits: 8, symmetric: false}}]'


def given(name: str, build: Any, *more: str) -> tuple[Policy, OwnModel]:
    """A policy that plans every layer, and the module that it is for."""

    def seeded() -> Any:
        torch.manual_seed(0)
        return build()

    own = OwnModel(name, seeded, SHAPE, SCHEDULER)
    every = ("evaluation.features=none", "quantization.attention=float", *more)
    overrides = (f"quantization.layers={EVERY_LAYER}", *every)
    return with_own_model(load_policy(POLICIES / "smoke.yaml", [*TINY, *overrides]), own), own


@pytest.mark.parametrize("name", DEPLOYED)
def test_what_the_plan_takes_was_deployed_on_trial_with_every_planned_layer_in_int8_and_exact(name: str) -> None:
    build, floating = DEPLOYED[name]
    denoiser, plan, _ = planned_shapes(*given(name, build))
    assert {layer: float_kind(denoiser.get_submodule(layer)) for layer in float_layers(denoiser, plan)} == floating
    assert [layer.name for layer in plan] == [layer for layer in quantizable_layers(denoiser) if layer not in floating]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_or_deployed_is_refused_by_the_plan_in_one_line(name: str) -> None:
    build, said = REFUSED[name]
    with pytest.raises(PqcadError, match=said) as caught:
        planned_shapes(*given(name, build))
    assert "\n" not in str(caught.value)
    assert f"module:{name}" in str(caught.value)


def test_attention_in_int8_is_computed_once_by_a_module_or_refused_with_the_key() -> None:
    with pytest.raises(
        PqcadError,
        match=r"quantization\.attention: got int8; .* by the network itself 2 times; allowed once .*, or float",
    ):
        planned_shapes(*given("attended", DEPLOYED["attended-twice"][0], "quantization.attention=int8"))
    build = DEPLOYED["attention-and-recurrence"][0]
    assert planned_shapes(*given("attention", build, "quantization.attention=int8"))[1]


def test_a_comma_in_a_layers_path_is_refused_with_its_rule() -> None:
    def build() -> nn.Module:
        return network(lambda self, h, t: self.mid(self.parts["a,b"](h)), parts=nn.ModuleDict({"a,b": conv()}))

    with pytest.raises(PqcadError, match=r"names parts\.a,b: a comma in its path"):
        planned_shapes(*given("comma", build))


@pytest.mark.parametrize("shape", [(3, 8), (3, -8, 8), (3, 8.0, 8), "888", (0, 8, 8)])
def test_a_sample_shape_that_is_none_is_refused(shape: Any) -> None:
    own = OwnModel("shape", Network, shape, SCHEDULER)
    with pytest.raises(ModelError, match=r"module:shape: sample_shape: got .*; allowed \(C, H, W\)"):
        load_model(own.source, own=own)


def test_conditions_are_condition_inputs_of_known_sizes() -> None:
    own = OwnModel("conditions", Network, SHAPE, SCHEDULER, conditions=({"name": "tone"},))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"conditions: got \{'name': 'tone'\}; allowed ConditionInput"):
        load_model(own.source, own=own)
    own = replace(own, conditions=(ConditionInput("tone", (-2,), "float32"),))
    with pytest.raises(ModelError, match=r"conditions: tone: got shape \(-2,\)"):
        load_model(own.source, own=own)


@pytest.mark.parametrize(
    "name", ["reparametrized", "orthogonal", "pruned", "compiled", "double", "inference-tensors", "frozen"]
)
def test_a_module_is_made_plain_without_changing_what_it_predicts(name: str) -> None:
    torch.manual_seed(0)
    module = DEPLOYED[name][0]().eval()
    x, t = torch.randn(2, *SHAPE), torch.tensor([3, 900])
    inner = getattr(module, "_orig_mod", module)  # compiling it takes half a minute
    with torch.no_grad():
        before = copy.deepcopy(inner).float()(x, t) if name == "double" else inner(x, t)
        plain = plain_module(module, "module:plain")
        torch.testing.assert_close(predict(plain, x, t), before, rtol=1e-5, atol=1e-6)
    layers = {layer for layer, part in plain.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    assert set(quantizable_layers(plain)) == layers
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in plain.parameters())


def test_running_statistics_stay_while_the_network_trains() -> None:
    training = nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.Dropout(0.5)).train()
    hold_statistics(training)
    assert [part.training for part in training] == [True, False, True]
    mean = training[1].running_mean.clone()
    training(torch.randn(2, WIDTH, 8, 8) + 3)
    assert torch.equal(training[1].running_mean, mean)


def test_a_weight_that_two_layers_share_takes_its_bytes_once_and_its_integers_twice() -> None:
    shared = DEPLOYED["tied"][0]()
    example = torch.zeros(1, *SHAPE), torch.zeros(1)
    weight, total = shared.mid.weight.numel(), sum(parameter.numel() for parameter in shared.parameters())
    rules = (numbered([rule(*names, bits=8)]) for names in (("mid", "two"), ("mid",)))
    both, one = (plan_layers(shared, every, (), example) for every in rules)
    assert expected_bytes(shared, both, packed=False) == 4 * (total - weight) + 2 * (weight + 4 * WIDTH)
    assert expected_bytes(shared, one, packed=False) == 4 * total + weight + 4 * WIDTH


class Everything(Network):
    """A layer called twice, one before a normalization, one of one output, a reparametrized one, a constant, and others
    in float.
    """

    def __init__(self) -> None:
        super().__init__(nn.Sequential(conv(bias=False), nn.BatchNorm2d(WIDTH)))
        self.line, self.last = nn.Conv1d(WIDTH, WIDTH, 1), nn.Linear(WIDTH, WIDTH, bias=False)
        self.one, self.place = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)
        self.narrow = parametrizations.spectral_norm(conv())
        self.register_buffer("table", torch.randn(1, 64, WIDTH))

    def middle(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = h + image(self.last(F.silu(self.last(rows(h)))) + self.place(self.table).expand(len(h), -1, -1), h)
        h = self.mid(h) + self.one(self.embedding(t))[:, :, None, None]
        return self.narrow(F.silu(h)) + self.line(h.flatten(2)).view(h.shape)  # type: ignore[no-any-return]


@pytest.mark.long
def test_a_run_ends_as_its_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqcad_qat.timing.latency.usable_cores", lambda: 1)
    few = ("progressive.steps=2", "distillation.steps=2", *QUIET)
    policy, own = given("everything", Everything, f"evaluation.variants=[{FP32},{PQCAD_OPENVINO}]", *few)
    path = pipeline.run(policy, tmp_path / "run", "command", Console(quiet=True), model=own).parent
    plan, report = (json.loads((path / name).read_text()) for name in ("plan.json", "report.json"))
    planned = [layer["name"] for layer in plan["layers"]]
    assert planned == ["time", "enter", "leave", "mid.0", "last", "one", "narrow"]
    assert (
        report["execution"]["executed_int8"]
        == report["execution"]["planned"]
        == report["parity"]["layers_exact"]
        == len(planned)
    )
    floating = {"line": "Conv1d", "place": "Linear, reads a constant"}
    assert plan["float_layers"] == list(floating) == report["execution"]["float_layers"]
    assert (
        plan["float_kinds"]
        == floating
        == {row["layer"]: row["kind"] for row in report["layers"] if row["weight_bits"] is None}
    )
    page = (path / "report.html").read_text()
    assert "Linear, reads a constant" in page
    assert "Conv1d" in page


# ---- from the command line
# ---------------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = '[{match: "type:Conv2d", weights: {bits: 4}, inputs: {bits: 8}}]'

FILE = """
from beside import SHAPE
from torch import nn

from pqcad_qat.models.own_model import OwnModel


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, t):
        return self.leave(self.enter(x).relu())


def mine():
    return OwnModel("mine", Plain, SHAPE, {"num_train_timesteps": 1000})


def number():
    return 3


def failing():
    raise OSError("weights.pt: no such file")
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the user's own, and one beside it that it imports."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("SHAPE = (1, 8, 8)\n")
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return path


def test_plan_takes_a_module_from_a_file_of_the_users_own(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("evaluation.features=none", "quantization.attention=float", f"quantization.layers={CONVOLUTIONS}")
    flags = [f"--set={override}" for override in (*TINY, *more)]
    cli.main(["plan", str(POLICIES / "smoke.yaml"), "--module", f"{file}:mine", *flags])
    shown = capsys.readouterr().out
    assert all(layer in shown for layer in ("enter", "leave"))


@pytest.mark.parametrize("command", ["sensitivity", "profile"])
def test_a_module_is_measured_by_other_commands_too(
    command: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("evaluation.features=none", "quantization.attention=float", f"quantization.layers={CONVOLUTIONS}")
    flags = [f"--set={override}" for override in (*TINY, *more)]
    few = {
        "sensitivity": ["--states", "4", "--widths", "3", "--out", str(tmp_path / "measured")],
        "profile": ["--runs", "1"],
    }
    cli.main([command, str(POLICIES / "smoke.yaml"), "--module", f"{file}:mine", *few[command], *flags])
    shown = capsys.readouterr().out
    assert ("leave" if command == "sensitivity" else FIXED_BIT) in shown
    if command == "sensitivity":
        assert json.loads((tmp_path / "measured" / "sensitivity.json").read_text())["model"] == "module:mine"


def test_what_a_schedule_leaves_to_defaults_is_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can see that a schedule is the wrong one."""
    more = ("evaluation.features=none", "quantization.attention=float", f"quantization.layers={CONVOLUTIONS}")
    flags = [f"--set={override}" for override in (*TINY, *more)]
    cli.main(["plan", str(POLICIES / "smoke.yaml"), "--module", f"{file}:mine", *flags])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "note: module:mine: scheduler_config leaves keys to diffusers' defaults: prediction_type epsilon, "
        "timestep_spacing leading, clip_sample true, beta_schedule linear, beta_start 0.0001, beta_end 0.02; give"
    ) in said
    whole = {"prediction_type": "epsilon", "timestep_spacing": "trailing", "clip_sample": False}
    curve = {"num_train_timesteps": 9, **whole, "beta_schedule": "squaredcos_cap_v2"}
    listed = {"num_train_timesteps": 2, **whole, "trained_betas": [0.1, 0.2]}
    flowing = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert [list(schedule_notes("module:mine", config)) for config in (curve, listed, flowing)] == [[], [], []]


def test_a_misspelt_key_of_a_schedule_is_refused() -> None:
    schedule = {"num_train_timesteps": 9, "beta_schedul": "linear"}
    with pytest.raises(
        ModelError, match=r"scheduler_config: got 'beta_schedul'; allowed keys of DDIMScheduler: .*beta_schedule"
    ):
        built(OwnModel("mine", lambda: nn.Conv2d(1, 1, 1), (1, 8, 8), schedule))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("nets.py", r"^--module: got 'nets\.py'; allowed FILE\.py:FUNCTION$"),
        ("nets:mine", r"^--module: got 'nets:mine'; allowed FILE\.py:FUNCTION$"),
        ("none.py:mine", r"^--module: got 'none\.py', where no file is; allowed a Python file$"),
        ("nets.py:other", r"^--module: got 'other', which nets\.py does not define; allowed a function$"),
        ("nets.py:number", r"^--module: got int from nets\.py:number; allowed a function that returns an OwnModel$"),
        (
            "nets.py:failing",
            r"^--module: got OSError: weights\.pt: .* \(nets\.py:\d+\) from nets\.py:failing; allowed an OwnModel$",
        ),
    ],
)
def test_what_names_no_module_is_refused_in_one_line(
    named: str, said: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    with pytest.raises(UsageError, match=said):
        own_model_of(named)


def test_a_policy_alone_names_no_module() -> None:
    policy = load_policy(POLICIES / "smoke.yaml", ["model.source=module:mine"])
    with pytest.raises(ModelError, match=r"model\.source: got 'module:mine', .*; allowed with --module FILE"):
        planned_shapes(policy)
