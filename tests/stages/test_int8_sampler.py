"""Quantized variants that sample from INT8 graphs of their own: which ones do, and that their images are those of
simulated quantizers.

Not here: the graphs that ship (whole_runs/), and what else a run samples (test_samplers.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import POLICIES, tiny_overrides, without_page
from torch import Tensor

from pqcad_qat.commands.run import run
from pqcad_qat.errors import ExportError
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.policy.schema import Policy
from pqcad_qat.policy.variants import FP32, IN_INT8, PTQ, SIMULATED
from pqcad_qat.quality.fidelity import paired_psnr
from pqcad_qat.stages import int8_sampler


@dataclass(frozen=True)
class Sampled:
    """What a run left."""

    path: Path

    @property
    def report(self) -> Any:
        return json.loads((self.path / "report.json").read_text())

    @property
    def runtimes(self) -> dict[str, str]:
        return {row["name"]: row["runtime"] for row in self.report["variants"]}

    def images(self, name: str) -> Tensor:
        return load_file(self.path / "samples" / f"{name}.safetensors")["images"]


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> Policy:
    """Post-training quantization alone, in batches that do not divide the images."""
    few = (f"evaluation.variants=[{FP32},{PTQ}]", "evaluation.images=5", "evaluation.batch_size=3")
    return load_policy(POLICIES / "smoke.yaml", tiny_overrides(tiny_folder, *few, "sampler.float_steps=1"))


def sampled(policy: Policy, path: Path) -> Sampled:
    with without_page():
        run(policy, path, "command", Console(quiet=True))
    return Sampled(path)


@pytest.fixture(scope="module")
def simulated(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    return sampled(policy, tmp_path_factory.mktemp("runs") / "simulated")


def test_images_of_the_graph_are_those_of_simulated_quantizers(
    policy: Policy, simulated: Sampled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_sampler, "WORTH_A_GRAPH", 0)
    own = sampled(policy, simulated.path.with_name("own"))
    assert own.runtimes[PTQ] == IN_INT8
    assert simulated.runtimes[PTQ] == SIMULATED
    assert torch.equal(own.images(FP32), simulated.images(FP32))
    # full precision is far from both: rounding is no small matter here
    apart, from_full = (paired_psnr(own.images(PTQ), other) for other in (simulated.images(PTQ), own.images(FP32)))
    assert apart is None or (from_full is not None and apart > from_full + 6)
    assert own.report["warnings"] == []
    assert not [left for left in own.path.iterdir() if left.name.startswith(".int8-")]
    # runs side by side share no images of trained models, and the report of a resumed run says the same
    (own.path / "report.json").unlink()
    with without_page():
        run(policy, own.path, "command", Console(quiet=True), resume=True)
    assert own.runtimes[PTQ] == IN_INT8


def test_a_graph_that_is_not_proven_is_told_and_simulated(
    policy: Policy, simulated: Sampled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ExportError("its graph: got body.0 in bf16; allowed i8")

    monkeypatch.setattr(int8_sampler, "WORTH_A_GRAPH", 0)
    monkeypatch.setattr(int8_sampler, "refuse_float", refuse)
    refused = sampled(policy, simulated.path.with_name("refused"))
    assert refused.runtimes[PTQ] == SIMULATED
    assert torch.equal(refused.images(PTQ), simulated.images(PTQ))
    (warning,) = refused.report["warnings"]
    assert f"sample {PTQ}" in warning
    assert "body.0 in bf16" in warning


def test_other_integers_are_refused(policy: Policy, simulated: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares with the integers that the model has, not with those of the graph."""
    proven = int8_sampler.layer_parity

    def altered(folder: Path, layers: Any, inputs: Any) -> Any:
        name, layer = next(iter(layers.items()))
        layer = type(layer)(**{**vars(layer), "input_scale": 2 * layer.input_scale})
        return proven(folder, {**layers, name: layer}, inputs)

    monkeypatch.setattr(int8_sampler, "WORTH_A_GRAPH", 0)
    monkeypatch.setattr(int8_sampler, "layer_parity", altered)
    refused = sampled(policy, simulated.path.with_name("other"))
    assert refused.runtimes[PTQ] == SIMULATED
    assert "integers that are not PyTorch's" in refused.report["warnings"][0]


def test_little_work_an_accelerator_and_full_precision_have_no_graph(
    policy: Policy, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Weights:
        bits = 7

    class Layer:
        weights = Weights

    class Prepared:
        model = tiny_model
        plan = (Layer,)

    parameters = sum(parameter.numel() for parameter in tiny_model.denoiser.parameters())
    work = policy.evaluation.images * policy.sampling_steps(PTQ) * parameters
    monkeypatch.setattr(int8_sampler, "WORTH_A_GRAPH", work)
    assert int8_sampler.in_int8(policy, Prepared, PTQ)  # type: ignore[arg-type]
    assert not int8_sampler.in_int8(policy, Prepared, FP32)  # type: ignore[arg-type]
    for vnni, bits in ((True, 8), (False, 7), (False, 8)):
        monkeypatch.setattr(int8_sampler, "has_vnni", lambda vnni=vnni: vnni)
        Weights.bits = bits
        assert int8_sampler.in_int8(policy, Prepared, PTQ) == (vnni or bits < 8)  # type: ignore[arg-type]
    Weights.bits = 7
    monkeypatch.setattr(int8_sampler, "accelerator", lambda: torch.device("cpu"))
    assert not int8_sampler.in_int8(policy, Prepared, PTQ)  # type: ignore[arg-type]
    monkeypatch.setattr(int8_sampler, "accelerator", lambda: None)
    monkeypatch.setattr(int8_sampler, "WORTH_A_GRAPH", work + 1)
    assert not int8_sampler.in_int8(policy, Prepared, PTQ)  # type: ignore[arg-type]
