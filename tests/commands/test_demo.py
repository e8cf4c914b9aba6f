"""What the page of `demo` is made from: the deployed model, and full precision beside it. The page itself is looked at
in a browser (tests/support/demo_page.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from text_pipelines import DeployedPipeline, float_pipeline
from tiny_runs import REPOSITORY

from pqcad_qat.commands import demo as module
from pqcad_qat.commands.demo import COLUMNS, IMAGES, LEAST, demo, open_shown
from pqcad_qat.commands.open_folder import opened_folder
from pqcad_qat.errors import ModelError, UsageError
from pqcad_qat.models.model_folder import embedded_models
from pqcad_qat.serving.text_to_image import TextToImage


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    return float_pipeline("stable-diffusion-xl", tmp_path_factory)


def test_a_deployed_folder_is_shown_alone(deployed: DeployedPipeline) -> None:
    shown = open_shown(deployed.folder)
    assert (shown.full, shown.takes_prompts, shown.deployed.steps) == (None, True, 3)
    assert "this is no run's folder" in shown.why_not
    picture = shown.deployed.make("a cat", 5, 2)
    wanted = TextToImage.from_pretrained(deployed.folder)("a cat", steps=2, seed=5)[0].transpose(1, 2, 0)
    factor = LEAST // wanted.shape[1]
    np.testing.assert_array_equal(picture[::factor, ::factor], wanted)


def test_full_precision_begins_from_the_same_noise_and_text(deployed: DeployedPipeline, tmp_path: Path) -> None:
    shutil.copytree(deployed.folder, tmp_path / "openvino")
    (tmp_path / "policy.yaml").write_text(
        f"extends: {REPOSITORY}/policies/w4a8.yaml\nname: it\nmodel: {{source: {deployed.source.folder}}}\n"
        "sampler: {steps: 6}\ndistillation: {student_steps: 3}\n"
    )
    shown = open_shown(tmp_path)
    assert shown.full is not None
    assert shown.full.steps == 6
    ours, full = (maker.make("a cat", 5, 3).astype(float) for maker in (shown.deployed, shown.full))
    other = shown.full.make("a cat", 6, 3)
    # 7 bits of random weights are not far from full precision, another noise is
    assert 0 < np.abs(ours - full).mean() < np.abs(other - full).mean() / 2


def test_images_without_prompts_come_in_a_grid() -> None:
    pictures = np.arange(IMAGES, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 1, 8, 8), np.uint8)
    grid = module._grid(pictures)
    factor = LEAST // (8 * COLUMNS)
    assert grid.shape == (8 * factor * IMAGES // COLUMNS, LEAST, 3)
    assert grid[:: 8 * factor, :: 8 * factor, 0].ravel().tolist() == list(range(IMAGES))


def test_a_model_without_prompts_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    source = embedded_models()[0]
    maker = module._sampled(source, opened_folder(source, 2, None, None), "it")
    one, other = maker.make("", 1, 2), maker.make("", 2, 2)
    assert one.shape == other.shape
    assert (one != other).any()


def test_mistakes_say_what_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"demo: got no gradio to show the page; allowed once it is installed"):
        demo(tmp_path, host="127.0.0.1", port=1, tell=print)
    with pytest.raises(ModelError, match="got no manifest"):
        open_shown(tmp_path)
