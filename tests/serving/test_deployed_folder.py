"""Writing a deployed folder again, in the format it has or in another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from deployed_fixture import Quantized, quantized_small

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.machine.files import file_digest
from pqcad_qat.serving.deployed_folder import read_manifest
from pqcad_qat.serving.packing import WeightFormat
from pqcad_qat.serving.runtime import OVUNet2DModel

FORMATS: tuple[WeightFormat, ...] = ("int8", "packed")


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return quantized_small({"bits": 3}, {"bits": 8, "symmetric": False})


@pytest.fixture(scope="module")
def exported(quantized: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Mapping[WeightFormat, Path]:
    """The same model as export_model writes it in every format."""
    return {name: quantized.export(tmp_path_factory.mktemp("exported") / name, name) for name in FORMATS}


@pytest.fixture(scope="module")
def loaded(exported: Mapping[WeightFormat, Path]) -> Mapping[WeightFormat, OVUNet2DModel]:
    return {name: OVUNet2DModel.from_pretrained(folder) for name, folder in exported.items()}


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_model_is_the_folder_it_came_from_byte_for_byte(
    name: WeightFormat,
    exported: Mapping[WeightFormat, Path],
    loaded: Mapping[WeightFormat, OVUNet2DModel],
    tmp_path: Path,
) -> None:
    loaded[name].save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(exported[name])
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(("before", "after"), [("packed", "int8"), ("int8", "packed")])
def test_a_model_saved_in_another_format_is_what_the_exporter_writes_in_it(
    before: WeightFormat,
    after: WeightFormat,
    exported: Mapping[WeightFormat, Path],
    loaded: Mapping[WeightFormat, OVUNet2DModel],
    tmp_path: Path,
) -> None:
    loaded[before].save_pretrained(str(tmp_path / "other"), weights=after)
    assert contents(tmp_path / "other") == contents(exported[after])


def test_every_format_predicts_alike_bitwise(
    quantized: Quantized, loaded: Mapping[WeightFormat, OVUNet2DModel]
) -> None:
    plain, *packed = [model.predict(quantized.states.numpy(), quantized.timesteps.numpy()) for model in loaded.values()]
    for prediction in packed:
        np.testing.assert_array_equal(prediction, plain)


def test_three_bits_take_three_eighths_of_the_room(quantized: Quantized, exported: Mapping[WeightFormat, Path]) -> None:
    count = sum(layer.weight_int.size for layer in quantized.layers.values())
    sizes = {name: (folder / "unet/openvino_model.bin").stat().st_size for name, folder in exported.items()}
    assert sizes["int8"] - sizes["packed"] == pytest.approx(count * 5 / 8, rel=0.01)
    assert {layer["stored_bits"] for layer in read_manifest(exported["packed"])["layers"].values()} == {3}


def test_a_saved_folder_replaces_a_deployed_one_and_nothing_else(
    exported: Mapping[WeightFormat, Path], loaded: Mapping[WeightFormat, OVUNet2DModel], tmp_path: Path
) -> None:
    loaded["int8"].save_pretrained(tmp_path / "it")
    loaded["packed"].save_pretrained(tmp_path / "it")
    assert contents(tmp_path / "it") == contents(exported["packed"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.jpg").write_bytes(b"mine")
    with pytest.raises(ExportError, match="mine: got something that is no deployed folder"):
        loaded["int8"].save_pretrained(tmp_path / "mine")


def test_a_model_can_be_saved_over_itself_in_another_format(
    exported: Mapping[WeightFormat, Path], tmp_path: Path
) -> None:
    OVUNet2DModel.from_pretrained(exported["packed"]).save_pretrained(tmp_path / "it")
    model = OVUNet2DModel.from_pretrained(tmp_path / "it")
    model.save_pretrained(tmp_path / "it", weights="int8")
    assert contents(tmp_path / "it") == contents(exported["int8"])


def test_an_unknown_format_is_refused(loaded: Mapping[WeightFormat, OVUNet2DModel], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="weights: got 'int2'; allowed int8, packed"):
        loaded["int8"].save_pretrained(tmp_path / "it", weights="int2")  # type: ignore[arg-type]


def test_a_folder_that_was_damaged_since_it_was_loaded_is_not_copied(
    exported: Mapping[WeightFormat, Path], tmp_path: Path
) -> None:
    OVUNet2DModel.from_pretrained(exported["int8"]).save_pretrained(tmp_path / "it")
    model = OVUNet2DModel.from_pretrained(tmp_path / "it")
    (tmp_path / "it" / "unet" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json: damaged"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("bits", "exact_from"), [(7, "avx2"), (8, "vnni")])
def test_the_manifest_says_which_cpus_it_is_for(bits: int, exact_from: str, tmp_path: Path) -> None:
    manifest = read_manifest(quantized_small({"bits": bits}, {"bits": 8}).export(tmp_path / "it"))
    needing = [name for name, layer in manifest["layers"].items() if layer["needs_vnni"]]
    assert (manifest["cpu"]["exact_from"], manifest["cpu"]["layers_that_need_vnni"]) == (exact_from, needing)
    assert bool(needing) == (exact_from == "vnni")


def test_the_manifest_names_the_versions_that_made_the_folder(exported: Mapping[WeightFormat, Path]) -> None:
    manifest = json.loads((exported["int8"] / "manifest.json").read_text())
    assert set(manifest["versions"]) == {"pqcad-qat", "openvino", "nncf", "torch", "diffusers"}
