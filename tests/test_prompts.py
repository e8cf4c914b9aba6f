"""Prompts are encoded once: kept beside the runs by what decides them, and read back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NoReturn

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file
from text_pipelines import TOKENS, WIDTH, stable_diffusion

from pqcad_qat.diffusion import prompts as encoding
from pqcad_qat.diffusion.conditions import chosen_conditions, conditioned, read_conditions, save_conditions
from pqcad_qat.diffusion.denoiser import load_model
from pqcad_qat.diffusion.prompts import encode_prompts, kept_prompts
from pqcad_qat.errors import ModelError
from pqcad_qat.policy.schema import ConditionsPolicy


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \n")
    return tmp_path / "prompts.txt"


def test_prompts_are_encoded_once_and_then_read_back(pipeline: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept_prompts(lines, pipeline, tmp_path / "store")
    wanted, found = encode_prompts(lines, pipeline), load_file(first)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "encoder_hidden_states": (2, TOKENS, WIDTH),
        "unconditional.encoder_hidden_states": (1, TOKENS, WIDTH),
    }
    assert all(bool((found[name] == wanted[name]).all()) for name in wanted)

    def again(*_: object) -> NoReturn:
        raise AssertionError("encoded twice")

    monkeypatch.setattr(encoding, "encode_prompts", again)
    (tmp_path / "other.txt").write_text("a cat\ntwo dogs\n")  # the same lines
    assert kept_prompts(tmp_path / "other.txt", pipeline, tmp_path / "store") == first
    (tmp_path / "other.txt").write_text("a cat\none dog\n")
    with pytest.raises(AssertionError, match="encoded twice"):
        kept_prompts(tmp_path / "other.txt", pipeline, tmp_path / "store")


@pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "tokenizer/tokenizer.json"])
def test_another_encoder_or_tokenizer_has_embeddings_of_its_own(pipeline: Path, lines: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(pipeline, tmp_path / "copy")
    assert (first := kept_prompts(lines, pipeline, tmp_path / "store")) == kept_prompts(lines, tmp_path / "copy", tmp_path / "store")
    content = bytearray((tmp_path / "copy" / name).read_bytes())
    content[-3:] = content[-3:] if name.endswith("json") else bytes(3)
    (tmp_path / "copy" / name).write_bytes(content + b"\n" * name.endswith("json"))
    assert kept_prompts(lines, tmp_path / "copy", tmp_path / "store") != first


def test_a_policys_prompts_become_conditions_through_the_store(pipeline: Path, lines: Path, tmp_path: Path) -> None:
    asked, section = conditioned(load_model(str(pipeline))), ConditionsPolicy(prompts=str(lines))
    plain, kept = chosen_conditions(asked, section), chosen_conditions(asked, section, tmp_path / "store")
    assert len(plain) == 2
    assert plain.digest == kept.digest
    save_conditions(kept, tmp_path / "run.safetensors")
    assert read_conditions(tmp_path / "run.safetensors", asked).digest == kept.digest


def test_a_folder_without_encoders_is_named(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no pipeline's folder with a text encoder"):
        kept_prompts(lines, tmp_path, tmp_path / "store")
