"""The command `profile`: the policy's own step, quantized, in transition and in floating point; nothing here asserts a
speed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import POLICIES, tiny_overrides

from pqcad_qat import cli, console
from pqcad_qat.commands import profile as profile_module
from pqcad_qat.commands.profile import profile
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.variants import FIXED_BIT, PQ
from pqcad_qat.quantization.conversion import quantized_layers
from pqcad_qat.quantization.layer_state import blend_state, read_bits
from pqcad_qat.report.tables import PROFILED
from pqcad_qat.training.step_profile import StepProfile, profile_steps


def test_its_models_are_what_the_columns_say(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder))
    seen = {}

    def looking(candidates: dict, *rest: object, **named: object) -> dict[str, StepProfile]:  # type: ignore[type-arg]
        found = profile_steps(candidates, *rest, **named)  # type: ignore[arg-type]
        seen.update({name: quantized_layers(model) for name, (model, _) in candidates.items()})
        return found

    monkeypatch.setattr(profile_module, "profile_steps", looking)
    costs = profile(policy, 1, Console(quiet=True))
    assert list(costs) == list(PROFILED) == list(seen)
    assert not seen["float"]
    assert all(
        read_bits(layer)[0] == layer.plan.weights.bits and blend_state(layer) is None
        for layer in seen[FIXED_BIT].values()
    )
    ways = [blend_state(layer) for layer in seen[PQ].values() if len(layer.plan.ladder) > 1]
    assert ways
    assert all(blend is not None and 0.4 < blend.share < 0.6 for blend in ways)
    assert costs["float"].kept_bytes < costs[FIXED_BIT].kept_bytes


def test_the_command_prints_every_part_and_writes_nothing_and_an_architecture_is_enough(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, empty = tmp_path / "config.json", tmp_path / "empty"
    config.write_bytes((tiny_folder / "unet" / "config.json").read_bytes())
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setattr(console, "CONSOLE", Console(width=160))
    flags = [f"--set={override}" for override in tiny_overrides(config)]
    cli.main(["profile", str(POLICIES / "smoke.yaml"), "--runs", "1", *flags])
    printed = capsys.readouterr().out
    for text in ("forward", "backward", "optimizer", "times float", "between two widths", "one step of 4 states"):
        assert text in printed
    assert "states a second" in printed
    assert re.search(r"largest resident memory of this process: [\d,]+ MB", printed)
    cli.main(["profile", str(POLICIES / "smoke.yaml"), "--runs", "1", "--only", "p*", *flags])
    printed = capsys.readouterr().out
    assert "between two widths" in printed
    assert "floating point" not in printed
    with pytest.raises(SystemExit):
        cli.main(["profile", str(POLICIES / "smoke.yaml"), "--only", "x*", *flags])
    assert "--only: got 'x*', which matches no candidate; allowed a glob on float, " in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"config.json", "empty"}
