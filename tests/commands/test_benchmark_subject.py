"""What is taken for a folder of ours or an architecture, what is made of it, and what is refused.

Not here: its timing (test_benchmark_command.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
from deployed_fixture import deployed_unet
from small_networks import unet_config
from tiny_runs import POLICIES, SCHEDULER

from pqcad_qat.commands.benchmark_subject import Subject, candidates, open_subject
from pqcad_qat.errors import ModelError, PlanError, PolicyError
from pqcad_qat.export.execution import execution_precision
from pqcad_qat.policy.variants import NNCF_INT8, OV_BF16, OV_FP32, PQCAD_OPENVINO, spec_of
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.timing.baseline_trials import HYBRID
from pqcad_qat.timing.latency import size_bytes

POLICY = POLICIES / "w4a8.yaml"


def written(path: Path, config: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("architecture")
    return open_subject(str(written(folder / "mine.json", unet_config())), POLICY, folder / "made")


def test_an_architecture_is_quantized_by_the_policys_rules_and_deployed_by_our_exporter(architecture: Subject) -> None:
    layers = read_manifest(architecture.folder)["layers"]
    middle = {name.rpartition(".")[2]: entry["weight_bits"] for name, entry in layers.items() if name[:3] == "mid"}
    assert middle.pop("time_emb_proj") == 7
    assert set(middle.values()) == {4}
    assert layers["conv_out"]["weight_bits"] == 7
    assert "conv_in" not in layers
    assert "up_blocks.1.resnets.0.conv_shortcut.left" in layers
    assert execution_precision(architecture.folder, layers).float_layers == ()
    assert (architecture.sample_shape, architecture.steps, architecture.weights) == ((1, 8, 8), None, "random")


def test_another_policys_rules_are_taken_where_it_is_named(tmp_path: Path) -> None:
    found = open_subject(str(written(tmp_path / "mine.json", unet_config())), POLICIES / "w8a8.yaml", tmp_path / "made")
    assert {entry["weight_bits"] for entry in read_manifest(found.folder)["layers"].values()} == {8}


def test_a_deployed_folder_and_the_run_that_holds_it_are_taken_as_they_are(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(deployed_unet(tmp_path_factory).int8, tmp_path / "run" / "openvino"))
    for source in (tmp_path / "run", folder):
        found = open_subject(str(source), Path("no-such-policy.yaml"), tmp_path / "made")
        assert (found.folder, found.sample_shape, found.steps, found.weights) == (
            folder,
            (1, 32, 32),
            None,
            "of the folder",
        )
    assert not (tmp_path / "made").exists()


def test_the_steps_of_an_image_are_those_that_the_folder_says(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(deployed_unet(tmp_path_factory).int8, tmp_path / "deployed"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["provenance"]["sampling_steps"] = 7
    written(folder / "manifest.json", manifest)
    assert open_subject(str(folder), POLICY, tmp_path).steps == 7


@pytest.mark.parametrize("place", ["config.json", "unet/config.json"])
def test_a_folder_in_diffusers_layout_is_an_architecture_with_its_schedulers_time_steps(
    tmp_path: Path, place: str
) -> None:
    written(tmp_path / "model" / place, unet_config())
    written(tmp_path / "model" / "scheduler" / "scheduler_config.json", SCHEDULER | {"num_train_timesteps": 77})
    found = open_subject(str(tmp_path / "model"), POLICY, tmp_path / "made")
    assert read_manifest(found.folder)["train_timesteps"] == found.train_timesteps == 77


def test_baselines_are_made_for_the_batch_and_of_the_same_architecture(architecture: Subject, tmp_path: Path) -> None:
    made = candidates(architecture, 3, tmp_path)
    assert set(made.files) == {OV_FP32, OV_BF16, NNCF_INT8, PQCAD_OPENVINO}
    assert made.files[PQCAD_OPENVINO] == architecture.folder
    for name in (OV_FP32, NNCF_INT8):
        model = ov.Core().read_model(made.files[name])
        assert [list(port.shape) for port in model.inputs] == [[3, 1, 8, 8], [3]]
    assert size_bytes(made.files[NNCF_INT8].with_suffix(".bin")) < size_bytes(made.files[OV_FP32].with_suffix(".bin"))


@pytest.mark.long
def test_nncf_gets_a_row_in_each_setting_that_is_asked_for(architecture: Subject, tmp_path: Path) -> None:
    made = candidates(architecture, 1, tmp_path, ("defaults", HYBRID))
    hybrid = f"{NNCF_INT8} {HYBRID}"
    assert {name for name in made.files if spec_of(name).name == NNCF_INT8} == {NNCF_INT8, hybrid}
    operations = {name: ov.Core().read_model(made.files[name]).get_ordered_ops() for name in (NNCF_INT8, hybrid)}
    quantizers = {name: sum(op.get_type_name() == "FakeQuantize" for op in found) for name, found in operations.items()}
    assert quantizers[hybrid] < quantizers[NNCF_INT8]  # inputs of linear layers stay as they are


FAULTS: dict[str, tuple[Any, str]] = {
    "an unknown class": (
        unet_config(_class_name="UNet1DModel"),
        r"_class_name: got 'UNet1DModel'; allowed UNet2DModel, ",
    ),
    "an unknown block": (
        unet_config(down_block_types=["Nope", "Nope"]),
        r"down_block_types: got 'Nope'; allowed DownBlock2D, ",
    ),
    "a size in words": (
        unet_config(sample_size="large"),
        r"sample_size: got 'large'; allowed a whole number from 1 to 2048 or \[height, width\]",
    ),
    "a list": ([], r"got a JSON list; allowed an object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_config_that_makes_no_denoiser_is_refused(tmp_path: Path, fault: str) -> None:
    config, message = FAULTS[fault]
    with pytest.raises(ModelError, match=message):
        open_subject(str(written(tmp_path / "config.json", config)), POLICY, tmp_path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(ModelError, match=r"weights\.bin: got a checkpoint in a single file"):
        open_subject(str(tmp_path / "weights.bin"), POLICY, tmp_path)


def test_nothing_to_time_is_refused_with_what_would_be(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"got nothing to time; allowed a run, .* architecture: .*ddpm-cifar10-32"):
        open_subject(str(tmp_path), POLICY, tmp_path)


def test_an_architecture_needs_a_policy_whose_rules_fit(tmp_path: Path) -> None:
    config = str(written(tmp_path / "mine.json", unet_config()))
    with pytest.raises(ModelError, match=r"no-such\.yaml: got no such file; .* --policy FILE"):
        open_subject(config, Path("no-such.yaml"), tmp_path)
    policy = tmp_path / "odd.yaml"
    policy.write_text(f"extends: {POLICY}\nname: 3\n")
    with pytest.raises(PolicyError, match=r"odd\.yaml:2: name"):
        open_subject(config, policy, tmp_path)
    policy.write_text(f"extends: {POLICY}\nquantization: {{layers: [{{match: nothing.*, keep_float: true}}]}}\n")
    with pytest.raises(PlanError, match=r"odd\.yaml:2: quantization\.layers\[0\]\.match: got 'nothing\.\*'"):
        open_subject(config, policy, tmp_path)
