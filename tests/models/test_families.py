"""The table of model families: a file more is all that one more family takes, and no other file spells their classes.

Not here: each family's own model (test_architectures.py).
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import generated_pages
import numpy as np
import pytest
import torch
from conditional_models import FLOW
from tiny_runs import POLICIES
from vnni_here import VNNI

from pqcad_qat.commands.rehearse import rehearse
from pqcad_qat.models import families as folder
from pqcad_qat.models.denoiser import DiffusionModel, predict
from pqcad_qat.models.families.table import families, pipelines
from pqcad_qat.models.model_loading import load_model, save_model
from pqcad_qat.models.untrained import noise_inputs
from pqcad_qat.policy.loading import load_policy
from pqcad_qat.serving.runtime import OVUNet2DModel

ALL_IN_INT8 = 'quantization.layers=[{match: ["*"], weights: {bits: 8}, inputs: {bits: 8}}]'

SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "caption_channels": 24,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
}


@pytest.fixture
def sana(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiffusionModel]:
    """A small model of the family that the page adds in one file."""
    (tmp_path / "families").mkdir()
    page = generated_pages.PAGE.read_text(encoding="utf-8")
    source = page.split("<!-- family -->\n```python\n")[1].split("```")[0]
    (tmp_path / "families" / "sana.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path / "families")])
    families.cache_clear()
    torch.manual_seed(0)
    save_model(diffusers.SanaTransformer2DModel(**SMALL).eval(), {**FLOW, "shift": 3.0}, tmp_path / "model")
    yield load_model(str(tmp_path / "model"))
    families.cache_clear()
    sys.modules.pop(f"{folder.__name__}.sana")


@pytest.mark.long
@pytest.mark.slow
def test_a_family_is_added_in_one_file_and_deployed_in_int8(sana: DiffusionModel, tmp_path: Path) -> None:
    x, t, condition = noise_inputs(sana, 2)
    with torch.no_grad():
        (own_call,) = sana.denoiser(x, timestep=t, **condition, return_dict=False)
        assert torch.equal(predict(sana.denoiser, x, t, condition), own_call)
    policy = load_policy(POLICIES / "w8a8.yaml", [f"model.source={sana.source}", ALL_IN_INT8])
    rehearsal, _ = rehearse(policy, tmp_path / "rehearsed", "rehearse", lambda _: None)
    assert rehearsal.planned == rehearsal.executed_int8 > 20
    assert rehearsal.exact == rehearsal.planned or not VNNI
    deployed = OVUNet2DModel.from_pretrained(tmp_path / "rehearsed" / "openvino")
    by_name = {name: value.numpy() for name, value in condition.items()}
    text, mask = by_name.values()
    by_place = deployed(x.numpy(), text, t.numpy(), None, mask).sample
    np.testing.assert_array_equal(by_place, deployed.predict(x.numpy(), t.numpy(), by_name))


def test_the_arguments_of_the_page_are_those_of_the_class(sana: DiffusionModel) -> None:
    written = families()[type(sana.denoiser).__name__].parameters
    known = tuple(inspect.signature(type(sana.denoiser).forward).parameters)[1:]
    assert known[: len(written)] == written


def test_nothing_else_asks_for_a_class_by_name() -> None:
    names = (*families(), *pipelines(), *(family.alone for family in families().values()))
    spelled = re.compile(r"\b(" + "|".join(names) + r")\b")
    own = generated_pages.PACKAGE / "models" / "families"
    below = generated_pages.PACKAGE / "policy"  # which knows no model: a policy of pretraining has one class
    found = {
        f"{path.relative_to(generated_pages.PACKAGE)}: {text}"
        for path in generated_pages.PACKAGE.rglob("*.py")
        if not path.is_relative_to(own) and not path.is_relative_to(below)
        for text in _words(path)
        if spelled.search(text)
    }
    assert found == set()


def _words(path: Path) -> Iterator[str]:
    """Every name and every text of a file, less what documents it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.value
        elif isinstance(node, ast.Name | ast.alias):
            yield node.id if isinstance(node, ast.Name) else node.name
        elif isinstance(node, ast.Attribute):
            yield node.attr
