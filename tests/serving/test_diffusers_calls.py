"""A deployed denoiser is called as the class that it was made from: nothing that is said is passed over."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from deployed_fixture import SHAPE, deployed_unet
from diffusers import DDIMPipeline, DDPMPipeline
from tiny_runs import SCHEDULER, tiny_unet

from pqcad_qat.errors import ModelError
from pqcad_qat.export.export_model import ExportRequest, export_model
from pqcad_qat.models.families.table import families, family_named
from pqcad_qat.models.model_loading import save_model
from pqcad_qat.serving.diffusers_calls import read_call
from pqcad_qat.serving.diffusers_stand_in import UNetConfig
from pqcad_qat.serving.runtime import OVUNet2DModel

X, TEXT, LABELS = np.zeros((2, 4, 8, 8)), np.ones((2, 7, 24)), np.array([1, 2])
COND, SAMPLE = "UNet2DConditionModel", "UNet2DModel"


@pytest.mark.parametrize("kind", list(families()))
def test_arguments_go_by_place_as_in_diffusers(kind: str) -> None:
    assert family_named(kind).parameters == tuple(inspect.signature(getattr(diffusers, kind).forward).parameters)[1:]


@pytest.mark.parametrize(
    ("kind", "takes", "positional", "named"),
    [
        (SAMPLE, ["class_labels"], (X, 5, LABELS), {}),
        (SAMPLE, ["class_labels"], (X,), {"timestep": 5, "class_labels": LABELS}),
        (COND, ["encoder_hidden_states"], (X, 5, TEXT), {}),
        (COND, ["encoder_hidden_states", "class_labels"], (X, 5, TEXT), {"class_labels": LABELS}),
        (
            COND,
            ["encoder_hidden_states", "class_labels"],
            (X, 5, TEXT, LABELS, None, None, {}, {}, None, None, None, None, True),
            {},
        ),
        (
            COND,
            ["encoder_hidden_states", "text_embeds"],
            (X, 5, TEXT),
            {"added_cond_kwargs": {"text_embeds": LABELS, "time_ids": None}},
        ),
        (
            COND,
            ["encoder_hidden_states"],
            (X, 5),
            {"encoder_hidden_states": TEXT, "down_block_additional_residuals": ()},
        ),
        ("DiTTransformer2DModel", ["class_labels"], (X,), {"timestep": 5, "class_labels": LABELS}),
        ("DiTTransformer2DModel", ["class_labels"], (), {"sample": X, "timestep": 5, "class_labels": LABELS}),
        (
            "PixArtTransformer2DModel",
            ["encoder_hidden_states", "encoder_attention_mask"],
            (X, TEXT, 5),
            {"encoder_attention_mask": LABELS},
        ),
        (
            "SD3Transformer2DModel",
            ["encoder_hidden_states", "pooled_projections"],
            (X, TEXT, LABELS, 5),
            {"joint_attention_kwargs": None},
        ),
        (
            "FluxTransformer2DModel",
            ["guidance"],
            (),
            {"hidden_states": X, "timestep": 5, "guidance": LABELS, "img_ids": LABELS},
        ),
        ("OwnModule", ["a", "b"], (X, 5, TEXT, LABELS), {}),
    ],
)
def test_a_call_is_read_as_its_class_reads_it(
    kind: str, takes: list[str], positional: tuple[Any, ...], named: dict[str, Any]
) -> None:
    call = read_call(kind, takes, positional, named, where="folder")
    assert call.states is X
    assert call.timestep == 5
    assert call.as_dict
    assert sorted(call.conditions) == sorted(takes)
    for name, value in call.conditions.items():
        assert value is (TEXT if name in ("encoder_hidden_states", "a") else LABELS)
    assert (call.places is LABELS) == ("img_ids" in named)


@pytest.mark.parametrize(
    ("kind", "takes", "positional", "named", "message"),
    [
        (
            COND,
            [],
            (X, 5),
            {"down_block_additional_residuals": (torch.zeros(1), torch.zeros(2))},
            "ControlNet or T2I-Adapter",
        ),
        (COND, [], (X, 5), {"mid_block_additional_residual": torch.zeros(1)}, "ControlNet or T2I-Adapter"),
        (COND, [], (X, 5), {"timestep_cond": LABELS}, "give the pipeline a guidance_scale"),
        (
            COND,
            [],
            (X, 5),
            {"cross_attention_kwargs": {"scale": 0.5}},
            "got scale; allowed none: there are no layers that adapters could reach: merge them",
        ),
        (COND, [], (X, 5), {"encoder_attention_mask": LABELS}, "exported without a mask"),
        (COND, [], (X, 5), {"added_cond_kwargs": {"image_embeds": [LABELS]}}, "adapters could reach"),
        (COND, ["encoder_hidden_states"], (X, 5), {}, "conditions: got none; allowed encoder_hidden_states"),
        (
            COND,
            ["encoder_hidden_states"],
            (X, 5, TEXT),
            {"encoder_hidden_state": TEXT},
            "got encoder_hidden_states, encoder_hidden_state",
        ),
        (
            COND,
            ["encoder_hidden_states"],
            (X, 5, TEXT),
            {"encoder_hidden_states": TEXT},
            "by place and by name; allowed once",
        ),
        (
            COND,
            ["encoder_hidden_states"],
            (X, 5, "a cat"),
            {},
            "encoder_hidden_states: got str; allowed numbers, a numpy array",
        ),
        (
            COND,
            ["encoder_hidden_states"],
            (X, 5, [[1], [1, 2]]),
            {},
            "encoder_hidden_states: got list; allowed numbers",
        ),
        (SAMPLE, [], (X, 5, LABELS), {}, "the model has no classes: leave them out"),
        (
            SAMPLE,
            [],
            (X, 5, None, True, 7),
            {},
            "got 5 arguments by place; allowed 4: sample, timestep, class_labels, return_dict",
        ),
        (SAMPLE, [], (X,), {}, "got 1 of sample or hidden_states and timestep None; allowed one, and a time step"),
        (SAMPLE, [], (X, 5), {"hidden_states": X}, "got 2 of sample or hidden_states"),
        ("SD3Transformer2DModel", [], (X,), {"timestep": 5, "skip_layers": [3]}, "leave skip_guidance_layers out"),
    ],
)
def test_what_the_graph_does_not_take_is_refused_with_what_to_do(
    kind: str, takes: list[str], positional: tuple[Any, ...], named: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as told:
        read_call(kind, takes, positional, named, where="folder")
    assert str(told.value).startswith("folder: ")
    assert len(str(told.value)) < 4000


def test_pipelines_read_of_a_config_what_most_have_not() -> None:
    config = UNetConfig(sample_size=8)
    assert (config.sample_size, config.time_cond_proj_dim, config.encoder_hid_dim_type) == (8, None, None)
    assert not hasattr(config, "_diffusers_version")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny UNet, for 5 steps."""
    made = deployed_unet(tmp_path_factory).quantized
    path = tmp_path_factory.mktemp("deployed") / "openvino"
    request = ExportRequest(made.model, {**SCHEDULER, "num_inference_steps": 5}, made.layers, SHAPE, batch_size=2)
    return export_model(request, path).path


def test_a_pipeline_that_is_not_told_the_steps_says_which_they_are_once(folder: Path) -> None:
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(num_inference_steps=5, output_type="np")
    with pytest.warns(
        UserWarning, match=r"openvino: called at time 979, .* it has 5 steps\. Write num_inference_steps=5 in"
    ):
        pipeline(output_type="np")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*called at time")
        pipeline(output_type="np")


def test_what_our_own_sampler_asks_for_is_not_questioned(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    OVUNet2DModel.from_pretrained(folder).predict(np.zeros((1, *SHAPE), np.float32), 7)
    assert not recwarn.list


def test_a_pipeline_of_the_source_takes_the_deployed_model_as_it_takes_one_of_diffusers(
    folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_model(tiny_unet().eval(), SCHEDULER, tmp_path / "unet")
    DDIMPipeline(tiny_unet(), diffusers.DDIMScheduler.from_config(SCHEDULER)).save_pretrained(tmp_path / "source")
    ours = OVUNet2DModel.from_pretrained(folder)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "source", unet=ours)
    assert pipeline.unet is ours
    for place in ("cuda", torch.float16):
        with pytest.raises(
            ModelError, match=f"to: got {place}; allowed cpu and float32: it runs on CPU from cpu memory"
        ):
            pipeline.to(place)
    assert pipeline.to("cpu").device == torch.device("cpu")
    assert not list(ours.parameters())
    pipeline.enable_attention_slicing()
    pipeline.save_pretrained(tmp_path / "saved")
    assert OVUNet2DModel.from_pretrained(tmp_path / "saved" / "unet").manifest == ours.manifest
