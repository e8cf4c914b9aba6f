"""Damaged model folders: each ends in a model or in one error that names the file, from plan's reading of configs and
from loading.

Not here: schedulers, which are only read here, nor the policy around a model.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conditional_models import MODELS, saved
from fuzzing import FUZZ, bounded
from hypothesis import given
from hypothesis import strategies as st

from pqcad_qat.errors import PqcadError
from pqcad_qat.export.part_export import chosen_formats
from pqcad_qat.models.denoiser import DiffusionModel, check_time_table
from pqcad_qat.models.model_loading import load_model
from pqcad_qat.models.part_fit import check_decoder, check_text_width, picture_shape
from pqcad_qat.models.pipeline_parts import VAE, VQ, pipeline_parts
from pqcad_qat.models.untrained import shapes_of

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
BLOCKS = (
    "DownBlock2D",
    "AttnUpBlock2D",
    "CrossAttnDownBlock2D",
    "SkipDownBlock2D",
    "KDownBlock2D",
    "UNetMidBlock2D",
    "conv_in",
)
scalars = (
    st.none() | st.booleans() | st.sampled_from(EDGES) | st.sampled_from(REALS) | st.sampled_from((*WORDS, *BLOCKS))
)
rubbish = st.recursive(
    scalars,
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.sampled_from(("a", "b")), part, max_size=2),
    max_leaves=6,
)
DROPPED = object()


Call = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name; whoever damages one of them puts it right again."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        saved(name, folder / name)
    pytest.importorskip("transformers")
    from text_pipelines import stable_diffusion

    return {name: folder / name for name in MODELS} | {"pipeline": stable_diffusion(folder / "pipeline")}


def planned(folder: Path) -> object:
    """All that `plan` reads of a denoiser."""
    return of_use(shapes_of(str(folder)))


def loaded(folder: Path) -> object:
    return of_use(load_model(str(folder)))


def of_use(model: DiffusionModel) -> object:
    check_time_table(model, 1000)
    parts = pipeline_parts(model.folder)
    check_text_width(parts, model.condition_inputs)
    assert model.example[0].shape[1:] == model.sample_shape
    return parts


def parts_planned(folder: Path) -> object:
    """All that `plan` reads of what stands beside a denoiser."""
    return of_parts(folder, weights=False)


def parts_loaded(folder: Path) -> object:
    return of_parts(folder, weights=True)


def of_parts(folder: Path, weights: bool) -> object:
    parts = pipeline_parts(folder)
    formats = chosen_formats(parts, AUTO, str(folder), weights)
    if VAE in formats or VQ in formats:
        check_decoder(parts, 4)
        picture_shape(parts, (4, 8, 8))
    return formats


DENOISER, BESIDE = (planned, loaded), (parts_planned, parts_loaded)


def ends_well(folder: Path, plan: Call, run: Call, alike: bool = True) -> None:
    """A model, or one error of bounded length that names something of the folder; no file more, from plan and from
    run.
    """
    before, outcomes = names(folder.parent), []
    for call in (plan, run):
        try:
            with bounded():
                call(folder)
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
        content = {name: old for name, old in content.items() if name != key} | (
            {} if value is DROPPED else {key: value}
        )
    return json.dumps(content).encode()


CONFIGS = {
    **{name: ["unet/config.json"] for name in ("class_unet", "text_unet", "text_and_size_unet")},
    **{name: ["transformer/config.json"] for name in ("dit", "pixart", "sd3", "flux")},
    "pipeline": ["vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"],
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
def test_fuzz_a_config_of_any_values_ends_in_a_model_or_one_error(models: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    path = models[name] / data.draw(st.sampled_from(CONFIGS[name]))
    with replaced(path, changed(path, data, MORE_KEYS)):
        ends_well(models[name], *(BESIDE if name == "pipeline" else DENOISER))


@FUZZ
@given(data=st.data())
def test_fuzz_an_index_of_any_values_ends_in_a_model_or_one_error(models: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["pipeline", "dit", "class_unet"]))
    folder = models[name]
    keys = ["controlnet", "vqvae", "image_encoder", "requires_aesthetics_score", "_class_name", "unet", "transformer"]
    with replaced(folder / "model_index.json", changed(folder / "model_index.json", data, keys)):
        ends_well(folder, *DENOISER)
        if name == "pipeline":
            ends_well(folder, *BESIDE)


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
FILES = (
    "model_index.json",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "vae/config.json",
    "text_encoder/config.json",
)


@FUZZ
@given(name=st.sampled_from(FILES), text=st.sampled_from(TEXTS) | st.binary(max_size=40))
def test_fuzz_any_text_in_the_place_of_json_ends_in_one_error(models: dict[str, Path], name: str, text: bytes) -> None:
    folder = models["pipeline"]
    with replaced(folder / name, text):
        ends_well(folder, *(BESIDE if name.startswith(("vae", "text")) else DENOISER))


WEIGHTS = {
    "class_unet": "unet/diffusion_pytorch_model.safetensors",
    "pipeline": "vae/diffusion_pytorch_model.safetensors",
}


@FUZZ
@given(data=st.data())
def test_fuzz_damaged_weights_end_in_a_model_or_one_error(models: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(WEIGHTS)))
    path = models[name] / WEIGHTS[name]
    with replaced(path, damaged(path.read_bytes(), data)):
        ends_well(models[name], lambda _: None, vae_loaded if name == "pipeline" else loaded)


def vae_loaded(folder: Path) -> object:
    parts = pipeline_parts(folder)
    assert parts is not None
    return parts.load(VAE)


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
            return (
                struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, length + 1, length - 1])))
                + content[8:]
            )
        case kind:
            header: dict[str, Any] = json.loads(content[8 : 8 + length])
            key = data.draw(st.sampled_from(sorted(header)))
            if kind == "entry":
                part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
                header[key] = {
                    **header[key],
                    part: data.draw(rubbish | st.sampled_from(["F16", "F64", "I8", "BOOL", "F8_E4M3", "U64"])),
                }
            else:
                header = {
                    ("module." if data.draw(st.booleans()) else "x") + name: entry for name, entry in header.items()
                }
            text = json.dumps(header).encode()
            return struct.pack("<Q", len(text)) + text + content[8 + length :]


OF_DENOISER = (
    "model_index.json",
    "unet",
    "unet/config.json",
    "scheduler",
    "scheduler/scheduler_config.json",
    "unet/model.safetensors",
)
OF_PARTS = (
    "vae",
    "vae/config.json",
    "text_encoder",
    "text_encoder/config.json",
    "tokenizer",
    "tokenizer/tokenizer_config.json",
)
STORED = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@FUZZ
@given(
    place=st.sampled_from(OF_DENOISER + OF_PARTS + STORED),
    kind=st.sampled_from(["", "folder", "empty", "loop", "pipe", "zeros"]),
)
def test_fuzz_a_file_that_is_missing_or_something_else_ends_in_one_error(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, place: str, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(models["pipeline"], folder)
    path = folder / place
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "loop":
            path.symlink_to(path)
        case "pipe":
            os.mkfifo(path)
        case "zeros":
            path.symlink_to("/dev/zero")
    of_parts = place in OF_PARTS or place.startswith(("vae", "text"))
    ends_well(folder, *(BESIDE if of_parts else DENOISER), alike=False)
    shutil.rmtree(folder.parent)
