"""Hub ids without a hub: a model in the hub's cache is found by its id, from plan to prompts; what is not there is
refused in words.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import POLICIES

pytest.importorskip("transformers")

import huggingface_hub
from text_pipelines import TOKENS, WIDTH, stable_diffusion

from pqcad_qat import cli, console
from pqcad_qat.errors import ModelError
from pqcad_qat.export.part_export import chosen_formats
from pqcad_qat.models.conditions import chosen_conditions, conditioned
from pqcad_qat.models.model_folder import WEIGHTS
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.pipeline_parts import pipeline_parts
from pqcad_qat.models.untrained import shapes_of
from pqcad_qat.policy.schema import ConditionsPolicy

NAME, COMMIT = "org/name", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cache(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the pipeline as NAME, and no hub; the client reads both settings when it is first
    imported.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return laid(pipeline, tmp_path / "hub")


def laid(source: Path, cache: Path) -> Path:
    """A folder as the hub's client keeps it: files by their digest, and a snapshot of links to them; returns the
    snapshot.
    """
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (repository / "refs", blobs):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in (path for path in source.rglob("*") if path.is_file()):
        blob, link = blobs / hashlib.sha256(file.read_bytes()).hexdigest(), snapshot / file.relative_to(source)
        shutil.copyfile(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_model_of_the_cache_is_the_model_of_its_folder(cache: Path, pipeline: Path) -> None:
    found, own = load_model(NAME), load_model(str(pipeline))
    assert found.digest == own.digest
    assert (found.source, found.folder) == (NAME, cache)
    assert shapes_of(NAME).sample_shape == own.sample_shape


def test_its_prompts_are_encoded_and_its_parts_deployed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    model = load_model(NAME)
    found = chosen_conditions(
        conditioned(model), ConditionsPolicy(prompts=str(tmp_path / "prompts.txt")), tmp_path / "store"
    )
    assert found.choices["encoder_hidden_states"].shape == (2, TOKENS, WIDTH)
    parts = pipeline_parts(model.folder)
    assert chosen_formats(parts, {"vae": "auto", "text_encoder": "auto"}, NAME) == {
        "vae": "float",
        "text_encoder": "int8-weights",
    }


@pytest.mark.slow
def test_the_command_plans_a_policy_of_a_hub_id_by_its_configs_alone(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "CONSOLE", Console(width=200, markup=False))
    for weights in cache.rglob("*.safetensors"):
        weights.unlink()
    cli.main(["plan", str(POLICIES / "w4a8-sd15.yaml"), "--model", NAME])
    assert "mid_block.attentions.0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as missing:
        cli.main(["plan", str(POLICIES / "w4a8-sd15.yaml"), "--model", "org/other"])
    assert missing.value.code == 2
    told = capsys.readouterr().err
    assert "model.source: got 'org/other', which is no folder and cannot be loaded from the hub" in " ".join(
        told.split()
    )
    assert "Traceback" not in told


@pytest.mark.parametrize("name", ["org/other", "no id"])
def test_what_is_not_in_the_cache_is_refused_in_words(cache: Path, name: str) -> None:
    with pytest.raises(
        ModelError, match=rf"model\.source: got '{name}', which is no folder and cannot be loaded from the hub \(\w+"
    ):
        load_model(name)


def test_a_repository_of_other_weights_is_refused_in_words(cache: Path) -> None:
    (cache / "unet" / WEIGHTS).rename(cache / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        ModelError,
        match=rf"{WEIGHTS}: got diffusion_pytorch_model\.bin alone, .*; allowed safetensors, .* \(the hub's {NAME} has",
    ):
        load_model(NAME)


@pytest.mark.parametrize(("part", "file"), [("vae", WEIGHTS), ("text_encoder", "model.safetensors")])
def test_a_part_of_other_weights_is_refused_before_anything_is_trained(cache: Path, part: str, file: str) -> None:
    (cache / part / file).rename(cache / part / "pytorch_model.bin")
    with pytest.raises(
        ModelError,
        match=rf"{part}/{file}: got pytorch_model\.bin alone, .*; allowed safetensors, .*, or pipeline\.{part}: none",
    ):
        chosen_formats(pipeline_parts(load_model(NAME).folder), {"vae": "auto", "text_encoder": "auto"}, NAME)
