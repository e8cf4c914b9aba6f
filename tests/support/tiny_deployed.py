"""A deployed text-to-image folder of a few kB that loads in milliseconds: one planned layer, and graphs of a few nodes
beside it.

Not here: any test. There is no PyTorch network: the graphs are built by hand, and written as the exporter writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from pqcad_qat.machine.files import file_digest, write_json
from pqcad_qat.serving.deployed_folder import write_folder
from pqcad_qat.serving.packing import WeightFormat, write_graph

ops = ov.opset13

BATCH, SHAPE, TOKENS, WIDTH, PICTURE = 2, (4, 4, 4), 5, 3, (1, 3, 8, 8)

WORDS = ("<pad>", "a", "cat", "dog", "<unk>")

LAYER = "to_out"
"""Name of the denoiser's planned layer: a product of the text with an INT8 matrix."""


def tiny_deployed(folder: Path, weights: WeightFormat = "int8") -> Path:
    """StableDiffusionPipeline with latents 4x4x4, pictures 8x8, prompts of 5 tokens, and 2 sampling steps."""
    texts = {
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "in_channels": SHAPE[0], "sample_size": SHAPE[1]},
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 100,
            "beta_start": 0.001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "trained_betas": None,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "steps_offset": 0,
            "clip_sample": False,
            "clip_sample_range": 1.0,
            "set_alpha_to_one": True,
            "thresholding": False,
            "rescale_betas_zero_snr": False,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
        },
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["pqcad_qat.serving.runtime", "OVUNet2DModel"],
        },
    }
    manifest = {
        "schema_version": 1,
        "provenance": {"policy": "tiny", "sampling_steps": 2, "full_precision_steps": 4},
        "sample_shape": list(SHAPE),
        "batch_size": BATCH,
        "train_timesteps": 100,
        "timestep_dtype": "int64",
        "conditions": [{"name": "encoder_hidden_states", "shape": [TOKENS, WIDTH], "dtype": "float32", "bound": None}],
        "cpu": {"exact_from": "avx2", "layers_that_need_vnni": [], "note": ""},
        "layers": {
            LAYER: {
                "kind": "Linear",
                "weight_bits": 3,
                "stored_bits": 8,
                "input_bits": 8,
                "input_group": LAYER,
                "needs_vnni": False,
            }
        },
        "attention": {},
    }
    write_folder(_denoiser(), weights, texts, manifest, folder=folder, part="unet", further=_further)
    return folder


def _denoiser() -> ov.Model:
    """Denoiser that adds to x_t one number for each channel, computed from the text and t."""
    sample = _input([BATCH, *SHAPE], np.float32, "sample")
    time = _input([BATCH], np.int64, "timestep")
    text = _input([BATCH, TOKENS, WIDTH], np.float32, "encoder_hidden_states")
    whole = ops.constant(np.arange(4 * WIDTH, dtype=np.int8).reshape(4, WIDTH) % 8 - 4)
    matrix = ops.multiply(ops.convert(whole, "f32"), ops.constant(np.float32(0.05)))
    product = ops.matmul(text, matrix, False, True, name=LAYER)  # (B, tokens, 4)
    told = ops.reshape(ops.reduce_mean(product, np.array([1])), np.array([BATCH, 4, 1, 1]), False)
    late = ops.reshape(
        ops.multiply(ops.convert(time, "f32"), ops.constant(np.float32(1e-3))), np.array([BATCH, 1, 1, 1]), False
    )
    return _model(ops.add(ops.add(sample, told), late), "out_sample", sample, time, text)


def _further(folder: Path) -> Mapping[str, Any]:
    ids = _input([-1, TOKENS], np.int64, "input_ids")
    table = ops.constant(np.linspace(-1, 1, len(WORDS) * WIDTH, dtype=np.float32).reshape(-1, WIDTH))
    write_graph(
        _model(ops.gather(table, ids, 0), "last_hidden_state", ids), folder / "text_encoder" / "openvino_model.xml"
    )
    latents = _input([-1, *SHAPE], np.float32, "latent_sample")
    rows = ops.reshape(ops.concat([latents] * 3, 1), np.array([-1, *PICTURE[1:]]), False)
    write_graph(_model(rows, "sample", latents), folder / "vae_decoder" / "openvino_model.xml")
    write_json(folder / "text_encoder" / "config.json", {"_class_name": "CLIPTextModel"})
    blocks = {"block_out_channels": [8, 8], "scaling_factor": 0.5, "shift_factor": None}
    write_json(folder / "vae_decoder" / "config.json", {"_class_name": "AutoencoderKL", **blocks})
    vocabulary = {
        "type": "WordLevel",
        "vocab": {word: number for number, word in enumerate(WORDS)},
        "unk_token": "<unk>",
    }
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        **nothing,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": vocabulary,
    }
    write_json(folder / "tokenizer" / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer" / "tokenizer_config.json", {"pad_token": "<pad>", "model_max_length": TOKENS})
    part = {"format": "float"}
    return {"vae_decoder": {"class": "AutoencoderKL", **part}, "text_encoder": {"class": "CLIPTextModel", **part}}


def _input(shape: list[int], dtype: Any, name: str) -> ov.Node:
    made = ops.parameter(shape, dtype, name=name)
    made.output(0).get_tensor().set_names({name})
    return made


def _model(result: ov.Node, name: str, *inputs: ov.Node) -> ov.Model:
    result.output(0).get_tensor().set_names({name})
    return ov.Model([ops.result(result)], list(inputs))


def resealed(folder: Path, *names: str) -> None:
    """Update the size and digest of changed files in the manifest, as if they had been exported so."""
    from pqcad_qat.serving.deployed_folder import MANIFEST

    manifest = json.loads((folder / MANIFEST).read_text())
    for name in names:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
