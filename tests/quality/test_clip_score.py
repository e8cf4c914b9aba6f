"""CLIP scores against torchmetrics, and which folders are refused before anything is loaded.

Not here: the scores of a run (tests/whole_runs/test_text_runs.py).
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from clip_folder import clip_folder
from torchmetrics.functional.multimodal import clip_score as torchmetrics_score
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from pqcad_qat.errors import ModelError
from pqcad_qat.quality.clip_score import ClipScore, check_clip, clip_digest, clip_score, clip_scorer

PROMPTS = ("a cat", "two dogs under a tree that is far too long a prompt", "a cat", "x", "dog")
NOISE = torch.randint(0, 256, (5, 3, 40, 56), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


class OfTransformers4(CLIPModel):  # type: ignore[misc]
    """The model as torchmetrics expects it, whose features are tensors."""

    def get_text_features(self, *inputs: Any) -> torch.Tensor:
        return super().get_text_features(*inputs).pooler_output

    def get_image_features(self, *inputs: Any) -> torch.Tensor:
        return super().get_image_features(*inputs).pooler_output


@pytest.mark.parametrize("pictures", [NOISE, NOISE[:, :1, :16, :16]])
def test_the_score_is_the_mean_of_torchmetrics_scores_of_single_pairs(folder: Path, pictures: torch.Tensor) -> None:
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 10]  # torchmetrics cuts the end of a long one off
    pictures = pictures[: len(prompts)]
    model = OfTransformers4.from_pretrained(folder).eval()
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    with torch.no_grad():
        expected = [
            float(torchmetrics_score(picture.expand(3, -1, -1), prompt, lambda: (model, processor)))
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
    assert 0 < sum(value > 0 for value in expected) < len(expected)
    found = clip_scorer(folder, prompts)(pictures)
    assert found.value == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert found.error == pytest.approx(torch.tensor(expected).std().item() / math.sqrt(len(expected)), abs=1e-4)


def test_a_long_prompt_is_cut_as_the_tokenizer_cuts_it(folder: Path) -> None:
    tokens = CLIPTokenizer.from_pretrained(folder)([PROMPTS[1]], truncation=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=list(NOISE[:1]), return_tensors="pt")
    with torch.no_grad():
        result = model(**tokens, **pixels)
        cosine = float(result.logits_per_image[0, 0] / model.logit_scale.exp())
    assert clip_scorer(folder, PROMPTS[1:2])(NOISE[:1]) == ClipScore(
        pytest.approx(max(0, 100 * cosine), abs=1e-4), None
    )


def test_a_negative_cosine_counts_as_zero() -> None:
    picture = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert clip_score(picture, torch.tensor([[-1.0, 0.0], [0.6, 0.8]])) == ClipScore(
        pytest.approx(30), pytest.approx(30)
    )


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def other_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))


def other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "projection_dim": 20}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"clip/config\.json: got no such file; allowed the folder of a CLIP model"),
        (other_kind, r"clip/config\.json: model_type: got 'siglip'; allowed 'clip'"),
        (other_width, r"clip: got weights that do not fit; allowed those of the CLIPModel that config\.json describes"),
        (
            pickled,
            r"clip/model\.safetensors: got pytorch_model\.bin alone, which may run code when it is read; allowed",
        ),
        (without("tokenizer.json"), r"clip: got no tokenizer\.json or vocab\.json; allowed a CLIPModel with"),
        (without("preprocessor_config.json"), r"clip: got no preprocessor_config\.json or processor_config\.json"),
    ],
)
def test_a_folder_that_is_no_clip_model_is_refused(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    check_clip(tmp_path / "clip")
    damage(tmp_path / "clip")
    with pytest.raises(ModelError) as raised:
        check_clip(tmp_path / "clip")
    assert re.search(message, str(raised.value))


def test_a_missing_library_is_answered_with_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqcad_qat.models.pipeline_parts.find_spec", lambda _: None)
    assert importlib.util.find_spec("transformers") is not None
    with pytest.raises(ModelError, match=r"clip: got no library transformers; allowed with it: pip install '.*text"):
        check_clip(folder)


def test_the_digest_changes_with_any_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    assert clip_digest(tmp_path / "clip") == clip_digest(folder)
    (tmp_path / "clip" / "preprocessor_config.json").write_text("{}")
    assert clip_digest(tmp_path / "clip") != clip_digest(folder)
