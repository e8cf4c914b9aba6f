"""OpenVINO graphs of a pipeline's VAE, CLIP and T5, for any batch, with the port names of optimum-intel.

Not here: which parts there are and how they are written (part_export.py), or how their graphs are run
(part_runtime.py, vae_runtime.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import openvino as ov
import torch
from torch import Tensor, nn

from pqcad_qat.models.families.family import factor_of

SIDE = 8
"""Height and width of the latents of the example with which a VAE's encoder is traced."""


class _Decoder(nn.Module):
    """The VAE's decoder: scaled latent_sample (B, C, h, w) -> sample (B, 3, H, W)."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.vae).decode(latent_sample, return_dict=False)[0])


class _Encoder(nn.Module):
    """The encoder of AutoencoderKL: sample (B, 3, H, W) -> mean and logarithm of the variance (B, 2 C, h, w)."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.vae).encode(sample, return_dict=False)[0].parameters)


class _ClipEncoder(nn.Module):
    """CLIP's text encoder: input_ids (B, tokens) int64 -> the outputs of its class, then each layer's hidden states.

    The hidden states are (B, tokens, width).
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.encoder(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        if hasattr(output, "text_embeds"):
            return (output.text_embeds, output.last_hidden_state, *output.hidden_states)
        return (output.last_hidden_state, output.pooler_output, *output.hidden_states)


class _T5Encoder(nn.Module):
    """T5's encoder: input_ids (B, tokens) int64 -> (B, tokens, width).

    Where texts have a mask, attention_mask has the shape and dtype of input_ids.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return cast(
            Tensor, self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).last_hidden_state
        )


def decoder_graph(vae: nn.Module, latents: Tensor) -> ov.Model:
    """The VAE decoder's graph: latent_sample (B, C, h, w), scaled as the VAE takes it -> sample (B, 3, H, W).

    AutoencoderKL's takes any h and w; VQModel's takes those of `latents`.
    """
    free = type(vae).__name__ == "AutoencoderKL"
    return _converted(_Decoder(vae), {"latent_sample": latents[:1].float()}, ["sample"], any_size=free)


def encoder_graph(vae: nn.Module) -> ov.Model:
    """The graph of AutoencoderKL's encoder: sample (B, 3, H, W) in [-1, 1] -> latent_parameters (B, 2 C, h, w).

    The latter are the mean and the logarithm of the variance of latents that are not scaled yet.
    """
    example = torch.zeros(1, 3, *(2 * [SIDE * factor_of(cast(Any, vae).config.block_out_channels)]))
    return _converted(_Encoder(vae), {"sample": example}, ["latent_parameters"], any_size=True)


def clip_graph(encoder: nn.Module, config: Mapping[str, Any], tokens: int) -> ov.Model:
    """CLIP's graph: input_ids (B, tokens) -> the outputs of its class, and hidden_states.0 to hidden_states.LAYERS.

    `config` is the config of transformers.
    """
    example = {"input_ids": torch.full((1, tokens), config["eos_token_id"], dtype=torch.int64)}
    pooled = encoder.__class__.__name__.endswith("WithProjection")
    first = ["text_embeds", "last_hidden_state"] if pooled else ["last_hidden_state", "pooler_output"]
    states = [f"hidden_states.{layer}" for layer in range(config["num_hidden_layers"] + 1)]
    return _converted(_ClipEncoder(encoder), example, [*first, *states])


def t5_graph(encoder: nn.Module, tokens: int, masked: bool) -> ov.Model:
    """T5's graph: input_ids (B, tokens), and attention_mask of the same shape if `masked` -> last_hidden_state.

    The output is (B, tokens, width).
    """
    example = {"input_ids": torch.ones(1, tokens, dtype=torch.int64)}
    mask = {"attention_mask": (torch.arange(tokens) < tokens // 2 + 1).long()[None]} if masked else {}
    return _converted(_T5Encoder(encoder), example | mask, ["last_hidden_state"])


@torch.no_grad()
def _converted(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], *, any_size: bool = False
) -> ov.Model:
    """Trace and convert a module to a graph that takes any batch, and name its ports.

    Args:
        module: what is converted.
        inputs: examples by name, in the order of the module's arguments.
        outputs: names of the outputs.
        any_size: whether the graph takes any height and width, too.
    """
    example = tuple(inputs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of fixed sizes, which are intended
        traced = torch.jit.trace(module, example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        shapes = [
            ov.PartialShape([-1, *([value.shape[1], -1, -1] if any_size else value.shape[1:])]) for value in example
        ]
        graph: ov.Model = ov.convert_model(traced, example_input=example, input=shapes)
    for port, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        port.get_tensor().set_names({name})
    return graph
