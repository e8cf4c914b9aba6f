"""Contents of a deployed folder's configs, and of the manifest's entries on layers and CPUs.

Not here: the files themselves (serving/deployed_folder.py), the rules that a manifest keeps (serving/manifest.py), and
the graph (export_model.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import nn

from pqcad_qat.export.part_export import PartsToDeploy, pipeline_index
from pqcad_qat.export.traceable_modules import needs_vnni
from pqcad_qat.models.families.family import PIPELINE_ROOT
from pqcad_qat.models.families.table import family_of
from pqcad_qat.models.families.unet import UNCONDITIONAL

if TYPE_CHECKING:
    from pqcad_qat.quantization.integer_layer import IntegerLayer


def exported_config(model: nn.Module) -> dict[str, Any]:
    """The denoiser's diffusers config, as the deployed folder states it.

    Private keys are left out. Where the model also predicts a variance, which the graph does not return, `out_channels`
    is halved.
    """
    config = dict(getattr(model, "config", {}))
    if config.get("out_channels") == 2 * config.get("in_channels", 0):
        config["out_channels"] = config["in_channels"]
    return {"_class_name": type(model).__name__} | {
        key: value for key, value in config.items() if not key.startswith("_")
    }


def model_index(
    model: nn.Module, scheduler_config: Mapping[str, Any], conditional: bool, pipeline_parts: PartsToDeploy | None
) -> dict[str, Any]:
    """diffusers' model_index.json of the deployed folder.

    With pipeline parts it names the source's pipeline; an unconditional denoiser alone gets an unconditional pipeline.
    diffusers has no pipeline for a conditional denoiser alone, so that index names the base class of all pipelines.

    The denoiser's class is our runtime's, which diffusers then finds by itself. Where OpenVINO GenAI opens the folder
    it is diffusers' own, since GenAI knows no other.
    """
    scheduler = scheduler_config["_class_name"]
    known = {"_diffusers_version": version("diffusers"), "scheduler": ["diffusers", scheduler]}
    family = family_of(model)
    if pipeline_parts is not None:
        named = ("diffusers", family.name) if pipeline_parts.for_genai else family.runtime
        return pipeline_index(pipeline_parts, named) | known
    pipeline = PIPELINE_ROOT if conditional else UNCONDITIONAL[scheduler]
    return {"_class_name": pipeline, **known, family.part: list(family.runtime)}


def openvino_config() -> dict[str, Any]:
    """The config that optimum-intel writes beside a quantized model; `manifest.json` says more."""
    return {"dtype": "int8", "input_info": None, "quantization_config": None, "save_onnx_model": False}


def layer_entry(layer: IntegerLayer) -> dict[str, Any]:
    """The manifest's entry of one layer."""
    return {
        "kind": layer.kind,
        "weight_bits": layer.weight_bits,
        "stored_bits": 8,
        "input_bits": layer.input_bits,
        "input_group": layer.input_group,
        "needs_vnni": needs_vnni(layer),
    }


def cpu_entry(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest's note on the CPUs where the integer sums are exact."""
    needing = [name for name, entry in entries.items() if entry["needs_vnni"]]
    note = (
        "without VNNI the integer sums of these layers may overflow"
        if needing
        else "the integer sums are exact with AVX2 and better"
    )
    return {"exact_from": "vnni" if needing else "avx2", "layers_that_need_vnni": needing, "note": note}
