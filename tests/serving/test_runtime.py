"""Loading and running a deployed folder, and what happens with a damaged one."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deployed_fixture import BATCH, SHAPE, deployed_unet
from diffusers import DDIMPipeline, DDIMScheduler
from tiny_runs import SCHEDULER, environment

from pqcad_qat.errors import ModelError
from pqcad_qat.machine import cores
from pqcad_qat.machine.files import file_digest
from pqcad_qat.serving.runtime import OVUNet2DModel, UNetOutput


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployed_unet(tmp_path_factory).packed


@pytest.fixture(scope="module")
def deployed(folder: Path) -> OVUNet2DModel:
    return OVUNet2DModel.from_pretrained(folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "openvino"))


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float32)


def test_it_answers_in_the_callers_framework(deployed: OVUNet2DModel) -> None:
    x = noise(BATCH)
    from_numpy = deployed(x, 500)
    assert isinstance(from_numpy, UNetOutput)
    assert isinstance(from_numpy.sample, np.ndarray)
    (from_torch,) = deployed(torch.from_numpy(x), torch.tensor(500), return_dict=False)
    assert from_torch.dtype == torch.float32
    np.testing.assert_array_equal(from_torch.numpy(), from_numpy.sample)
    assert deployed(torch.from_numpy(x).to(torch.bfloat16), 500).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("count", [1, BATCH, 5])
def test_any_batch_gives_each_samples_own_prediction(deployed: OVUNet2DModel, count: int) -> None:
    x, t = noise(count), np.arange(count) * 150 + 20
    whole = deployed.predict(x, t)
    assert whole.shape == x.shape
    for index in range(count):
        np.testing.assert_array_equal(deployed.predict(x[index : index + 1], t[index])[0], whole[index])


def test_time_steps_may_be_a_number_an_array_or_a_tensor(deployed: OVUNet2DModel) -> None:
    x = noise(BATCH)
    forms = [
        700,
        700.0,
        np.int64(700),
        np.array([700]),
        np.full(BATCH, 700),
        torch.tensor(700),
        torch.full((BATCH,), 700),
    ]
    first, *others = [deployed(x, form).sample for form in forms]
    for other in others:
        np.testing.assert_array_equal(first, other)
    assert np.abs(deployed(x, 20).sample - first).max() > 0


def test_in_a_diffusers_pipeline_it_gives_what_the_scheduler_makes_of_its_predictions(
    folder: Path, deployed: OVUNet2DModel
) -> None:
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    pipeline = DDIMPipeline.from_pretrained(folder, unet=deployed)
    written, wanted = (
        {key: value for key, value in each.config.items() if key[0] != "_"} for each in (pipeline.scheduler, scheduler)
    )
    assert (pipeline.unet, type(pipeline.scheduler), written) == (deployed, DDIMScheduler, wanted)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline(batch_size=3, num_inference_steps=4, generator=generator, output_type="np").images
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(3))
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.from_numpy(deployed.predict(x.numpy(), t)), t, x).prev_sample
    np.testing.assert_allclose(images, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_it_has_what_pipelines_ask_for(deployed: OVUNet2DModel) -> None:
    assert (deployed.config.sample_size, deployed.config.in_channels) == (32, 1)
    assert deployed.dtype == torch.float32
    assert deployed.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="no_such_key"):
        _ = deployed.config.no_such_key


def test_it_runs_where_torch_brevitas_nncf_and_diffusers_are_absent(
    folder: Path, deployed: OVUNet2DModel, tmp_path: Path
) -> None:
    x = noise(BATCH)
    np.save(tmp_path / "x.npy", x)
    program = f"""
import sys
for absent in ("torch", "brevitas", "nncf", "diffusers", "pydantic"):
    sys.modules[absent] = None
import numpy as np
from pqcad_qat.serving.runtime import OVUNet2DModel
model = OVUNet2DModel.from_pretrained({str(folder)!r})
np.save({str(tmp_path / "y.npy")!r}, model(np.load({str(tmp_path / "x.npy")!r}), 500).sample)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), deployed(x, 500).sample)


def test_properties_reach_openvino(folder: Path, deployed: OVUNet2DModel) -> None:
    exact = OVUNet2DModel.from_pretrained(folder, properties={"INFERENCE_PRECISION_HINT": "f32"})
    assert exact.inference_precision == "f32"
    assert deployed.inference_precision in ("f32", "bf16", "f16")
    with pytest.raises(ModelError, match="NO_SUCH_PROPERTY"):
        OVUNet2DModel.from_pretrained(folder, properties={"NO_SUCH_PROPERTY": 1})


def test_what_is_compiled_can_be_kept_for_the_next_process(
    folder: Path, deployed: OVUNet2DModel, tmp_path: Path
) -> None:
    x = noise(BATCH)
    for _ in range(2):
        kept = OVUNet2DModel.from_pretrained(folder, properties={"CACHE_DIR": str(tmp_path / "cache")})
        np.testing.assert_array_equal(kept(x, 500).sample, deployed(x, 500).sample)
    assert kept.compiled.get_property("LOADED_FROM_CACHE")


def test_a_share_of_the_cores_gets_as_many_threads_unless_told_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "cores_to_run_on", lambda: 2)
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)
    for properties, threads in (({}, 1), ({"INFERENCE_NUM_THREADS": 2}, 2)):
        assert (
            OVUNet2DModel.from_pretrained(folder, properties=properties).compiled.get_property("INFERENCE_NUM_THREADS")
            == threads
        )


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_a_wrong_shape_is_refused_with_the_right_one(deployed: OVUNet2DModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"got shape \(2, .*; allowed \(B, 1, 32, 32\)"):
        deployed.predict(np.zeros((2, *shape), np.float32), 5)
    with pytest.raises(ModelError, match="got"):
        deployed.predict(np.zeros(shape, np.float32), 5)


@pytest.mark.parametrize("timestep", [-1, 1000, 3.5, [1, 2, 3]])
def test_time_steps_outside_the_training_range_are_refused(deployed: OVUNet2DModel, timestep: object) -> None:
    with pytest.raises(ModelError, match="time steps: got"):
        deployed.predict(noise(BATCH), timestep)  # type: ignore[arg-type]


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BIN, XML = "unet/openvino_model.bin", "unet/openvino_model.xml.gz"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip_a_byte(folder / BIN), "openvino_model.bin: damaged or changed.*sha256"),
        (lambda folder: cut_in_half(folder / BIN), "openvino_model.bin: damaged: got .* bytes; allowed"),
        (lambda folder: cut_in_half(folder / XML), "openvino_model.xml.gz: damaged"),
        (lambda folder: (folder / BIN).unlink(), "got no file unet/openvino_model.bin; allowed"),
        (lambda folder: (folder / "unet/config.json").unlink(), "got no file unet/config.json; allowed"),
        (lambda folder: (folder / "manifest.json").unlink(), "got no manifest.json; allowed a deployed folder"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: .*JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json: .*JSON"),
        (
            lambda folder: rewrite_manifest(folder, lambda m: m.update(schema_version=99)),
            "schema_version: got 99; allowed 1",
        ),
        (lambda folder: rewrite_manifest(folder, lambda m: m.pop("batch_size")), "got no batch_size; allowed"),
        (
            lambda folder: rewrite_manifest(folder, lambda m: m["files"].pop(BIN)),
            "files: got no unet/openvino_model.bin; allowed",
        ),
        (
            lambda folder: rewrite_manifest(folder, lambda m: m.update(graph="../../etc/passwd")),
            r"graph: got '../../etc/passwd'; allowed unet or",
        ),
        (
            lambda folder: rewrite_manifest(folder, lambda m: m["files"].update({"../other": {}})),
            "files: got ../other, which lies outside",
        ),
    ],
)
def test_a_damaged_folder_is_refused_and_the_damage_named(
    copied: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copied)
    with pytest.raises(ModelError, match=message):
        OVUNet2DModel.from_pretrained(copied)


def test_a_file_that_openvino_cannot_read_is_refused(copied: Path) -> None:
    (copied / XML).write_bytes(b"not a graph")

    def accept(manifest: dict[str, Any]) -> None:
        manifest["files"][XML] = {"bytes": (copied / XML).stat().st_size, "sha256": file_digest(copied / XML)}

    rewrite_manifest(copied, accept)
    with pytest.raises(ModelError, match="OpenVINO cannot read"):
        OVUNet2DModel.from_pretrained(copied)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"got no manifest\.json; allowed a deployed folder"):
        OVUNet2DModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(("dtype", "least"), [("float32", 925.0), ("int64", 950.0)])
def test_continuous_times_that_a_pipeline_rounds_are_those_of_the_sampler(dtype: str, least: float) -> None:
    """974.1078 in float32 is 974.10773 in diffusers' loop, and bfloat16 rounds to whole numbers."""
    runtime = SimpleNamespace(_timestep_dtype=dtype, _times=np.array([1000.0, 950.0, 900.0]))
    assert OVUNet2DModel._float_from(runtime, 950.0) == least  # type: ignore[arg-type]
    assert OVUNet2DModel._float_from(runtime, math.inf) == math.inf  # type: ignore[arg-type]
