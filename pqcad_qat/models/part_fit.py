"""How the parts of a pipeline fit its denoiser: the channels of latents, the size of pictures, the width of a text.

Not here: the parts themselves and their own configs (pipeline_parts.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.models.config_values import check_values, with_defaults
from pqcad_qat.models.families.family import TEXT_ENCODERS, ConditionInput, factor_of
from pqcad_qat.models.model_folder import CONFIG, part_class
from pqcad_qat.models.pipeline_parts import PipelineParts, left_out
from pqcad_qat.models.vae import latent_channels


def check_decoder(pipeline: PipelineParts | None, channels: int) -> None:
    """Raise ModelError for a decoder whose latents have another number of channels than the denoiser's."""
    if pipeline is None or (part := pipeline.decoder) is None:
        return
    where = pipeline.folder / part / CONFIG
    got = latent_channels(with_defaults(pipeline.class_of(part), read_json(where)))
    if got != channels:
        raise ModelError(
            f"{where}: latent_channels: got {shown(got)}; allowed {channels}, as its denoiser has, or {left_out(part)}"
        )


def picture_shape(pipeline: PipelineParts | None, sample_shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Shape (3, H, W) of the pictures that a pipeline decodes latents (C, h, w) to; None where it has no decoder.

    Raises:
        ModelError: the decoder or a value of its config is not supported.
    """
    if pipeline is None or (part := pipeline.decoder) is None:
        return None
    where, name = pipeline.folder / part / CONFIG, pipeline.class_of(part)
    config = read_json(where)
    check_values(name, config, str(where))
    config = with_defaults(name, config)
    factor = factor_of(config["block_out_channels"])
    return 3, factor * sample_shape[1], factor * sample_shape[2]


def check_text_width(pipeline: PipelineParts | None, inputs: Sequence[ConditionInput]) -> None:
    """Raise ModelError where SDXL's second text encoder makes a vector of another width than the denoiser reads."""
    widths = [condition.shape[0] for condition in inputs if condition.name == "text_embeds"]
    if pipeline is None or not widths or part_class(pipeline.index, TEXT_ENCODERS[1]) is None:
        return
    where = pipeline.folder / TEXT_ENCODERS[1] / CONFIG
    if where.is_file() and (got := read_json(where).get("projection_dim", 512)) != widths[0]:
        raise ModelError(
            f"{where}: projection_dim: got {shown(got)}; allowed {widths[0]}, which the denoiser's "
            "projection_class_embeddings_input_dim leaves beside six sizes (SDXL's refiner, which reads five, is not "
            "supported)"
        )
