"""The other parts of a pipeline in the deployed folder: what they compute, how they are stored, and what its index and
manifest say.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers import DiTPipeline
from tiny_runs import SCHEDULER

pytest.importorskip("transformers")

from conditional_models import saved
from paper_models import SIDE, latent_diffusion
from safetensors.torch import load_file, save_file
from text_pipelines import T5_TOKENS, TOKENS, DeployedPipeline, deployed, float_pipeline, stable_diffusion
from transformers import CLIPTokenizer, T5TokenizerFast

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.export.genai_tokenizers import GENAI_TOKENIZER
from pqcad_qat.export.part_export import PartFormat, PartsToDeploy, chosen_formats, pipeline_index, write_parts
from pqcad_qat.export.part_psnr import part_parity
from pqcad_qat.models.families.family import ConditionInput, condition_inputs
from pqcad_qat.models.part_fit import check_decoder, check_text_width
from pqcad_qat.models.pipeline_parts import VAE, PipelineParts, pipeline_parts
from pqcad_qat.models.vae import decoded, to_decoder
from pqcad_qat.sampling.trajectory import noise_schedule, trajectory
from pqcad_qat.serving.compiled_graph import compile_graph
from pqcad_qat.serving.deployed_folder import copy_folder, denoiser_bytes, read_manifest, tokenizer_of
from pqcad_qat.serving.packing import WeightFormat
from pqcad_qat.serving.part_runtime import PromptEncoder
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.vae_runtime import PictureDecoder, PictureEncoder, scaled_latents, unscaled_latents

AUTO = {"vae": "auto", "text_encoder": "auto"}
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
PROMPT = "a cat and two dogs"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    """As SDXL, every part in floating point."""
    return float_pipeline("stable-diffusion-xl", tmp_path_factory)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    """As Stable Diffusion 1.5, the VAE in INT8 and the text encoder with 8-bit weights."""
    return deployed(
        "stable-diffusion", tmp_path_factory.mktemp("narrow"), {"vae": "int8", "text_encoder": "int8-weights"}
    )


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(20 * np.log10(np.ptp(wanted) / np.sqrt(np.mean((found - wanted) ** 2))))


def outputs_of(where: DeployedPipeline, part: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a deployed text encoder gives for the prompt, and what transformers gives for the same tokens, by name."""
    encoder, full = (
        PromptEncoder(where.folder, part, properties={"INFERENCE_PRECISION_HINT": "f32"}),
        where.source.load(part),
    )
    with torch.no_grad():
        found: Any = full(input_ids=torch.from_numpy(encoder.ids(PROMPT)), output_hidden_states=True)
    wanted = {f"hidden_states.{layer}": state.numpy() for layer, state in enumerate(found.hidden_states)}
    wanted |= {
        name: found[name].numpy() for name in ("last_hidden_state", "pooler_output", "text_embeds") if name in found
    }
    return encoder(PROMPT, list(wanted)), wanted


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_float_text_encoder_gives_what_transformers_gives(plain: DeployedPipeline, part: str) -> None:
    found, wanted = outputs_of(plain, part)
    assert len(wanted) == 6
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=5e-3, err_msg=name)


def test_a_text_encoder_of_8_bit_weights_stays_near(narrow: DeployedPipeline) -> None:
    found, wanted = outputs_of(narrow, "text_encoder")
    assert psnr(found["last_hidden_state"], wanted["last_hidden_state"]) > 35
    assert np.abs(found["last_hidden_state"] - wanted["last_hidden_state"]).max() > 1e-3  # and is another one


@pytest.fixture(scope="module", params=["stable-diffusion-3", "pixart"])
def with_t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    return float_pipeline(request.param, tmp_path_factory)


def test_a_deployed_t5_gives_what_transformers_gives_with_its_mask_or_without(with_t5: DeployedPipeline) -> None:
    part = (
        "text_encoder"
        if with_t5.source.has("text_encoder") and not with_t5.source.has("text_encoder_3")
        else "text_encoder_3"
    )
    encoder, full = PromptEncoder(with_t5.folder, part, properties=F32), with_t5.source.load(part)
    words: Any = T5TokenizerFast.from_pretrained(with_t5.source.folder / tokenizer_of(part))
    assert encoder.masked == (part == "text_encoder")
    for prompt in ("", PROMPT, "A cat,  and a dog, and a dog, and a cat!"):
        given = words(prompt, padding="max_length", max_length=T5_TOKENS, truncation=True, return_tensors="pt")
        assert encoder.ids(prompt).tolist() == given.input_ids.tolist()
        assert encoder.mask(prompt).tolist() == given.attention_mask.tolist()
        with torch.no_grad():
            wanted: Any = full(given.input_ids, attention_mask=given.attention_mask if encoder.masked else None)
        found = encoder(prompt, ["last_hidden_state"])["last_hidden_state"]
        np.testing.assert_allclose(found, wanted.last_hidden_state.numpy(), atol=5e-3)


def test_a_t5_of_8_bit_weights_is_near_and_its_parity_says_so(
    tmp_path_factory: pytest.TempPathFactory, with_t5: DeployedPipeline
) -> None:
    if with_t5.source.has("text_encoder_3"):
        pytest.skip("once is enough")
    folder, inputs = tmp_path_factory.mktemp("t5"), condition_inputs(read_manifest(with_t5.folder)["conditions"])
    parts = PartsToDeploy(with_t5.source, {"text_encoder": "int8-weights"}, with_t5.latents, inputs)
    assert write_parts(parts, folder) == {"text_encoder": {"class": "T5EncoderModel", "format": "int8-weights"}}
    (found,) = part_parity(parts, folder)
    assert 30 < found.psnr < 70
    (plain,) = part_parity(replace(parts, formats={"text_encoder": "float"}), with_t5.folder)
    assert plain.psnr > found.psnr + 5


def test_a_float_vae_gives_the_pictures_of_diffusers(plain: DeployedPipeline) -> None:
    found = PictureDecoder(plain.folder, (4, 8, 8), properties={"INFERENCE_PRECISION_HINT": "f32"})(
        plain.latents.numpy()
    )
    np.testing.assert_allclose(found, decoded(plain.source.load(VAE), plain.latents).numpy(), atol=2e-3)
    assert found.shape == (8, 3, 16, 16)


def test_a_vae_in_int8_executes_in_int8_and_stays_near(narrow: DeployedPipeline) -> None:
    found = PictureDecoder(narrow.folder, (4, 8, 8))(narrow.latents.numpy())
    assert psnr(found, decoded(narrow.source.load(VAE), narrow.latents).numpy()) > 25
    compiled = ov.Core().compile_model(narrow.folder / "vae_decoder" / "openvino_model.xml", "CPU")
    kinds = [
        {key: str(getattr(value, "value", value)) for key, value in dict(node.get_rt_info().items()).items()}
        for node in compiled.get_runtime_model().get_ops()
    ]
    convolutions = [kind["runtimePrecision"] for kind in kinds if kind["layerType"] == "Convolution"]
    assert sum(precision in ("i8", "u8") for precision in convolutions) > len(convolutions) / 2 > 5


def test_8_bit_weights_take_less_room_than_float16(plain: DeployedPipeline, narrow: DeployedPipeline) -> None:
    float_vae, int8_vae = (
        (where.folder / "vae_decoder" / "openvino_model.bin").stat().st_size for where in (plain, narrow)
    )
    assert int8_vae < 0.8 * float_vae


@pytest.mark.parametrize("kind", ["stable-diffusion", "stable-diffusion-xl"])
def test_the_index_names_the_pipeline_and_what_is_there(
    kind: str, plain: DeployedPipeline, narrow: DeployedPipeline
) -> None:
    where = {"stable-diffusion": narrow, "stable-diffusion-xl": plain}[kind]
    index, original = (
        json.loads((folder / "model_index.json").read_text()) for folder in (where.folder, where.source.folder)
    )
    assert index == original  # OpenVINO GenAI knows diffusers' classes alone
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None:
            assert (where.folder / name.replace("vae", "vae_decoder")).is_dir()


def test_where_genai_does_not_open_it_the_index_names_our_runtime_for_diffusers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    index = json.loads((float_pipeline("pixart", tmp_path_factory).folder / "model_index.json").read_text())
    assert index["transformer"] == ["pqcad_qat.serving.runtime", "OVUNet2DModel"]


# No exclamation mark: openvino-tokenizers takes it for a word where it is the token of padding, as in SDXL's second.
PROMPTS = (
    "",
    PROMPT,
    "A cat,  and a dog?",
    "a cat on a dog, and a cat, and a dog, and a cat",
    "ein Käse \u2192 \U0001f408",
)


def test_a_text_encoder_has_one_stream_whatever_is_asked_for(
    narrow: DeployedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with more, OpenVINO may compile other weights on CPUs with BF16: part_runtime.ONE_STREAM
    made: list[ov.CompiledModel] = []

    def noted(*args: Any) -> ov.CompiledModel:
        made.append(compile_graph(*args))
        return made[-1]

    monkeypatch.setattr("pqcad_qat.serving.part_runtime.compile_graph", noted)
    for asked in ({"PERFORMANCE_HINT": "THROUGHPUT"}, {"NUM_STREAMS": 2}, None):
        PromptEncoder(narrow.folder, "text_encoder", properties=asked)
        assert made[-1].get_property("NUM_STREAMS") == 1


@pytest.mark.parametrize("kind", ["stable-diffusion-xl", "stable-diffusion-3"])
def test_the_tokenizers_of_genai_read_prompts_as_ours_do(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("openvino_tokenizers")  # importing it lets OpenVINO read its operations
    where = float_pipeline(kind, tmp_path_factory)
    for part in where.source.text_encoders:
        encoder = PromptEncoder(where.folder, part)
        graph = ov.compile_model(where.folder / tokenizer_of(part) / GENAI_TOKENIZER, "CPU")
        for prompt in PROMPTS:
            found = graph([prompt])["input_ids"][0].tolist()
            ids = encoder.ids(prompt)[0].tolist()
            assert found == ids[: len(found)], (part, prompt)
            assert set(ids[len(found) :]) <= {ids[-1]}  # padding, which GenAI adds itself


def test_without_the_library_a_folder_has_no_such_tokenizers(
    narrow: DeployedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pqcad_qat.export.genai_tokenizers.find_spec", lambda _: None)
    write_parts(PartsToDeploy(narrow.source, {"vae": "float", "text_encoder": "float"}, narrow.latents), tmp_path)
    assert not (tmp_path / "tokenizer" / GENAI_TOKENIZER).exists()
    assert (tmp_path / "vae_encoder" / "openvino_model.xml").is_file()


def test_the_vaes_encoder_gives_the_latents_of_diffusers(plain: DeployedPipeline) -> None:
    pictures = decoded(plain.source.load(VAE), plain.latents)[:3]
    vae: Any = plain.source.load(VAE)
    with torch.no_grad():
        wanted = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
    found = PictureEncoder(plain.folder, 4, properties=F32)(pictures.numpy())
    np.testing.assert_allclose(found, wanted.numpy(), atol=5e-3)
    assert unscaled_latents({"scaling_factor": 0.5, "shift_factor": 0.25}, found).shape == found.shape
    config = {"scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": MEAN, "latents_std": DEVIATION}
    np.testing.assert_allclose(unscaled_latents(config, scaled_latents(config, found)), found, atol=1e-5)


def test_the_report_has_the_size_and_the_psnr_of_every_part(narrow: DeployedPipeline, plain: DeployedPipeline) -> None:
    formats = {name: entry["format"] for name, entry in read_manifest(narrow.folder)["parts"].items()}
    parts = PartsToDeploy(narrow.source, {"vae": "int8", "text_encoder": "int8-weights"}, narrow.latents)
    found = {parity.part: parity for parity in part_parity(parts, narrow.folder)}
    assert {name: parity.format for name, parity in found.items()} == formats
    assert found["vae_encoder"].psnr is not None
    # a part in floating point runs in bfloat16 where the CPU has it
    assert found["vae_encoder"].psnr > 50 > (found["vae_decoder"].psnr or 0) > 20
    assert all(parity.size_bytes > 1000 for parity in found.values())


def test_what_is_left_out_is_null_in_the_index(narrow: DeployedPipeline) -> None:
    formats = chosen_formats(narrow.source, {"vae": "float", "text_encoder": "none"}, "it")
    index = pipeline_index(PartsToDeploy(narrow.source, formats, narrow.latents), ("here", "Unet"))
    assert (index["text_encoder"], index["tokenizer"], index["vae"]) == (
        [None, None],
        [None, None],
        ["diffusers", "AutoencoderKL"],
    )
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_the_manifest_says_what_each_part_is_and_holds_every_files_digest(narrow: DeployedPipeline) -> None:
    manifest = read_manifest(narrow.folder)
    assert manifest["parts"] == {
        "vae_decoder": {"class": "AutoencoderKL", "format": "int8"},
        "vae_encoder": {"class": "AutoencoderKL", "format": "float"},
        "text_encoder": {"class": "CLIPTextModel", "format": "int8-weights"},
    }
    assert {"vae_decoder/openvino_model.bin", "text_encoder/openvino_model.xml", "tokenizer/tokenizer.json"} < manifest[
        "files"
    ].keys()


def test_the_denoisers_size_leaves_the_other_parts_out(narrow: DeployedPipeline) -> None:
    files = read_manifest(narrow.folder)["files"]
    own = [name for name in files if name.split("/")[0] in ("unet", "scheduler") or "/" not in name]
    assert (
        denoiser_bytes(narrow.folder)
        == sum(files[name]["bytes"] for name in own) + (narrow.folder / "manifest.json").stat().st_size
    )


@pytest.mark.parametrize(
    "name", ["vae_decoder/openvino_model.bin", "text_encoder/config.json", "tokenizer/tokenizer.json"]
)
def test_a_damaged_part_is_refused_at_load(narrow: DeployedPipeline, name: str, tmp_path: Path) -> None:
    shutil.copytree(narrow.folder, tmp_path / "it")
    content = (tmp_path / "it" / name).read_bytes()
    (tmp_path / "it" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=rf"{name}: damaged or changed"):
        OVUNet2DModel.from_pretrained(tmp_path / "it")


def test_another_format_of_the_denoiser_keeps_the_parts_byte_for_byte(narrow: DeployedPipeline, tmp_path: Path) -> None:
    copy_folder(narrow.folder, tmp_path / "it", "packed")
    before, after = read_manifest(narrow.folder), read_manifest(tmp_path / "it")
    assert after["parts"] == before["parts"]
    others = [name for name in before["files"] if not name.startswith(("unet/openvino_model", "graph.pbtxt"))]
    assert [after["files"][name] for name in others] == [before["files"][name] for name in others]
    assert "unet/openvino_model.xml.gz" in after["files"]


@pytest.mark.parametrize("weights", ["int8", "packed"])
def test_a_copy_may_hold_the_denoiser_alone(narrow: DeployedPipeline, tmp_path: Path, weights: WeightFormat) -> None:
    copy_folder(narrow.folder, tmp_path / "it", weights, pipeline_parts=False)
    manifest = read_manifest(tmp_path / "it")
    assert manifest["parts"] == {}
    assert {name.split("/")[0] for name in manifest["files"] if "/" in name} == {"unet", "scheduler"}
    assert manifest["weights"]["format"] == weights
    assert OVUNet2DModel.from_pretrained(tmp_path / "it").sample_shape == tuple(manifest["sample_shape"])


def test_a_tokenizer_of_the_older_files_gets_the_newer_one_beside_them(tmp_path: Path) -> None:
    source = stable_diffusion(tmp_path)
    shutil.rmtree(source / "tokenizer")
    shutil.copytree(tmp_path / "words", source / "tokenizer")
    (source / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": TOKENS, "pad_token": "<|endoftext|>"})
    )
    parts = pipeline_parts(source)
    assert parts is not None
    made = tmp_path / "made"
    write_parts(PartsToDeploy(parts, {"text_encoder": "float"}, torch.zeros(1, 4, 8, 8)), made)
    assert sorted(path.name for path in (made / "tokenizer").iterdir()) == [
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    wanted = CLIPTokenizer.from_pretrained(source / "tokenizer", model_max_length=TOKENS)
    full = wanted(PROMPT, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    assert PromptEncoder(made, "text_encoder").ids(PROMPT)[0].tolist() == full


def test_a_pipeline_of_classes_is_diffusers_own_with_the_vae_of_its_source(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    where = float_pipeline("dit", tmp_path_factory)
    assert chosen_formats(where.source, AUTO, "it") == {VAE: "float"}
    vae, unet = where.source.load(VAE), OVUNet2DModel.from_pretrained(where.folder)
    pipeline = DiTPipeline.from_pretrained(where.folder, vae=vae)
    assert isinstance(pipeline.transformer, OVUNet2DModel)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        [2], guidance_scale=1.0, num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="np"
    ).images
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()
    for step in trajectory(
        lambda x, t: unet.predict(x, t, {"class_labels": np.array([2])}), x, noise_schedule(SCHEDULER), 3
    ):
        x = np.float32(step.x_s)
    wanted = PictureDecoder(where.folder, (4, 8, 8), properties={"INFERENCE_PRECISION_HINT": "f32"})(x)
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), np.clip(wanted / 2 + 0.5, 0, 1), atol=2e-2)


MEAN, DEVIATION = [0.1, -0.2, 0.3, -0.4], [0.5, 1.5, 2.0, 1.0]


@pytest.mark.parametrize("kind", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "unknown"])
def test_latents_are_scaled_as_diffusers_pipeline_of_that_class_scales_them(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = float_pipeline("stable-diffusion" if kind == "unknown" else kind, tmp_path_factory)
    source = Path(shutil.copytree(made.source.folder, tmp_path / "pipeline"))
    config = source / "vae" / "config.json"
    told = {"latents_mean": MEAN, "latents_std": DEVIATION, "shift_factor": 0.25}
    config.write_text(json.dumps({**json.loads(config.read_text()), **told}))
    if kind == "unknown":
        index = json.loads((source / "model_index.json").read_text())
        (source / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyPipeline"}))
    parts = pipeline_parts(source)
    assert parts is not None
    vae: Any = parts.load(VAE)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(value).view(1, 4, 1, 1) for value in (MEAN, DEVIATION))
    scaled = {  # as the pipelines spell it
        "stable-diffusion": latents / 0.5,
        "stable-diffusion-xl": latents * deviation / 0.5 + mean,
        "stable-diffusion-3": latents / 0.5 + 0.25,
        "unknown": (latents / 0.5 + 0.25) * deviation + mean,
    }[kind]
    torch.testing.assert_close(to_decoder(vae.config, latents), scaled)
    np.testing.assert_allclose(scaled_latents(dict(vae.config), latents.numpy()), scaled.numpy(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(decoded(vae, latents), torch.cat([vae.decode(one[None]).sample for one in scaled]))


# ---- what cannot be deployed
# -----------------------------------------------------------------------------------------------------


def test_by_default_a_model_without_other_parts_gets_none(tmp_path: Path) -> None:
    model = saved("text_unet", tmp_path / "model")
    assert chosen_formats(pipeline_parts(model.folder), AUTO, model.source) == {}
    assert chosen_formats(None, AUTO, "module:mine") == {}


@pytest.mark.parametrize(("key", "value"), [("vae", "int8"), ("text_encoder", "float")])
def test_a_part_that_is_asked_for_and_not_there_is_an_error(tmp_path: Path, key: str, value: str) -> None:
    model = saved("text_unet", tmp_path / "model")
    with pytest.raises(ModelError, match=rf"pipeline\.{key}: got {value}; allowed auto or none: .*model has no {key}"):
        chosen_formats(pipeline_parts(model.folder), {**AUTO, key: value}, model.source)


def test_a_part_of_another_class_is_refused(narrow: DeployedPipeline) -> None:
    index = {**narrow.source.index, "vae": ["diffusers", "VQModel"]}
    with pytest.raises(
        ModelError, match=r"model_index\.json: vae: got 'VQModel'; allowed AutoencoderKL, or pipeline\.vae: none"
    ):
        chosen_formats(PipelineParts(narrow.source.folder, index), AUTO, "it")


def test_a_third_text_encoder_of_another_class_is_not_left_out_in_silence(tmp_path: Path) -> None:
    (tmp_path / "text_encoder_3").mkdir()
    parts = PipelineParts(tmp_path, {"text_encoder_3": ["transformers", "GemmaModel"]})
    with pytest.raises(
        ModelError, match=r"text_encoder_3: got 'GemmaModel'; allowed CLIPTextModel, .*pipeline\.text_encoder: none"
    ):
        chosen_formats(parts, AUTO, "it")
    assert chosen_formats(parts, {**AUTO, "text_encoder": "none"}, "it") == {}


def test_t5_is_deployed_for_the_tokens_of_a_denoisers_text_alone(tmp_path: Path) -> None:
    parts = PipelineParts(tmp_path, {"text_encoder": ["transformers", "T5EncoderModel"]})
    text = ConditionInput("encoder_hidden_states", (9, 24), "float32")
    assert PartsToDeploy(parts, {}, torch.zeros(1), (text,)).tokens("text_encoder") == 9
    with pytest.raises(ExportError, match=r"got no tokens in the denoiser's text.*T5 takes the rest"):
        PartsToDeploy(parts, {}, torch.zeros(1)).tokens("text_encoder")


def test_text_encoders_without_transformers_say_what_to_install(
    narrow: DeployedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pqcad_qat.models.pipeline_parts.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pipeline\.text_encoder: got no library transformers.*pqcad-qat\[text\]"):
        chosen_formats(narrow.source, AUTO, "it")
    assert chosen_formats(narrow.source, {**AUTO, "text_encoder": "none"}, "it") == {"vae": "float"}


def test_weights_that_are_no_safetensors_are_refused(narrow: DeployedPipeline, tmp_path: Path) -> None:
    shutil.copytree(narrow.source.folder, tmp_path / "it")
    (tmp_path / "it" / "vae" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "it" / "vae" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(ModelError, match=r"allowed safetensors.*pipeline\.vae: none.* \(AutoencoderKL\)"):
        PipelineParts(tmp_path / "it", narrow.source.index).load(VAE)


def test_a_decoder_that_does_not_fit_is_told_from_configs_alone(narrow: DeployedPipeline, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow.source.folder, tmp_path / "it"))
    original = json.loads((folder / "vae" / "config.json").read_text())
    for changes, words in (
        ({"latents_mean": [0.1]}, "latents_mean: got \\[0.1\\]; allowed 4 numbers, one a latent channel"),
        ({"scaling_factor": 0}, "scaling_factor: got 0; allowed a number from 1e-06"),
        ({"out_channels": 1}, "out_channels: got 1; allowed 3"),
        ({"block_out_channels": [8, 9]}, "norm_num_groups: got 4; allowed divisors of 9"),
    ):
        (folder / "vae" / "config.json").write_text(json.dumps({**original, **changes}))
        with pytest.raises(ModelError, match=f"vae/config.json: {words}"):
            chosen_formats(pipeline_parts(folder), AUTO, "it", weights=False)
    (folder / "vae" / "config.json").write_text(json.dumps({**original, "latent_channels": 3}))
    with pytest.raises(
        ModelError, match=r"latent_channels: got 3; allowed 4, as its denoiser has, or pipeline.vae: none"
    ):
        check_decoder(pipeline_parts(folder), 4)


def test_weights_of_a_part_that_are_damaged_are_told_before_anything_is_trained(
    narrow: DeployedPipeline, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(narrow.source.folder, tmp_path / "it"))
    for part, name in (("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        weights = load_file(folder / part / name)
        key = sorted(weights)[0]
        for damage, words in (
            ({**weights, key: torch.full_like(weights[key], float("nan"))}, f"{key}: got values that are not finite"),
            ({other: value for other, value in weights.items() if other != key}, f"1 missing: {key}"),
        ):
            save_file(damage, folder / part / name, metadata={"format": "pt"})
            with pytest.raises(ModelError, match=words):
                chosen_formats(pipeline_parts(folder), AUTO, "it")
        save_file(weights, folder / part / name, metadata={"format": "pt"})
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(
        ModelError, match=r"tokenizer: got no tokenizer_config.json; allowed a text encoder with its tokenizer"
    ):
        chosen_formats(pipeline_parts(folder), AUTO, "it", weights=False)


def test_a_part_of_another_precision_alone_is_taken(narrow: DeployedPipeline, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow.source.folder, tmp_path / "it"))
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        halved = {name: value.half() for name, value in load_file(folder / part / f"{stem}.safetensors").items()}
        (folder / part / f"{stem}.safetensors").unlink()
        save_file(halved, folder / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
        parts = pipeline_parts(folder)
        assert parts is not None
        assert set(chosen_formats(parts, AUTO, "it")) == {"vae", "text_encoder"}
        own = parts.load(part).state_dict()
        assert all(torch.equal(own[name], value.float()) for name, value in halved.items())


@pytest.fixture(scope="module")
def vector_quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional latent model whose decoder looks its latents up in a codebook."""
    return latent_diffusion(tmp_path_factory.mktemp("vq") / "model")


@pytest.mark.parametrize(("form", "least"), [("float", 50.0), ("int8-weights", 30.0)])
def test_a_vector_quantized_decoder_is_deployed_as_any_other(
    form: PartFormat, least: float, vector_quantized: Path, tmp_path: Path
) -> None:
    parts = pipeline_parts(vector_quantized)
    assert parts is not None
    assert chosen_formats(parts, {**AUTO, "vae": form}, "it") == {"vqvae": form}
    latents = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    deployable = PartsToDeploy(parts, {"vqvae": form}, latents)
    assert write_parts(deployable, tmp_path) == {"vae_decoder": {"class": "VQModel", "format": form}}
    (parity,) = part_parity(deployable, tmp_path)
    assert (parity.part, parity.psnr > least) == ("vae_decoder", True)
    index = pipeline_index(deployable, ("here", "Unet"))
    assert (index["_class_name"], index["vqvae"]) == ("LDMPipeline", ["diffusers", "VQModel"])
    found = PictureDecoder(tmp_path, (3, SIDE, SIDE), properties=F32)(latents.numpy())
    assert psnr(found, decoded(parts.load("vqvae"), latents).numpy()) > least


def test_a_vector_quantized_decoder_is_not_computed_in_int8(vector_quantized: Path) -> None:
    parts = pipeline_parts(vector_quantized)
    with pytest.raises(
        ModelError, match=r"pipeline\.vae: got int8; allowed auto, none, float, int8-weights: it decodes"
    ):
        chosen_formats(parts, {**AUTO, "vae": "int8"}, "it")


def test_a_second_decoder_is_refused(vector_quantized: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(vector_quantized, tmp_path / "it"))
    shutil.copytree(folder / "vqvae", folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    parts = PipelineParts(folder, {**index, "vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ModelError, match=r"vqvae: got a second decoder beside vae; allowed one of them"):
        chosen_formats(parts, AUTO, "it")


def test_the_second_texts_width_is_what_six_sizes_leave(tmp_path: Path) -> None:
    (tmp_path / "text_encoder_2").mkdir()
    (tmp_path / "text_encoder_2" / "config.json").write_text('{"projection_dim": 20}')
    parts = PipelineParts(tmp_path, {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]})
    check_text_width(parts, [ConditionInput("text_embeds", (20,), "float32")])
    with pytest.raises(ModelError, match="projection_dim: got 20; allowed 12"):
        check_text_width(parts, [ConditionInput("text_embeds", (12,), "float32")])
