"""Folders in diffusers' layout of a single file, of LoRA files and of textual inversions: their weights, and what is
refused.

Not here: what a folder is loaded as (test_model_folders.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from single_file import write_single_file
from text_pipelines import WIDTH, stable_diffusion, stable_diffusion_xl

from pqcad_qat import cli
from pqcad_qat.errors import ModelError
from pqcad_qat.models.assembly import assemble
from pqcad_qat.models.lora import Lora
from pqcad_qat.models.model_loading import load_model

RANK = 2
FILES = {
    "unet": Path("unet/diffusion_pytorch_model.safetensors"),
    "vae": Path("vae/diffusion_pytorch_model.safetensors"),
    "text_encoder": Path("text_encoder/model.safetensors"),
}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, OUT, CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_out.0", "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
"""Modules that get a LoRA, of the UNet and of the text encoder."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def lora(folder: Path) -> Path:
    """A LoRA by PEFT's names, of projections of attention in the UNet and in the text encoder."""
    return written(folder, "style", (f"unet.{QUERY}", f"unet.{OUT}", f"text_encoder.{TEXT}"))


def written(folder: Path, name: str, layers: Sequence[str], header: Mapping[str, str] | None = None) -> Path:
    """Write a file of random matrices for these layers beside the folder."""
    dice, tensors = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for layer in layers:
        part, _, module = layer.partition(".")
        weight = load_file(folder / FILES[part])[f"{module}.weight"]
        tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=dice)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(len(weight), RANK, generator=dice)
    save_file(tensors, folder.parent / f"{name}.safetensors", dict(header or {}))
    return folder.parent / f"{name}.safetensors"


def made(source: str | Path, out: Path, **more: Any) -> Path:
    assemble(str(source), out, **{"config": None, "loras": (), "words": (), **more})
    return out


def test_a_single_file_becomes_the_folder_that_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    file = write_single_file(StableDiffusionPipeline.from_pretrained(folder), tmp_path / "one.safetensors")
    out = made(file, tmp_path / "out", config=str(folder))
    assert changed(folder, out) == {}
    model, source = load_model(str(out)), load_model(str(folder))
    for key in ("prediction_type", "beta_schedule", "timestep_spacing", "clip_sample"):
        assert model.scheduler_config[key] == source.scheduler_config[key]


def changed(folder: Path, out: Path) -> dict[str, Tensor]:
    """What was added to every tensor that is another one."""
    both = [
        {
            f"{part}.{name}": value.double()
            for part, file in FILES.items()
            for name, value in load_file(path / file).items()
        }
        for path in (folder, out)
    ]
    assert both[0].keys() == both[1].keys()
    return {name: both[1][name] - value for name, value in both[0].items() if not torch.equal(value, both[1][name])}


def test_lora_files_are_added_to_the_weights_one_after_another(folder: Path, lora: Path, tmp_path: Path) -> None:
    out = made(folder, tmp_path / "out", loras=[Lora(lora, 0.5), Lora(lora, -2.0)])
    added, matrices = changed(folder, out), load_file(lora)
    assert added.keys() == {f"{layer}.weight" for layer in (f"unet.{QUERY}", f"unet.{OUT}", f"text_encoder.{TEXT}")}
    for name, value in added.items():
        a, b = (matrices[name.replace("weight", f"lora_{matrix}.weight")].double() for matrix in "AB")
        assert torch.allclose(value, -1.5 * b @ a, atol=1e-5)


def test_what_the_header_says_of_alpha_counts(folder: Path, tmp_path: Path) -> None:
    said = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"to_q": 1}, "unet.use_rslora": False}
    header = {"lora_adapter_metadata": json.dumps(said)}
    lora = written(folder, "header", (f"unet.{QUERY}", f"unet.{OUT}"), header)
    added, matrices = changed(folder, made(folder, tmp_path / "out", loras=[Lora(lora)])), load_file(lora)
    for layer, factor in ((QUERY, 1 / RANK), (OUT, 6 / RANK)):
        a, b = (matrices[f"unet.{layer}.lora_{matrix}.weight"].double() for matrix in "AB")
        assert torch.allclose(added[f"unet.{layer}.weight"], factor * b @ a, atol=1e-5)
    dora = written(folder, "dora", (f"unet.{QUERY}",), {"lora_adapter_metadata": '{"unet.use_dora": true}'})
    with pytest.raises(
        ModelError, match=r"dora\.safetensors: lora_adapter_metadata: unet\.use_dora: got True; allowed"
    ):
        made(folder, tmp_path / "none", loras=[Lora(dora)])


def test_kohyas_names_and_alphas_are_read_for_linear_layers_and_convolutions(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = load_file(folder / FILES["unet"])
    expected, tensors = dict[str, Tensor](), dict[str, Tensor]()
    for alpha, layer in ((1.0, QUERY), (3.0, CONV)):
        weight = weights[f"{layer}.weight"]
        down = torch.randn(RANK, *weight.shape[1:])
        up = torch.randn(len(weight), RANK, *(1 for _ in weight.shape[2:]))
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
        expected[f"unet.{layer}.weight"] = torch.einsum("or,r...->o...", up.flatten(1), down) * (alpha / RANK)
    text, rows = f"lora_te_text_model_{TEXT.replace('.layers.', '_layers_').replace('.', '_')}", WIDTH
    down, up = torch.randn(RANK, rows), torch.randn(rows, RANK)
    tensors |= {f"{text}.lora_down.weight": down, f"{text}.lora_up.weight": up, f"{text}.alpha": torch.tensor(1.0)}
    expected[f"text_encoder.{TEXT}.weight"] = up @ down / RANK
    save_file(tensors, tmp_path / "kohya.safetensors")
    added = changed(folder, made(folder, tmp_path / "out", loras=[Lora(tmp_path / "kohya.safetensors")]))
    assert added.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(added[name], value.double(), atol=1e-5)


def test_words_of_textual_inversion_are_read_in_prompts(folder: Path, tmp_path: Path) -> None:
    vectors = torch.randn(2, WIDTH)
    save_file({"emb_params": vectors}, tmp_path / "toy.safetensors")
    assembled = assemble(str(folder), tmp_path / "out", config=None, loras=(), words=[tmp_path / "toy.safetensors"])
    (words,) = assembled.words.values()
    assert words == "<toy> <toy>_1"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    numbers = pipeline.tokenizer(f"a {words}").input_ids[-3:-1]
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[numbers], vectors)


def test_a_word_of_sdxl_has_a_tensor_for_each_text_encoder(tmp_path: Path) -> None:
    source = stable_diffusion_xl(tmp_path)
    vectors = {"clip_l": torch.randn(1, WIDTH // 2), "clip_g": torch.randn(1, WIDTH // 2)}
    save_file(vectors, tmp_path / "toy.safetensors")
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        made(source, tmp_path / "out", words=[tmp_path / "toy.safetensors"])
    )
    for tokenizer, encoder, name in (
        (pipeline.tokenizer, pipeline.text_encoder, "clip_l"),
        (pipeline.tokenizer_2, pipeline.text_encoder_2, "clip_g"),
    ):
        number = tokenizer.convert_tokens_to_ids("<toy>")
        assert torch.equal(encoder.get_input_embeddings().weight[number], vectors[name][0])


def test_what_cannot_be_used_is_one_error_and_leaves_nothing(folder: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    (tmp_path / "half.safetensors").write_bytes(lora.read_bytes()[:100])
    save_file({"unet.down_blocks.9.to_q.lora_A.weight": torch.ones(2, 3)}, tmp_path / "other.safetensors")
    wide = {f"unet.{QUERY}.lora_A.weight": torch.ones(2, 99), f"unet.{QUERY}.lora_B.weight": torch.ones(8, 2)}
    save_file(wide, tmp_path / "large.safetensors")
    save_file({"emb_params": torch.ones(WIDTH + 1)}, tmp_path / "wide.safetensors")
    save_file({"clip_l": torch.ones(WIDTH), "clip_g": torch.ones(WIDTH)}, tmp_path / "xl.safetensors")
    out = tmp_path / "out"
    for said, source, more in (
        ("old.ckpt: got a file of another kind", tmp_path / "old.ckpt", {}),
        ("style.safetensors: got a checkpoint in a single file; allowed with --config", lora, {}),
        ("style.safetensors: got a file or folder that diffusers cannot use", lora, {"config": str(folder)}),
        ("--config: got", folder, {"config": str(folder)}),
        ("none.safetensors: got no such file", folder, {"loras": [Lora(tmp_path / "none.safetensors")]}),
        ("half.safetensors: got a file that cannot be read", folder, {"loras": [Lora(tmp_path / "half.safetensors")]}),
        ("other.safetensors: got .*, which is no layer", folder, {"loras": [Lora(tmp_path / "other.safetensors")]}),
        (
            "large.safetensors: got .* with A .* and B .* for a weight",
            folder,
            {"loras": [Lora(tmp_path / "large.safetensors")]},
        ),
        ("none.safetensors: got no such file", "none.safetensors", {}),
        ("^--config: got", lora, {"config": "no/such/model"}),
        ("wide.safetensors: got", folder, {"words": [tmp_path / "wide.safetensors"]}),
        ("xl.safetensors: got .* allowed a textual inversion", folder, {"words": [tmp_path / "xl.safetensors"]}),
        ("_class_name: got .*; allowed .*FluxPipeline", folder / "unet", {"loras": [Lora(lora)]}),
    ):
        with pytest.raises(ModelError, match=said):
            made(source, out, **more)
        assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ModelError, match="got a folder that holds files"):
        made(folder, out)
    assert sorted(tmp_path.glob(".*")) == []


def test_the_command_says_what_it_has_added(
    folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"emb_params": torch.randn(WIDTH)}, tmp_path / "toy.safetensors")
    words = ("--loras", f"{lora}:0.5", "--embeddings", str(tmp_path / "toy.safetensors"))
    cli.main(["assemble", str(folder), "--out", str(tmp_path / "out"), *words])
    said = capsys.readouterr().out
    assert f"added: {lora}, 3 layers" in said
    assert "in prompts: <toy>\n" in said
    with pytest.raises(SystemExit) as ended:
        cli.main(["assemble", str(folder), "--out", str(tmp_path / "other"), "--loras", f"{lora}:much"])
    assert ended.value.code == 2
    assert "after the colon" in capsys.readouterr().err
