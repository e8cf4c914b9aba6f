"""Prompts are encoded once: kept beside the runs by what decides them, and read back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file
from text_pipelines import PIPELINES, POOLED, T5_TOKENS, TOKENS, WIDTH, stable_diffusion
from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from pqcad_qat.errors import ModelError
from pqcad_qat.models import prompts as encoding
from pqcad_qat.models.conditions import check_choices, chosen_conditions, conditioned, read_conditions, save_conditions
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.prompts import Encoding, check_prompts, encode_prompts, stored_embeddings, too_long_prompts
from pqcad_qat.policy.schema import ConditionsPolicy


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \n")
    return tmp_path / "prompts.txt"


def test_prompts_are_encoded_once_and_then_read_back(
    pipeline: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stored_embeddings(lines, pipeline, tmp_path / "store")
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
    assert stored_embeddings(tmp_path / "other.txt", pipeline, tmp_path / "store") == first
    (tmp_path / "other.txt").write_text("a cat\none dog\n")
    with pytest.raises(AssertionError, match="encoded twice"):
        stored_embeddings(tmp_path / "other.txt", pipeline, tmp_path / "store")


@pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "tokenizer/tokenizer.json"])
def test_another_encoder_or_tokenizer_has_embeddings_of_its_own(
    pipeline: Path, lines: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(pipeline, tmp_path / "copy")
    assert (first := stored_embeddings(lines, pipeline, tmp_path / "store")) == stored_embeddings(
        lines, tmp_path / "copy", tmp_path / "store"
    )
    content = bytearray((tmp_path / "copy" / name).read_bytes())
    content[-3:] = content[-3:] if name.endswith("json") else bytes(3)
    (tmp_path / "copy" / name).write_bytes(content + b"\n" * name.endswith("json"))
    assert stored_embeddings(lines, tmp_path / "copy", tmp_path / "store") != first


def test_a_policys_prompts_become_conditions_through_the_store(pipeline: Path, lines: Path, tmp_path: Path) -> None:
    asked, section = conditioned(load_model(str(pipeline))), ConditionsPolicy(prompts=str(lines))
    plain, kept = chosen_conditions(asked, section), chosen_conditions(asked, section, tmp_path / "store")
    assert len(plain) == 2
    assert plain.digest == kept.digest
    save_conditions(kept, tmp_path / "run.safetensors")
    assert read_conditions(tmp_path / "run.safetensors", asked).digest == kept.digest


T5_PART = {"stable-diffusion-3": "3", "flux": "2", "pixart": ""}
OWN_TOKENS = {"stable-diffusion-3": TOKENS + 256, "flux": 512, "pixart": 120}


@pytest.fixture(scope="module", params=list(T5_PART))
def with_t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, PIPELINES[request.param](tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def t5_of(folder: Path, number: str, prompt: str, tokens: int, masked: bool) -> tuple[Tensor, Tensor]:
    """(tokens, width) of T5 itself, and the mask of the prompt's tokens."""
    suffix = f"_{number}" if number else ""
    words = T5TokenizerFast.from_pretrained(folder / f"tokenizer{suffix}")
    given = words(prompt, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    encoder = T5EncoderModel.from_pretrained(folder / f"text_encoder{suffix}")
    found = encoder(given.input_ids, attention_mask=given.attention_mask if masked else None)
    return found.last_hidden_state[0], given.attention_mask[0]


@pytest.mark.filterwarnings("ignore")
def test_t5s_prompts_are_what_t5_gives_behind_what_clip_gives(with_t5: tuple[str, Path], lines: Path) -> None:
    kind, folder = with_t5
    found = encode_prompts(lines, folder, Encoding(tokens=T5_TOKENS))
    for name, prompt in (("", "two dogs"), ("unconditional.", "")):
        text = found[f"{name}encoder_hidden_states"][-1]
        wanted, mask = t5_of(folder, T5_PART[kind], prompt, T5_TOKENS, kind == "pixart")
        torch.testing.assert_close(text[-T5_TOKENS:], wanted)
        if kind == "pixart":
            assert found[f"{name}encoder_attention_mask"][-1].tolist() == mask.tolist()
            unmasked, _ = t5_of(folder, "", prompt, T5_TOKENS, masked=False)
            assert (unmasked - text)[mask.bool()].abs().max() > 1e-3
        else:
            assert found[f"{name}pooled_projections"].shape[1] == POOLED
            assert not text[:-T5_TOKENS, 16:].any()  # two CLIPs of width 8, filled up with zeros
    assert len(text) == T5_TOKENS + (TOKENS if kind == "stable-diffusion-3" else 0)
    assert found["guidance"].tolist() == [3.5, 3.5] if kind == "flux" else "guidance" not in found


@pytest.mark.filterwarnings("ignore")
def test_t5_takes_as_many_tokens_as_its_pipeline_asks_for_and_the_model_takes_them(
    with_t5: tuple[str, Path], lines: Path
) -> None:
    kind, folder = with_t5
    asked, section = (
        conditioned(load_model(str(folder))),
        ConditionsPolicy(prompts=str(lines), guidance=2.0 if kind == "flux" else None),
    )
    found = chosen_conditions(asked, section)
    assert found.choices["encoder_hidden_states"].shape == (2, OWN_TOKENS[kind], WIDTH)
    assert found.unconditional.keys() == found.choices.keys() == {wanted.name for wanted in asked.inputs}
    assert kind != "flux" or found.choices["guidance"].tolist() == found.unconditional["guidance"].tolist() * 2 == [
        2.0,
        2.0,
    ]


@pytest.mark.filterwarnings("ignore")
def test_stable_diffusion_3_without_t5_has_zeros_for_it(lines: Path, tmp_path: Path) -> None:
    folder = PIPELINES["stable-diffusion-3"](tmp_path)
    index = json.loads((folder / "model_index.json").read_text()) | {
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    text = encode_prompts(lines, folder, Encoding(tokens=7))["encoder_hidden_states"]
    assert text.shape == (2, TOKENS + 7, WIDTH)
    assert text[:, :TOKENS].any()
    assert not text[:, TOKENS:].any()


def test_choices_that_a_pipeline_does_not_leave_are_refused(pipeline: Path, lines: Path) -> None:
    with pytest.raises(ModelError, match=r"conditions\.tokens: got 9; allowed null: StableDiffusionPipeline has no T5"):
        encode_prompts(lines, pipeline, Encoding(tokens=9))
    with pytest.raises(
        ModelError, match=r"conditions\.guidance: got 2; allowed null: .*pipeline takes no guidance as an input"
    ):
        encode_prompts(lines, pipeline, Encoding(guidance=2.0))


@pytest.mark.filterwarnings("ignore")
def test_what_prompts_make_is_known_before_any_is_encoded(
    with_t5: tuple[str, Path], pipeline: Path, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_text_pipeline", lambda *_: pytest.fail("an encoder was loaded"))
    for folder in (with_t5[1], pipeline):
        asked = conditioned(load_model(str(folder)))
        assert check_prompts(lines, folder) == {wanted.name for wanted in asked.inputs}
        check_choices(asked, ConditionsPolicy(prompts=str(lines)), 4.0)
    with pytest.raises(ModelError, match=r"conditions\.tokens: got 9; allowed null"):
        check_prompts(lines, pipeline, Encoding(tokens=9))
    with pytest.raises(ModelError, match=r"conditions\.guidance: got 2; allowed null"):
        check_prompts(lines, pipeline, Encoding(guidance=2.0))
    with pytest.raises(ModelError, match="which is no pipeline's folder with a text encoder"):
        check_prompts(lines, lines.parent)
    with pytest.raises(
        ModelError, match=r"conditions\.prompts: got .*no\.txt, which cannot be read as text \(No such file"
    ):
        check_prompts(lines.with_name("no.txt"), pipeline)


def test_a_tokenizer_of_sentencepiece_alone_says_what_it_takes(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PIPELINES["pixart"](tmp_path)
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "spiece.model")
    monkeypatch.setattr(
        "pqcad_qat.models.pipeline_parts.find_spec", lambda name: None if name == "sentencepiece" else name
    )
    with pytest.raises(
        ModelError,
        match=r"tokenizer: got spiece\.model and no tokenizer\.json, .*; allowed with sentencepiece \(pip install",
    ):
        encode_prompts(lines, folder)


def test_a_folder_without_encoders_is_named(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="which is no pipeline's folder with a text encoder"):
        stored_embeddings(lines, tmp_path, tmp_path / "store")


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(pipeline: Path, tmp_path: Path) -> None:
    for name, mark in (("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + b"a cat\r\ntwo dogs\r\n")
    plain, marked = (
        encode_prompts(tmp_path / name, pipeline)["encoder_hidden_states"] for name in ("plain.txt", "marked.txt")
    )
    assert torch.equal(plain, marked)


def test_bytes_that_are_no_utf_8_are_told_with_their_line(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa cat\ntwo dogs\na caf\xe9\n")
    with pytest.raises(
        ModelError, match=r"prompts.txt, which cannot be read as text \(line 3: no UTF-8\); allowed a prompt a line"
    ):
        encode_prompts(tmp_path / "prompts.txt", pipeline)
    (tmp_path / "prompts.txt").write_text("a cat", encoding="utf-16")
    with pytest.raises(ModelError, match=r"\(line 1: no UTF-8\)"):
        check_prompts(tmp_path / "prompts.txt", pipeline)


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-3", "pixart"])
def test_prompts_that_a_tokenizer_cuts_are_told_with_their_line_and_what_is_left_out(name: str, tmp_path: Path) -> None:
    folder, file = PIPELINES[name](tmp_path), tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog a dog a dog a dog a dog a dog a dog zz\n")
    found = too_long_prompts(file, folder, T5_TOKENS)
    parts = {"stable-diffusion": 1, "stable-diffusion-3": 3, "pixart": 1}[name]
    assert len(found) == parts
    for sentence in found:
        assert re.search(r"prompts.txt:3: tokenizer(_\d)? takes \d+ tokens; not read: '.*dog.*zz'", sentence)
    file.write_text("a dog a dog a dog a dog a dog a dog a dog a dog\n" * 9)
    assert too_long_prompts(file, folder, T5_TOKENS)[-1].endswith(f"{9 * parts - 5} more prompts are cut")
    file.write_text("a cat\n")
    assert too_long_prompts(file, folder, T5_TOKENS) == ()
