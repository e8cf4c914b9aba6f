"""Damaged model folders: each ends in a model or in one error that names the file, from plan's reading of configs and from loading.

Not here: schedulers, which are only read here, nor the policy around a model.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conditional_models import MODELS, saved
from fuzzing import FUZZ, bounded
from hypothesis import given
from hypothesis import strategies as st

from pqcad_qat.deployment.parts import chosen_formats
from pqcad_qat.diffusion.denoiser import DiffusionModel, check_time_table, load_model
from pqcad_qat.diffusion.pipeline_parts import VAE, check_decoder, check_text_width, pipeline_parts
from pqcad_qat.diffusion.untrained import shapes_of
from pqcad_qat.errors import PqcadError

AUTO = {"vae": "auto", "text_encoder": "auto"}
LONGEST = 4096
"""Characters of a message."""

EDGES = (0, -1, 1, 2, 3, 4, 7, 12, 16, 24, 64, 1000, 4096, 2**31, 2**63, 10**30, -(10**9))
REALS = (0.0, 0.5, -0.5, 1e-30, 1e308, 16.0, float("nan"), float("inf"), float("-inf"))
WORDS = (
    "",
    "x",
    "null",
    "fourier",
    "learned",
    "text",
    "image",
    "gated",
    "ada_norm",
    "scale_shift",
    "UNet2DModel",
    "../..",
    "x" * 9000,
    "\x00",
)
BLOCKS = ("DownBlock2D", "AttnUpBlock2D", "CrossAttnDownBlock2D", "SkipDownBlock2D", "KDownBlock2D", "UNetMidBlock2D", "conv_in")
scalars = st.none() | st.booleans() | st.sampled_from(EDGES) | st.sampled_from(REALS) | st.sampled_from((*WORDS, *BLOCKS))
rubbish = st.recursive(
    scalars, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.sampled_from(("a", "b")), part, max_size=2), max_leaves=6
)
DROPPED = object()


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name; whoever damages one of them puts it right again."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        saved(name, folder / name)
    pytest.importorskip("transformers")
    from text_pipelines import stable_diffusion, stable_diffusion_xl

    made = {"stable-diffusion": stable_diffusion, "stable-diffusion-xl": stable_diffusion_xl}
    return {name: folder / name for name in MODELS} | {name: make(folder / name) for name, make in made.items()}


def planned(source: str) -> DiffusionModel:
    """All that `plan` reads of a model, less its policy."""
    return looked_at(shapes_of(source), source, weights=False)


def loaded(source: str) -> DiffusionModel:
    return looked_at(load_model(source), source, weights=True)


def looked_at(model: DiffusionModel, source: str, weights: bool) -> DiffusionModel:
    check_time_table(model, 1000)
    parts = pipeline_parts(model.folder)
    check_text_width(parts, model.condition_inputs)
    if VAE in chosen_formats(parts, AUTO, source, weights):
        check_decoder(parts, model.sample_shape[0])
    assert model.example[0].shape[1:] == model.sample_shape
    return model


def ends_well(folder: Path, alike: bool = True) -> None:
    """A model, or one error of bounded length that names something of the folder; no file more, from plan and from run."""
    before, outcomes = names(folder.parent), []
    for call in (planned, loaded):
        try:
            with bounded():
                call(str(folder))
            outcomes.append("")
        except PqcadError as error:
            outcomes.append(str(error))
            assert len(outcomes[-1]) < LONGEST
            assert str(folder) in outcomes[-1]
    assert names(folder.parent) == before
    assert outcomes[1] or not outcomes[0]  # what plan refuses, run refuses
    assert outcomes[1] == outcomes[0] or not outcomes[0] or not alike  # in the same words


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(original)


def changed(path: Path, data: st.DataObject, keys: list[str]) -> bytes:
    """A JSON object's text with one to three of its keys changed, dropped or added."""
    content = json.loads(path.read_bytes())
    for key in data.draw(st.lists(st.sampled_from([*content, *keys]), min_size=1, max_size=3, unique=True)):
        value = data.draw(st.just(DROPPED) | rubbish)
        content = {name: old for name, old in content.items() if name != key} | ({} if value is DROPPED else {key: value})
    return json.dumps(content).encode()


CONFIGS = {
    "class_unet": ["unet/config.json"],
    "text_unet": ["unet/config.json"],
    "text_and_size_unet": ["unet/config.json"],
    **{name: ["transformer/config.json"] for name in ("dit", "pixart", "sd3", "flux")},
    "stable-diffusion": ["vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"],
}
MORE_KEYS = [
    "time_cond_proj_dim",
    "sample_size",
    "quantization_config",
    "latents_mean",
    "latents_std",
    "_use_default_values",
    "hidden_size",
]


@FUZZ
@given(data=st.data())
def test_fuzz_a_config_of_any_values_ends_in_a_model_or_one_error(pipelines: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    path = pipelines[name] / data.draw(st.sampled_from(CONFIGS[name]))
    with replaced(path, changed(path, data, MORE_KEYS)):
        ends_well(pipelines[name])


@FUZZ
@given(data=st.data())
def test_fuzz_an_index_of_any_values_ends_in_a_model_or_one_error(pipelines: dict[str, Path], data: st.DataObject) -> None:
    folder = pipelines[data.draw(st.sampled_from(["stable-diffusion-xl", "dit", "class_unet"]))]
    keys = ["controlnet", "vqvae", "image_encoder", "requires_aesthetics_score", "_class_name", "unet", "transformer"]
    with replaced(folder / "model_index.json", changed(folder / "model_index.json", data, keys)):
        ends_well(folder)


TEXTS = (
    b"",
    b"{",
    b"[1, 2]",
    b"null",
    b'"text"',
    b"[" * 100_000,
    b'{"a": ' * 50_000 + b"1" + b"}" * 50_000,
    b'{"in_channels": 1, "in_channels": 3}',
    b'{"in_channels": ' + b"9" * 10_000 + b"}",
    b"\xff\xfe{}",
    b'{"a": "\xc3\x28"}',
    b"\xef\xbb\xbf{}",
    b"{}",
    b"\x00" * 100,
    b"{" + b'"x": 1, ' * 20_000 + b'"y": 2}',
)
FILES = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "vae/config.json", "text_encoder/config.json")


@FUZZ
@given(name=st.sampled_from(FILES), text=st.sampled_from(TEXTS) | st.binary(max_size=40))
def test_fuzz_any_text_in_the_place_of_json_ends_in_one_error(pipelines: dict[str, Path], name: str, text: bytes) -> None:
    folder = pipelines["stable-diffusion"]
    with replaced(folder / name, text):
        ends_well(folder)


WEIGHTS = {"class_unet": "unet/diffusion_pytorch_model.safetensors", "stable-diffusion": "vae/diffusion_pytorch_model.safetensors"}


@FUZZ
@given(data=st.data())
def test_fuzz_damaged_weights_end_in_a_model_or_one_error(pipelines: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(WEIGHTS)))
    path = pipelines[name] / WEIGHTS[name]
    with replaced(path, damaged(path.read_bytes(), data)):
        ends_well(pipelines[name])


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """safetensors cut off, with bytes changed, or with a header that says something else."""
    length = struct.unpack("<Q", content[:8])[0]
    match data.draw(st.sampled_from(["cut", "flip", "length", "entry", "names"])):
        case "cut":
            return content[: data.draw(st.integers(0, len(content) - 1))]
        case "flip":
            found = bytearray(content)
            for _ in range(data.draw(st.integers(1, 4))):
                found[data.draw(st.integers(0, 8 + length + 64))] ^= data.draw(st.integers(1, 255))
            return bytes(found)
        case "length":
            return struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, length + 1, length - 1]))) + content[8:]
        case kind:
            header: dict[str, Any] = json.loads(content[8 : 8 + length])
            key = data.draw(st.sampled_from(sorted(header)))
            if kind == "entry":
                part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
                header[key] = {**header[key], part: data.draw(rubbish | st.sampled_from(["F16", "F64", "I8", "BOOL", "F8_E4M3", "U64"]))}
            else:
                header = {("module." if data.draw(st.booleans()) else "x") + name: entry for name, entry in header.items()}
            text = json.dumps(header).encode()
            return struct.pack("<Q", len(text)) + text + content[8 + length :]


PLACES = ("", "model_index.json", "unet", "unet/config.json", "scheduler", "vae", "vae/config.json", "text_encoder", "tokenizer")
MORE_PLACES = ("scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


@FUZZ
@given(places=st.lists(st.sampled_from(PLACES[1:] + MORE_PLACES), min_size=1, max_size=2, unique=True), kind=st.integers(0, 5))
def test_fuzz_files_that_are_missing_or_something_else_end_in_one_error(
    pipelines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, places: list[str], kind: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(pipelines["stable-diffusion"], folder)
    for place in (folder / place for place in places):
        if not place.exists():
            continue
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
        match kind:
            case 1:
                place.mkdir()
            case 2:
                place.touch()
            case 3:
                place.symlink_to(place)
            case 4:
                os.mkfifo(place)
            case 5:
                place.symlink_to("/dev/zero")
    ends_well(folder, alike=False)
    shutil.rmtree(folder.parent)
