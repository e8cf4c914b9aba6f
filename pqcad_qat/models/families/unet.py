"""UNet2DModel, the denoiser of DDPM, without a condition or with class labels; and the parts that both UNets share.

Not here: the UNet with text as a condition (stable_diffusion.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pqcad_qat.machine.json_files import shown
from pqcad_qat.models.families.config_faults import ACTIVATIONS, allowed, among, size_fault
from pqcad_qat.models.families.family import ConditionInput, Config, Family, Pipeline
from pqcad_qat.sampling.schedulers import DDIM_SCHEDULER, FLOW_SCHEDULER

UNCONDITIONAL: Mapping[str, str] = {DDIM_SCHEDULER: "DDIMPipeline", FLOW_SCHEDULER: "DDPMPipeline"}
"""diffusers' pipeline for a deployed denoiser without conditions, by the class of its scheduler."""

DOWN_BLOCKS = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SkipDownBlock2D",
    "AttnSkipDownBlock2D",
    "KDownBlock2D",
)
UP_BLOCKS = tuple(name.replace("Downsample", "Upsample").replace("Down", "Up") for name in DOWN_BLOCKS)
"""Block types of the UNet without text. A block on the way up has the name of its counterpart with Up for Down."""


def class_labels(config: Config) -> tuple[ConditionInput, ...]:
    """Return the class-label input of a UNet, as a number or as an embedding; () where it takes none."""
    match config.get("class_embed_type"):
        case None:
            classes = config.get("num_class_embeds")
            return () if classes is None else (ConditionInput("class_labels", (), "int64", classes),)
        case "timestep":
            return (ConditionInput("class_labels", (), "int64", config.get("num_train_timesteps") or 1000),)
        case "identity":
            return (ConditionInput("class_labels", (_time_width(config),), "float32"),)
        case _:
            return (ConditionInput("class_labels", (config["projection_class_embeddings_input_dim"],), "float32"),)


def _time_width(config: Config) -> int:
    return int(config.get("time_embedding_dim") or 4 * config["block_out_channels"][0])


def level_faults(config: Config, downs: Sequence[str], ups: Sequence[str], mids: Sequence[str | None]) -> Iterator[str]:
    """Yield the faults in the resolution levels of a UNet."""
    channels = config["block_out_channels"]
    if not channels:
        yield allowed("block_out_channels", channels, "the channels of one level or more")
        return
    yield from among(config, "mid_block_type", mids)
    yield from among(config, "act_fn", ACTIVATIONS)
    yield from among(config, "resnet_time_scale_shift", ("default", "scale_shift", "ada_group", "spatial"))
    for key, known in (("down_block_types", downs), ("up_block_types", ups)):
        if len(config[key]) != len(channels):
            yield allowed(key, config[key], f"{len(channels)} blocks, as many as block_out_channels")
        if unknown := [kind for kind in config[key] if kind.removeprefix("UNetRes") not in known]:
            yield allowed(key, unknown[0], ", ".join(known))
    groups = config["norm_num_groups"]
    for index, count in enumerate(channels):
        kind = config["down_block_types"][index] if index < len(config["down_block_types"]) else ""
        if (
            groups is not None
            and count % groups
            and (index == 0 or not kind.endswith(("SkipDownBlock2D", "KDownBlock2D")))
        ):
            yield allowed("norm_num_groups", groups, f"divisors of {count}, of block_out_channels {shown(channels)}")
            break


def _faults(config: Config) -> Iterator[str]:
    levels = len(config["block_out_channels"])
    yield from among(config, "class_embed_type", (None, "timestep", "identity"))
    yield from level_faults(config, DOWN_BLOCKS, UP_BLOCKS, ("UNetMidBlock2D", None))
    yield from among(config, "downsample_type", ("conv", "resnet", None))
    yield from among(config, "upsample_type", ("conv", "resnet", None))
    if config["time_embedding_type"] == "fourier":
        yield allowed(
            "time_embedding_type",
            "fourier",
            "positional, learned: a time of noise levels (score-based models) is no time step",
        )
    yield from among(config, "time_embedding_type", ("positional", "learned"))
    if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
        yield allowed("num_train_timesteps", None, "a number, as the scheduler's: time_embedding_type is learned")
    if (width := config["attention_head_dim"]) is not None:
        kinds = (*config["down_block_types"], *reversed(config["up_block_types"]))
        channels = [c for kind, c in zip(kinds, (*config["block_out_channels"],) * 2, strict=False) if "Attn" in kind]
        channels += [config["block_out_channels"][-1]] if config["add_attention"] and config["mid_block_type"] else []
        if width > min(channels, default=width):
            yield allowed("attention_head_dim", width, f"at most {min(channels)}, the fewest channels under attention")
    yield from size_fault(config, 2 ** (levels - 1), f"which its {levels} levels halve {levels - 1} times")


FAMILY = Family(
    name="UNet2DModel",
    part="unet",
    parameters=("sample", "timestep", "class_labels", "return_dict"),
    conditions=class_labels,
    faults=_faults,
    pipelines=(Pipeline("LDMPipeline"),),
    alone="DDIMPipeline",
    resizable=True,
)
