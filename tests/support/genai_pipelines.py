"""A check of deployed text-to-image folders in OpenVINO GenAI: it makes the pictures of this package's runtime, and the
graph that it opens executes in INT8.

`tox -e check,genai` runs it where openvino-genai alone is installed, on folders that `served_for_genai` made.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from int8_nodes import int8_layers

F32 = {"INFERENCE_PRECISION_HINT": "f32"}

OFF = {"float": 1.0, "int8": 6.0}
"""Largest mean difference of two pictures, in levels of 255, by form. GenAI cuts the fractions of levels off, which are
rounded here: half a level. In INT8 values beside a rounding boundary fall to either side of it.
"""

PIPELINES = {
    "text": genai.Text2ImagePipeline,
    "batch": genai.Text2ImagePipeline,
    "image": genai.Image2ImagePipeline,
    "inpainting": genai.InpaintingPipeline,
}


class Noise(genai.Generator):
    """Hands out the given noise (N, C, h, w); before it, where a picture is encoded, zeros: the mean of its latents."""

    def __init__(self, noise: np.ndarray, zeros_first: bool) -> None:
        super().__init__()
        self._waiting = [np.zeros_like(noise[:1])] * zeros_first + [noise]

    def randn_tensor(self, shape: Any) -> ov.Tensor:
        given = self._waiting.pop(0)
        assert list(shape) == list(given.shape), (list(shape), given.shape)
        return ov.Tensor(np.ascontiguousarray(given))


def picture(pipeline: Any, case: str, asked: dict[str, Any], given: Any) -> np.ndarray:
    """Pictures (N, 3, H, W) of a request, in whole numbers from 0 to 255."""
    begins = "strength" in asked
    height, width = asked["size"]
    options = {
        "num_inference_steps": asked["steps"],
        "num_images_per_prompt": asked["count"],
        "generator": Noise(given["noise"], begins),
        "height": height,
        "width": width,
    }
    if asked["negative"] is not None:
        options |= {"negative_prompt": asked["negative"], "guidance_scale": asked["guidance"]}
    else:  # Flux: what its transformer reads
        options["guidance_scale"] = 3.5
    if "tokens" in asked:
        options["max_sequence_length"] = asked["tokens"]
    if begins:
        options["strength"] = asked["strength"]
        first = [ov.Tensor(np.ascontiguousarray(given["image"][None]))]
        if case == "inpainting":
            first.append(ov.Tensor(np.ascontiguousarray(np.repeat(given["mask"][None, ..., None], 3, -1))))
        found = pipeline.generate(asked["prompt"], *first, **options)
    else:
        found = pipeline.generate(asked["prompt"], **options)
    return np.asarray(found.data).transpose(0, 3, 1, 2).astype(float)


def executed_layers(folder: Path, count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Number of planned layers that execute in INT8 after the reshape that GenAI makes, and of all planned layers."""
    manifest = json.loads((folder / "manifest.json").read_text())
    graph = ov.Core().read_model(folder / manifest["graph"])
    shapes = {}
    for port in graph.inputs:
        name, shape = port.get_any_name(), port.get_partial_shape()
        if name == "timestep":
            shape[0] = 1
        elif name not in ("img_ids", "txt_ids"):
            shape[0] = count
        if name in ("sample", "hidden_states") and len(shape) == 4:
            shape[2], shape[3] = size
        shapes[name] = shape
    graph.reshape(shapes)
    compiled = ov.Core().compile_model(graph, "CPU", F32)
    return len(int8_layers(compiled, manifest["layers"])), len(manifest["layers"])


def check(folder: Path) -> None:
    """Raise AssertionError if a picture differs, or a planned layer leaves INT8."""
    form, kind, differences = folder.name, folder.parent.name, {}
    for case, of_case in PIPELINES.items():
        asked, given = json.loads((folder / f"{case}.json").read_text()), np.load(folder / f"{case}.npz")
        pipeline = of_case(folder / "openvino", "CPU", **F32)
        found = picture(pipeline, case, asked, given)
        assert found.shape == given["wanted"].shape, (kind, form, case, found.shape)
        assert given["wanted"].std() > 10
        differences[case] = float(np.abs(found - given["wanted"]).mean())
    told = ", ".join(f"{case} {off:.2f}" for case, off in differences.items())
    print(f"{kind}, {form}: mean difference in levels of 255: {told}", flush=True)
    assert max(differences.values()) <= OFF[form], f"{kind}, {form}: more than {OFF[form]}"
    executed, planned = executed_layers(folder / "openvino", 2, (12, 16))
    assert executed == planned, f"{kind}: {executed} of {planned} planned layers in INT8"
    assert planned > 20 or form == "float"


def check_adapter(kind: Path) -> None:
    """Raise AssertionError if an adapter in an INT8 folder does not bring its picture near that of the fused model."""
    asked, given = json.loads((kind / "adapted/text.json").read_text()), np.load(kind / "adapted/text.npz")
    adapters = genai.AdapterConfig(genai.Adapter(kind / "adapter.safetensors"), 1.0)
    pipeline = genai.Text2ImagePipeline(kind / "adapted/openvino", "CPU", adapters=adapters, **F32)
    found, fused = picture(pipeline, "text", asked, given), np.load(kind / "fused/text.npz")["wanted"].astype(float)
    without, adapted = (float(np.abs(one - fused).mean()) for one in (given["wanted"], found))
    print(f"{kind.name}: from the fused model's picture {adapted:.2f} levels, without the adapter {without:.2f}")
    assert adapted < 0.6 * without, kind.name


def main(served: Path) -> None:
    assert importlib.util.find_spec("pqcad_qat") is None
    assert importlib.util.find_spec("torch") is None
    for kind in sorted(served.iterdir()):
        for form in OFF:
            check(kind / form)
        check_adapter(kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
