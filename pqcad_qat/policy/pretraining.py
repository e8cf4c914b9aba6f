"""Definition of pretraining policies, which train a full-precision denoiser from real images.

Not here: quantization policies (policy/schema.py), or the training itself (training/pretraining.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from pqcad_qat.policy.origins import Location
from pqcad_qat.policy.sections import Fault, PolicyFile, Section, known_keys
from pqcad_qat.policy.value_types import Count, Momentum, Name, Precision, Seed, Share, Text


class PretrainData(Section):
    """The real images."""

    source: Literal["fashion-mnist", "digits", "noto-emoji", "folder"] = Field(
        "fashion-mnist", description="data set, or a folder of images"
    )
    path: Text | None = Field(
        None, description="folder of the images, or font of the emoji; null means where Debian's packages put them"
    )
    size: int = Field(32, ge=8, description="height and width in pixels that images are padded or scaled to")

    def faults(self) -> Iterator[Fault]:
        if self.source == "folder" and self.path is None:
            yield Fault((("path",), ("source",)), "nothing", "a folder of images, as source is folder")


class PretrainScheduler(Section):
    """The noise schedule, by the keys of diffusers' schedulers."""

    train_timesteps: int = Field(1000, ge=2, description="time steps T of the forward process")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        "squaredcos_cap_v2", description="noise schedule"
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = Field(
        "v_prediction", description="what the model predicts"
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] = Field(
        "trailing", description="which time steps a sampler visits"
    )


class PretrainTraining(Section):
    """The optimizer, its precision, and how often it is saved and shown."""

    steps: Count = Field(6000, description="training steps")
    batch_size: Count = Field(64, description="images that each process adds to a training step")
    learning_rate: float = Field(
        8e-4, gt=0, le=1, description="peak rate of AdamW; a cosine takes it to zero at the last step"
    )
    warmup: int = Field(200, ge=0, description="steps of linear rise to the peak")
    class_dropout: Share = Field(
        0.1,
        description="share of labels replaced by the label of no class, where num_class_embeds leaves one for it",
    )
    precision: Precision = Field("bf16", description="arithmetic of the forward and backward pass")
    ema: Momentum = Field(
        0.999, description="decay of the weights' exponential moving average, per step; 0 switches it off"
    )
    seed: Seed = Field(0, description="seed of everything random in training")
    checkpoint_every: Count = Field(500, description="steps between checkpoints")
    keep_checkpoints: Count = Field(2, description="number of newest checkpoints that are kept")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm above which gradients are scaled down")
    sample_every: Count = Field(1000, description="steps between sample grids")

    def faults(self) -> Iterator[Fault]:
        if self.warmup >= self.steps:
            yield Fault((("warmup",), ("steps",)), str(self.warmup), f"fewer than steps ({self.steps})")


DENOISER_CLASS = "UNet2DModel"
"""The one class of diffusers that is pretrained. Its name stands here because models/families/, where classes are named
elsewhere, lies above this room, and a wrong key is reported with all other faults of the file, before a model is made.
"""

# fmt: off
UNET_KEYS = (  # diffusers' class and the arguments of its constructor
    "class", "sample_size", "in_channels", "out_channels", "center_input_sample", "time_embedding_type",
    "time_embedding_dim",
    "freq_shift", "flip_sin_to_cos", "down_block_types", "mid_block_type", "up_block_types", "block_out_channels",
    "layers_per_block", "mid_block_scale_factor", "downsample_padding", "downsample_type", "upsample_type", "dropout",
    "act_fn",
    "attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "norm_eps", "resnet_time_scale_shift",
    "add_attention",
    "class_embed_type", "num_class_embeds", "num_train_timesteps",
)
# fmt: on


class PretrainPolicy(PolicyFile):
    """How a full-precision denoiser is trained from real images."""

    kind: Literal["pretrain"] = Field(description="tells this kind of policy from a quantization policy")
    name: Name = Field(description="name of the run and of its folder")
    data: PretrainData = PretrainData()
    model: dict[str, Any] = Field(description=f"class: {DENOISER_CLASS}, and the arguments of its constructor")
    scheduler: PretrainScheduler = PretrainScheduler()
    training: PretrainTraining = PretrainTraining()

    def faults(self) -> Iterator[Fault]:
        for key in (key for key in self.model if key not in UNET_KEYS):
            yield Fault((("model", key),), "an unknown key", known_keys(UNET_KEYS, key))
        if self.model.get("class") != DENOISER_CLASS:
            yield Fault((("model", "class"),), repr(self.model.get("class", "nothing")), DENOISER_CLASS)
        if self.model.get("sample_size") != self.data.size:
            keys: tuple[Location, ...] = (("model", "sample_size"), ("data", "size"))
            yield Fault(keys, str(self.model.get("sample_size", "nothing")), f"{self.data.size}, as data.size")
