"""Writing of a pipeline's other parts (VAE, text encoders, tokenizers) in the layout of optimum-intel.

Not here: loading the source (models/pipeline_parts.py), the graphs (part_graphs.py), the denoiser (export_model.py),
and running the parts (part_runtime.py, vae_runtime.py).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import openvino as ov
import torch
from torch import Tensor, nn

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.export.genai_tokenizers import write_genai_tokenizer
from pqcad_qat.export.part_graphs import clip_graph, decoder_graph, encoder_graph, t5_graph
from pqcad_qat.machine.files import write_json
from pqcad_qat.machine.json_files import read_json
from pqcad_qat.models.config_values import with_defaults
from pqcad_qat.models.families.family import TEXT, TEXT_ENCODERS, TEXT_MASK, ConditionInput, factor_of
from pqcad_qat.models.families.table import pipelines, prompt_layouts
from pqcad_qat.models.model_folder import DECODERS
from pqcad_qat.models.pipeline_parts import T5, TOKENIZER, VAE, VQ, PipelineParts
from pqcad_qat.models.vae import to_decoder
from pqcad_qat.serving.deployed_folder import tokenizer_of
from pqcad_qat.serving.manifest import GRAPH, PART_FOLDERS, VAE_ENCODER

PartFormat = Literal["float", "int8-weights", "int8"]
"""Format of a part: constants in float16, weights compressed to INT8, or weights and activations quantized to INT8."""

AUTOMATIC: Mapping[str, PartFormat] = {
    **dict.fromkeys(DECODERS, "float"),
    **dict.fromkeys(TEXT_ENCODERS, "int8-weights"),
}
"""Format that `auto` stands for, by part."""


@dataclass(frozen=True)
class PartsToDeploy:
    """The pipeline parts that are deployed beside the denoiser.

    Attributes:
        source: the full-precision pipeline.
        formats: format of each part that is deployed.
        latents: latents (N, C, h, w) as the denoiser returns them. An INT8 VAE is calibrated on them, and its size is
            taken from them.
        conditions: text inputs of the denoiser, every size known. T5 is deployed for the number of tokens that they ask
            for.
    """

    source: PipelineParts
    formats: Mapping[str, PartFormat]
    latents: Tensor
    conditions: Sequence[ConditionInput] = ()

    @property
    def for_genai(self) -> bool:
        """Whether OpenVINO GenAI has the pipeline, and all that it opens is deployed."""
        return opened_by_genai(self.source, self.formats)

    @property
    def pixels(self) -> int:
        """Ratio of a picture's side to the side of its latents."""
        config = with_defaults(self.source.class_of(VAE), read_json(self.source.folder / VAE / "config.json"))
        return factor_of(config["block_out_channels"])

    @property
    def masked(self) -> bool:
        """Whether text comes with a mask of its tokens, as PixArt's does."""
        return any(condition.name == TEXT_MASK for condition in self.conditions)

    def tokens(self, part: str) -> int:
        """Number of tokens that a text encoder reads.

        Raises:
            ExportError: the part is a T5 and the denoiser's text has no room for its tokens.
        """
        if self.source.class_of(part) != T5:
            return int(self._config(part)["max_position_embeddings"])
        layout = prompt_layouts().get(str(self.source.index.get("_class_name")))
        before = None if layout is None else layout.before_t5
        beside = 0 if before is None else int(self._config(before)["max_position_embeddings"])
        tokens = next((condition.shape[0] for condition in self.conditions if condition.name == TEXT), None)
        if tokens is None or tokens <= beside:
            raise ExportError(
                f"{part}: got {tokens or 'no'} tokens in the denoiser's text, {beside} of them CLIP's; "
                "allowed more than those, since T5 takes the rest"
            )
        return tokens - beside

    def _config(self, part: str) -> dict[str, Any]:
        return read_json(self.source.folder / part / "config.json")


def chosen_formats(
    source: PipelineParts | None, choices: Mapping[str, str], model_name: str, weights: bool = True
) -> dict[str, PartFormat]:
    """Format of each deployed part, by a policy's section `pipeline`; {} where nothing is deployed.

    Args:
        source: the pipeline parts of the model's folder; None where there are none.
        choices: `vae` and `text_encoder`, each auto, none or a format. The choice for text_encoder holds for all text
            encoders.
        model_name: name of the model in messages.
        weights: whether the weights are checked too, besides the configs.

    Raises:
        ModelError: a part that is asked for is missing or unsupported.
    """
    formats: dict[str, PartFormat] = {}
    for key, of_key in ((VAE, DECODERS), (TEXT_ENCODERS[0], TEXT_ENCODERS)):
        present = [part for part in of_key if source is not None and source.has(part)]
        if not present and choices[key] not in ("auto", "none"):
            raise ModelError(f"pipeline.{key}: got {choices[key]}; allowed auto or none: {model_name} has no {key}")
        if choices[key] != "none":
            if source is not None:
                source.check_there(of_key)
            formats |= {
                part: AUTOMATIC[part] if choices[key] == "auto" else cast(PartFormat, choices[key]) for part in present
            }
    if formats.get(VQ) == "int8":
        raise ModelError(
            f"pipeline.{VAE}: got int8; allowed auto, none, float, int8-weights: {model_name} decodes the codes that "
            "are nearest to its latents, and rounded distances choose others"
        )
    for part in formats:
        assert source is not None
        source.check(part)
        if weights:
            source.check_weights(part)
    return formats


def opened_by_genai(source: PipelineParts, deployed: Collection[str]) -> bool:
    """Return whether OpenVINO GenAI has the pipeline, and all that it opens is among the deployed parts."""
    pipeline = pipelines().get(str(source.index.get("_class_name")))
    return pipeline is not None and pipeline.genai and {VAE, *source.text_encoders} <= set(deployed)


def write_parts(deployable: PartsToDeploy, folder: Path) -> dict[str, dict[str, str]]:
    """Write every part below a deployed folder.

    Returns:
        The manifest's `parts`: class and format by folder.

    Raises:
        ModelError: a part cannot be loaded.
        ExportError: a part cannot be converted.
    """
    source, latents, written = deployable.source, deployable.latents, {}
    for part, form in deployable.formats.items():
        module = source.load(part)
        place = folder / deployed_name(part)
        with _named(part):
            decodes = part in DECODERS
            graph = decoder_graph(module, latents) if decodes else _text_encoder(deployable, part, module)
            graph = _compressed(graph, form, _scaled(module, latents) if decodes else ())
            place.mkdir(parents=True)
            ov.save_model(graph, place / GRAPH, compress_to_fp16=True)
        write_json(place / "config.json", _config(module, source.folder / part))
        entry = {"class": source.class_of(part), "format": form}
        written[deployed_name(part)] = entry
        if not decodes:
            name = tokenizer_of(part)
            _write_tokenizer(source, name, folder / name)
            if deployable.for_genai:
                write_genai_tokenizer(folder / name, deployable.tokens(part))
        elif deployable.for_genai:
            written[VAE_ENCODER] = {**entry, "format": encoder_format(form)}
            _write_vae_encoder(module, form, folder / VAE_ENCODER)
    return written


def encoder_format(form: PartFormat) -> PartFormat:
    """Return the format of a VAE's encoder, for that of its decoder.

    An INT8 VAE has a float encoder: there are no pictures to calibrate it with.
    """
    return "int8-weights" if form == "int8-weights" else "float"


def _write_vae_encoder(vae: nn.Module, form: PartFormat, folder: Path) -> None:
    """Write the VAE's encoder, which turns pictures into latents that are changed."""
    with _named(VAE_ENCODER):
        graph = _compressed(encoder_graph(vae), encoder_format(form), ())
        folder.mkdir()
        ov.save_model(graph, folder / GRAPH, compress_to_fp16=True)
    write_json(folder / "config.json", _config(vae, folder))


def deployed_name(part: str) -> str:
    """Name of a part's folder in a deployed folder, which is the same for every decoder."""
    return PART_FOLDERS[VAE if part in DECODERS else part]


def pipeline_index(deployable: PartsToDeploy, denoiser: Sequence[str]) -> dict[str, Any]:
    """The source's model_index.json, adapted to the deployed folder.

    Parts that are not deployed become null, and `denoiser` replaces the class of the denoiser.
    """
    tokenizers = (tokenizer_of(part) for part in deployable.formats if part not in DECODERS)
    deployed = {*deployable.formats, *tokenizers, "scheduler"}
    index: dict[str, Any] = {}
    for name, entry in deployable.source.index.items():
        if name in ("unet", "transformer"):
            index[name] = list(denoiser)
        elif isinstance(entry, list):
            index[name] = entry if name in deployed else [None, None]
        elif name != "_name_or_path":
            index[name] = entry
    return index | ({"requires_safety_checker": False} if "safety_checker" in index else {})


def _text_encoder(deployable: PartsToDeploy, part: str, encoder: nn.Module) -> ov.Model:
    tokens = deployable.tokens(part)
    if deployable.source.class_of(part) == T5:
        return t5_graph(encoder, tokens, deployable.masked)
    return clip_graph(encoder, read_json(deployable.source.folder / part / "config.json"), tokens)


def _compressed(graph: ov.Model, form: PartFormat, calibration: Sequence[Tensor]) -> ov.Model:
    """The graph in its deployed format, made by NNCF; `calibration` is used for int8 only."""
    import nncf  # importing takes seconds

    nncf.set_log_level(logging.WARNING)
    if form == "int8-weights":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    if form == "int8":
        dataset = nncf.Dataset([latents.numpy() for latents in calibration])
        return nncf.quantize(graph, dataset, subset_size=len(calibration))
    return graph


def _scaled(vae: nn.Module, latents: Tensor) -> tuple[Tensor, ...]:
    """The latents as the VAE takes them, one at a time."""
    return torch.split(to_decoder(cast(Any, vae).config, latents), 1)


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Turn errors of the conversion into an ExportError that names the part."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"{part}: its conversion to OpenVINO: got {error}; allowed a part that OpenVINO can convert"
        ) from error


def _config(module: nn.Module, source: Path) -> dict[str, Any]:
    """The part's config. For a class of diffusers it includes every default."""
    config = dict(cast(Any, module).config) if hasattr(module, "decode") else read_json(source / "config.json")
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _write_tokenizer(source: PipelineParts, name: str, folder: Path) -> None:
    """Copy the tokenizer's files, and write tokenizer.json where it is missing.

    Libraries other than transformers read tokenizer.json.
    """
    shutil.copytree(source.folder / name, folder)
    if not (folder / TOKENIZER).is_file():
        import transformers

        kind = transformers.T5Tokenizer if str(source.index[name][-1]).startswith("T5") else transformers.CLIPTokenizer
        tokenizer = kind.from_pretrained(source.folder / name, local_files_only=True)
        tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
