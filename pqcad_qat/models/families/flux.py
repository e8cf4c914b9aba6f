"""FluxTransformer2DModel, the denoiser of Flux: latents as rows of 2x2 patches, constant positions, and sigma as its
time.

Not here: the layout of the rows (latent_rows.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pqcad_qat.models.families.config_faults import allowed, sides_of
from pqcad_qat.models.families.family import TEXT, Config, Family, Pipeline
from pqcad_qat.models.families.latent_rows import PATCH, THOUSANDTHS, packed, places, rows_shape, text_places, unpacked
from pqcad_qat.models.families.prompt_layouts import LAST, Arrays, Encoders, PromptLayout, Wanted
from pqcad_qat.models.families.stable_diffusion_3 import POOLED, joint_attention
from pqcad_qat.sampling.flow import settled
from pqcad_qat.sampling.schedulers import FLOW_SCHEDULER

DEFAULT_SIZE = 128
"""Default height and width of the latents, for images of 1024 pixels, the default of Flux's pipeline."""


def _faults(config: Config) -> Iterator[str]:
    if config["patch_size"] != 1:
        yield allowed("patch_size", config["patch_size"], "1: the pipeline packs its patches")
    if config["in_channels"] % 4:
        yield allowed("in_channels", config["in_channels"], "multiples of 4, the pixels of a patch")
    axes, width = config["axes_dims_rope"], config["attention_head_dim"]
    if len(axes) != 3 or sum(axes) != width or any(axis % 2 for axis in axes):
        yield allowed("axes_dims_rope", axes, f"three even numbers, together attention_head_dim ({width})")
    if any(side % 2 for side in sides_of(config) or ()):
        yield allowed("sample_size", config["sample_size"], "even numbers")


def _scheduler(config: Config, size: tuple[int, int], where: str) -> dict[str, Any]:
    """Return the scheduler config with the shift that the pipeline sets for images of this size."""
    tokens, _ = rows_shape(1, *size)
    return settled(config, tokens, where) if config.get("_class_name") == FLOW_SCHEDULER else dict(config)


def _called(denoiser: Any, x_t: Any, t: Any, condition: dict[str, Any]) -> tuple[Any]:
    """Return the velocity (B, C, H, W) at x_t (B, C, H, W) and t (B,), all torch tensors."""
    height, width = (int(side) for side in x_t.shape[-2:])
    tokens = int(condition[TEXT].shape[1])
    times = [t / THOUSANDTHS, *(condition[name] for name in ("guidance",) if name in condition)]
    with _in_float32(denoiser, [time.float() * THOUSANDTHS for time in times]):
        (velocity,) = denoiser(
            packed(x_t),
            timestep=times[0],
            img_ids=x_t.float().new_tensor(places(height, width)),
            txt_ids=x_t.float().new_tensor(text_places(tokens)),
            **condition,
            return_dict=False,
        )
    return (unpacked(velocity, height, width),)


@contextmanager
def _in_float32(denoiser: Any, times: Sequence[Any]) -> Iterator[None]:
    """Compute the time embedding from these float32 times within this context.

    In mixed precision the class rounds its own times to bfloat16, which turns 899.6 into 900.
    """
    module = getattr(denoiser, "module", denoiser)  # a data-parallel wrapper holds the denoiser under this name
    handle = module.time_text_embed.register_forward_pre_hook(lambda _, read: (*times, *read[len(times) :]))
    try:
        yield
    finally:
        handle.remove()


def _prompt(encoders: Encoders, prompt: str, wanted: Wanted) -> Arrays:
    pooled = encoders["text_encoder"](prompt, ["pooler_output"])["pooler_output"]
    guidance = {"guidance": np.array([wanted.guidance], np.float32)} if "guidance" in wanted.shapes else {}
    return {TEXT: encoders["text_encoder_2"](prompt, [LAST])[LAST], POOLED: pooled} | guidance


FAMILY = Family(
    name="FluxTransformer2DModel",
    part="transformer",
    parameters=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "return_dict",
        "controlnet_blocks_repeat",
    ),
    conditions=joint_attention,
    faults=_faults,
    pipelines=(
        Pipeline(
            "FluxPipeline",
            PromptLayout(
                gives=("encoder_hidden_states", "pooled_projections", ""),
                encoders=("text_encoder", "text_encoder_2"),
                conditions=_prompt,
                guidance=3.5,
            ),
            scaling=("shift_factor",),
            genai=True,
        ),
    ),
    call=_called,
    takes_rows=True,
    default_size=DEFAULT_SIZE,
    resizable=True,
    multiple=lambda _: PATCH,
    scheduler=_scheduler,
    rotations=("FluxPosEmbed",),
    runtime=("pqcad_qat.serving.transformer", "OVTransformer2DModel"),
)
