"""What trajectories are conditioned on: seeded choices, files and their faults, and guidance against its formula.

Not here: which model takes what (test_architectures.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conditional_models import conditions, saved, write_embeddings
from safetensors.torch import load_file, save_file
from torch import Tensor

from pqcad_qat.errors import ModelError
from pqcad_qat.models.conditions import (
    Conditioned,
    ConditionSet,
    check_guidance,
    chosen_conditions,
    class_conditions,
    conditioned,
    exported_inputs,
    read_conditions,
)
from pqcad_qat.models.guidance import guided_call
from pqcad_qat.models.prompts import encode_prompts
from pqcad_qat.policy.schema import ConditionsPolicy


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Conditioned:
    return conditioned(saved("text_unet", tmp_path_factory.mktemp("text") / "model"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Conditioned:
    return conditioned(saved("class_unet", tmp_path_factory.mktemp("classes") / "model"))


def test_a_trajectory_chooses_for_itself_whatever_the_batches(classes: Conditioned) -> None:
    found = class_conditions(classes, "all", None)
    whole = found.drawn(7, 0, 40)["class_labels"]
    assert torch.equal(torch.cat([found.drawn(7, first, 8)["class_labels"] for first in range(0, 40, 8)]), whole)
    assert set(whole.tolist()) == {0, 1, 2, 3, 4}
    assert not torch.equal(found.drawn(8, 0, 40)["class_labels"], whole)


def test_listed_classes_alone_are_chosen_and_all_leaves_out_the_one_of_no_class(
    classes: Conditioned, tmp_path: Path
) -> None:
    assert Counter(class_conditions(classes, [0, 3], 4).drawn(0, 0, 30)["class_labels"].tolist()).keys() == {0, 3}
    guided = class_conditions(classes, "all", 4)
    assert guided.choices["class_labels"].tolist() == [0, 1, 2, 3]
    assert guided.unconditional["class_labels"].tolist() == [4] == [guided.null_class]
    own = class_conditions(conditioned(saved("dit", tmp_path / "dit")), "all", None)
    assert (own.choices["class_labels"].tolist(), own.null_class) == ([0, 1, 2, 3], 4)


def test_a_class_outside_the_table_is_refused(classes: Conditioned) -> None:
    with pytest.raises(ModelError, match=r"conditions\.classes: got 9; allowed 0 to 4"):
        class_conditions(classes, [0, 9], None)
    with pytest.raises(ModelError, match=r"conditions\.unconditional_class: got 5; allowed 0 to 4"):
        class_conditions(classes, "all", 5)


def test_a_file_holds_a_row_a_prompt_and_the_unconditional_pass(text: Conditioned, tmp_path: Path) -> None:
    path = write_embeddings("text_unet", tmp_path / "text.safetensors")
    found = chosen_conditions(text, ConditionsPolicy(embeddings=str(path)))
    assert len(found) == 3
    rows = found.drawn(0, 0, 20)["encoder_hidden_states"]
    assert rows.shape == (20, 5, 24)
    assert all(any(torch.equal(row, choice) for choice in found.choices["encoder_hidden_states"]) for row in rows)
    assert torch.equal(
        found.unconditional["encoder_hidden_states"], conditions("text_unet", 1, seed=1)["encoder_hidden_states"]
    )
    assert [str(wanted) for wanted in exported_inputs(text.inputs, found)] == ["encoder_hidden_states (5, 24) float32"]


def test_halves_in_a_file_become_the_models_own_floats(text: Conditioned, tmp_path: Path) -> None:
    save_file({"encoder_hidden_states": torch.ones(2, 5, 24, dtype=torch.bfloat16)}, tmp_path / "half.safetensors")
    assert read_conditions(tmp_path / "half.safetensors", text).choices["encoder_hidden_states"].dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"text": torch.ones(2, 5, 24)}, r"encoder_hidden_states: got nothing; .*\n.*text: got a tensor; allowed none"),
        ({"encoder_hidden_states": torch.ones(2, 5, 25)}, r"got shape \(2, 5, 25\); allowed \(2, tokens, 24\)"),
        ({"encoder_hidden_states": torch.ones(2, 0, 24)}, r"got shape \(2, 0, 24\); allowed \(2, tokens, 24\)"),
        ({"encoder_hidden_states": torch.ones(2, 24)}, r"got shape \(2, 24\); allowed \(2, tokens, 24\)"),
        ({"encoder_hidden_states": torch.full((2, 5, 24), torch.nan)}, "got values that are not finite"),
        (
            {
                "encoder_hidden_states": torch.ones(2, 5, 24),
                "unconditional.encoder_hidden_states": torch.ones(2, 5, 24),
            },
            r"unconditional\.encoder_hidden_states: got shape \(2, 5, 24\); allowed \(1, tokens, 24\)",
        ),
        (
            {
                "encoder_hidden_states": torch.ones(2, 5, 24),
                "unconditional.encoder_hidden_states": torch.ones(1, 4, 24),
            },
            r"got \(4, 24\); allowed \(5, 24\), as encoder_hidden_states",
        ),
    ],
)
def test_a_file_of_something_else_is_refused_tensor_by_tensor(
    text: Conditioned, tmp_path: Path, tensors: dict[str, Tensor], fault: str
) -> None:
    save_file(tensors, tmp_path / "text.safetensors")
    with pytest.raises(ModelError, match=fault):
        read_conditions(tmp_path / "text.safetensors", text)


def test_sizes_must_be_whole_and_in_bounds(tmp_path: Path) -> None:
    asked = conditioned(saved("text_and_size_unet", tmp_path / "model"))
    tensors = load_file(write_embeddings("text_and_size_unet", tmp_path / "text.safetensors"))
    for sizes, fault in (
        (tensors["time_ids"] + 0.5, "got 999.5; allowed whole numbers"),
        (tensors["time_ids"] * 9, "allowed 0 to 4096"),
    ):
        save_file({**tensors, "time_ids": sizes}, tmp_path / "wrong.safetensors")
        with pytest.raises(ModelError, match=f"time_ids: .*{fault}"):
            read_conditions(tmp_path / "wrong.safetensors", asked)


def test_a_file_that_is_not_there_or_no_safetensors_is_named(text: Conditioned, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.safetensors, which is no file; allowed"):
        read_conditions(tmp_path / "absent.safetensors", text)
    (tmp_path / "text.safetensors").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="not readable as safetensors"):
        read_conditions(tmp_path / "text.safetensors", text)


def test_a_section_that_does_not_fit_the_model_is_refused(
    text: Conditioned, classes: Conditioned, tmp_path: Path
) -> None:
    unconditional = Conditioned("plain", ())
    assert chosen_conditions(unconditional, ConditionsPolicy()).choices == {}
    assert len(chosen_conditions(classes, ConditionsPolicy())) == 5
    with pytest.raises(ModelError, match=r"conditions\.embeddings: got nothing; .*takes encoder_hidden_states"):
        chosen_conditions(text, ConditionsPolicy())
    for asked in (unconditional, text):
        with pytest.raises(ModelError, match=r"conditions\.classes: got class labels; .* takes"):
            chosen_conditions(asked, ConditionsPolicy(classes=(1,)))
    with pytest.raises(ModelError, match="takes no conditions"):
        chosen_conditions(
            unconditional,
            ConditionsPolicy(embeddings=str(write_embeddings("text_unet", tmp_path / "text.safetensors"))),
        )


def test_guidance_without_another_pass_is_refused(classes: Conditioned) -> None:
    check_guidance(1.0, ConditionSet())
    check_guidance(2.0, class_conditions(classes, "all", 4))
    with pytest.raises(ModelError, match=r"sampler\.guidance_scale: got 2; allowed 1, or .*unconditional_class"):
        check_guidance(2.0, class_conditions(classes, "all", None))


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_guidance_goes_from_the_unconditional_prediction_past_the_conditional(make: type) -> None:
    """Ho and Salimans 2022, as diffusers' pipelines write it: u + s (c - u)."""
    x, condition, other = make([[1.0], [2.0]]), {"c": make([[10.0], [20.0]])}, {"c": make([[5.0]])}
    found = guided_call(lambda x_t, t, given: x_t * t + given["c"], condition, other, 3.0)(x, 2)
    expected = [[2 + 5 + 3 * (10 - 5)], [4 + 5 + 3 * (20 - 5)]]
    assert np.asarray(found).tolist() == expected


def test_without_guidance_there_is_one_pass() -> None:
    calls: list[dict[str, float]] = []
    follow = guided_call(lambda x_t, t, given: calls.append(given) or x_t, {"c": 1.0}, {}, 1.0)
    assert follow(3.0, 0) == 3.0
    assert calls == [{"c": 1.0}]


def test_everything_in_a_set_changes_its_digest_and_nothing_has_none(classes: Conditioned) -> None:
    sets = [class_conditions(classes, chosen, null) for chosen in ("all", [0, 1]) for null in (None, 4)]
    assert len({found.digest for found in sets}) == 4
    assert ConditionSet().digest is None


@pytest.mark.parametrize(("content", "fault"), [("\n \n", "got no prompt"), (None, "cannot be read as text")])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str | None, fault: str) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_text(content)
    with pytest.raises(ModelError, match=fault):
        encode_prompts(tmp_path / "prompts.txt", tmp_path)


def test_prompts_for_another_pipeline_say_how_a_file_is_made(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(
        ModelError,
        match=r"got 'SanaPipeline'; allowed for prompts Stable.*a file of what the pipeline's own encode_prompt",
    ):
        encode_prompts(tmp_path / "prompts.txt", tmp_path)


def test_prompts_without_transformers_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqcad_qat.models.pipeline_parts.find_spec", lambda _: None)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(
        ModelError, match=r"got no library transformers; allowed with it: pip install 'pqcad-qat\[text\]'"
    ):
        encode_prompts(tmp_path / "prompts.txt", tmp_path)
