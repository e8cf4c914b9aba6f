"""Modules of a user's own, each with one feature that real networks have and the package's models lack;
test_module_preparation.py states the expected outcome.

Not here: any test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

WIDTH = 8
SHAPE = (3, 8, 8)


def conv(inputs: int = WIDTH, outputs: int = WIDTH, size: int = 3, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)


class Network(nn.Module):
    """Denoiser from x_t (B, 3, 8, 8) and t (B,) to noise (B, 3, 8, 8), through `middle`; its layers are time, enter,
    leave and mid.
    """

    def __init__(self, middle: nn.Module | None = None, **parts: nn.Module) -> None:
        super().__init__()
        self.time, self.enter, self.leave = nn.Linear(WIDTH, WIDTH), conv(3), conv(WIDTH, 3)
        self.mid = middle if middle is not None else conv()
        for name, part in parts.items():
            self.add_module(name, part)

    def embedding(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * torch.exp(torch.arange(WIDTH // 2) * -(math.log(10000) / (WIDTH // 2)))
        return torch.cat([angles.sin(), angles.cos()], 1)

    def middle(self, h: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.mid(h)
        return y

    def forward(self, x: Tensor, t: Tensor) -> Any:
        h = F.silu(self.enter(x) + self.time(self.embedding(t))[:, :, None, None])
        return self.leave(F.silu(self.middle(h, t)))


def network(middle: Callable[[Any, Tensor, Tensor], Tensor], *layer: nn.Module, **parts: nn.Module) -> Network:
    """Build a Network with another `middle`: (network, h (B, C, H, W), t (B,)) -> (B, C, H, W)."""
    made = type("Network", (Network,), {"middle": middle})
    return made(*layer, **parts)  # type: ignore[no-any-return]


def returning(output: Callable[[Tensor, Tensor], Any]) -> Network:
    """Build a Network that returns `output` of its prediction and x_t."""
    return type("Network", (Network,), {"forward": lambda self, x, t: output(Network.forward(self, x, t), x)})()


def rows(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2)


def image(tokens: Tensor, h: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(h.shape)


@dataclass
class Output:
    sample: Tensor


class Special(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, 1, 1) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


def tied() -> Network:
    made = network(lambda self, h, t: self.two(F.silu(self.mid(h))), two=conv())
    made.two.weight = made.mid.weight
    return made


def pruned() -> Network:
    made = Network()
    prune.l1_unstructured(made.mid, "weight", 0.5)
    return made


def hooked() -> Network:
    made = Network()
    made.mid.register_forward_hook(lambda module, arguments, output: output * 2)
    return made


def frozen() -> Network:
    return Network().requires_grad_(False)


def inference() -> Network:
    with torch.inference_mode():
        return Network()


def on_rows(self: Any, h: Tensor, t: Tensor) -> Tensor:
    """Middle with a transposition right before a layer's quantizer, that becomes part of the matrix product."""
    return image(self.mid(F.silu(self.mid(rows(h)))), h)


def attended_twice(self: Any, h: Tensor, t: Tensor) -> Tensor:
    tokens = rows(h)
    for _ in range(2):
        tokens = tokens + F.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens))
    y: Tensor = self.mid(image(tokens, h))
    return y


def odd_names() -> Network:
    names = ("a/b", "[red]", "Convolution_3", "x#2", 'a b>"<&')

    def middle(self: Any, h: Tensor, t: Tensor) -> Tensor:
        for part in self.parts.values():
            h = h + part(F.silu(h))
        y: Tensor = self.sample(self.mid(h))
        return y

    return network(middle, parts=nn.ModuleDict({name: conv() for name in names}), sample=conv())


DEPLOYED: Mapping[str, tuple[Callable[[], nn.Module], Mapping[str, str]]] = {
    "called-twice": (lambda: network(lambda self, h, t: self.mid(F.silu(self.mid(h)))), {}),
    "two-sizes": (
        lambda: network(lambda self, h, t: self.mid(h) + F.interpolate(self.mid(F.avg_pool2d(h, 2)), scale_factor=2.0)),
        {},
    ),
    "attended-twice": (
        lambda: network(
            attended_twice, q=nn.Linear(WIDTH, WIDTH), k=nn.Linear(WIDTH, WIDTH), v=nn.Linear(WIDTH, WIDTH)
        ),
        {},
    ),
    "rows": (lambda: network(on_rows, nn.Linear(WIDTH, WIDTH, bias=False)), {}),
    "one-output": (
        lambda: network(
            lambda self, h, t: self.mid(h + self.two(F.relu(self.one(self.embedding(t))))[:, :, None, None]),
            one=nn.Linear(WIDTH, 1),
            two=nn.Linear(1, 1),
        ),
        {},
    ),
    "constant-input": (
        lambda: network(
            lambda self, h, t: self.mid(h + self.label(self.labels(torch.full_like(t, 10)))[:, :, None, None]),
            labels=nn.Embedding(11, WIDTH),
            label=nn.Linear(WIDTH, WIDTH),
        ),
        {"label": "Linear, reads a constant"},
    ),
    "other-layers": (
        lambda: network(
            lambda self, h, t: self.cube(self.up(self.mid(image(rows(self.line(h.flatten(2))), h)))[:, :, None])[
                :, :, 0
            ],
            line=nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
            up=nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1),
            cube=nn.Conv3d(WIDTH, WIDTH, 1),
        ),
        {"line": "Conv1d", "up": "ConvTranspose2d", "cube": "Conv3d"},
    ),
    "attention-and-recurrence": (
        lambda: network(
            lambda self, h, t: self.mid(image(self.rnn(self.encoder(rows(h)))[0], h)),
            encoder=nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True),
            rnn=nn.GRU(WIDTH, WIDTH, batch_first=True),
        ),
        {"encoder.self_attn": "MultiheadAttention", "rnn": "GRU"},
    ),
    "classes-of-ones-own": (
        lambda: Network(nn.Sequential(Special(WIDTH, WIDTH, 3, padding=1), OwnProduct(), conv())),
        {"mid.0": "Special", "mid.1": "OwnProduct"},
    ),
    "hooked": (hooked, {"mid": "Conv2d, its hooks change it"}),
    "channels-last": (
        lambda: network(
            lambda self, h, t: self.mid(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.Linear(WIDTH, WIDTH, bias=False)
        ),
        {},
    ),
    "batch-norm": (
        lambda: Network(
            nn.Sequential(conv(bias=False), nn.BatchNorm2d(WIDTH), nn.SiLU(), conv(), nn.BatchNorm2d(WIDTH))
        ),
        {},
    ),
    "factors": (
        lambda: network(
            lambda self, h, t: h + self.mid(h) * 0.5 + (self.lin(self.embedding(t)) / 3)[:, :, None, None],
            lin=nn.Linear(WIDTH, WIDTH),
        ),
        {},
    ),
    "grouped": (
        lambda: Network(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2, groups=WIDTH), conv(), conv(bias=False))
        ),
        {},
    ),
    "reparametrized": (
        lambda: Network(
            nn.Sequential(
                parametrizations.spectral_norm(conv()),
                nn.utils.spectral_norm(conv()),
                nn.utils.weight_norm(conv()),
                parametrizations.weight_norm(conv()),
            )
        ),
        {},
    ),
    "orthogonal": (
        lambda: network(
            lambda self, h, t: self.mid(h + self.turn(self.embedding(t))[:, :, None, None]),
            turn=parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
        ),
        {},
    ),
    "pruned": (pruned, {}),
    "compiled": (lambda: torch.compile(Network(torch.compile(conv()))), {}),
    "tied": (tied, {}),
    "inference-tensors": (inference, {}),
    "frozen": (frozen, {}),
    "double": (lambda: Network().double(), {}),
    "odd-names": (odd_names, {}),
    "time-proj": (
        lambda: network(
            lambda self, h, t: self.mid(h + self.time_proj(self.embedding(t))[:, :, None, None]),
            time_proj=nn.Linear(WIDTH, WIDTH),
        ),
        {},
    ),
    "dictionary": (lambda: returning(lambda y, x: {"sample": y}), {}),
}
"""Mapping from name to (builder, kinds of the layers that stay in floating point). Every other layer is deployed in
INT8 with exact integers.
"""


def failing() -> nn.Module:
    raise OSError("weights.pt: no such file")


def scripted() -> Any:
    return torch.jit.trace(Network(), (torch.zeros(1, *SHAPE), torch.zeros(1)))  # type: ignore[no-untyped-call]


class WritesOver(Network):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return super().forward(x.mul_(2), t)


class WithoutGradients(Network):
    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return super().forward(x, t)


def raising(self: Any, h: Tensor, t: Tensor) -> Tensor:
    raise ValueError("two\nlines")


REFUSED: Mapping[str, tuple[Callable[[], Any], str]] = {
    "build-fails": (
        failing,
        r"got OSError: weights\.pt: no such file \(own_networks\.py:\d+\) from its build function; allowed a torch",
    ),
    "no-module": (lambda: 3, "got int from its build function; allowed a torch.nn.Module"),
    "lazy": (lambda: Network(nn.LazyConv2d(WIDTH, 3)), r"mid\.weight: got a tensor that has no values yet"),
    "meta": (lambda: Network().to("meta"), r"time\.weight: got a tensor on the meta device"),
    "scripted": (scripted, "which is compiled; allowed a torch.nn.Module in Python"),
    "raises": (
        lambda: network(raising),
        r"got ValueError: two \(own_\w+\.py:\d+\) from a call with x_t \(6, 3, 8, 8\) float32, t \(6,\) int64; allowed",
    ),
    "one-of-a-batch": (
        lambda: network(lambda self, h, t: self.mid(h.view(1, WIDTH, 8, 8))),
        "got RuntimeError: shape",
    ),
    "dictionary": (lambda: returning(lambda y, x: {"eps": y}), "got dict with 'eps' from a call; allowed .* `sample`"),
    "text": (lambda: returning(lambda y, x: "noise"), "got str from a call; allowed a tensor"),
    "shape": (
        lambda: returning(lambda y, x: y[:, :, :4]),
        r"got a tensor \(6, 3, 4, 8\) for x_t \(6, 3, 8, 8\); allowed \(6, 3, 8, 8\)",
    ),
    "float64": (lambda: returning(lambda y, x: y.double()), r"got a tensor of torch\.float64; allowed torch\.float32"),
    "complex": (
        lambda: returning(lambda y, x: torch.complex(y, x)),
        r"got a tensor of torch\.complex64; allowed torch\.float32",
    ),
    "nan": (lambda: returning(lambda y, x: y / 0 - y / 0), "got NaN or infinity for noise"),
    "random": (
        lambda: returning(lambda y, x: y + torch.randn_like(y)),
        "got another prediction when it was called again",
    ),
    "writes-over": (WritesOver, "x_t: got other values after a call"),
    "mixes-states": (
        lambda: Network(nn.BatchNorm2d(WIDTH, track_running_stats=False)),
        "depends on the other states of its batch",
    ),
    "branches": (
        lambda: network(lambda self, h, t: self.mid(h) if t[0] > 500 else h),
        r"got a decision by a value of its inputs \(own_networks\.py:\d+\)",
    ),
    "numbers": (
        lambda: network(lambda self, h, t: self.mid(h) * t.float().mean().item()),
        "got a decision by a value of its inputs",
    ),
    "without-gradients": (
        WithoutGradients,
        "a training step: got RuntimeError: element 0 of tensors does not require grad",
    ),
    "no-operation": (
        lambda: network(
            lambda self, h, t: self.mid(h + self.two(self.embedding(t), self.embedding(t))[..., None, None]),
            two=nn.Bilinear(WIDTH, WIDTH, WIDTH),
        ),
        "OpenVINO's conversion: got aten::bilinear, in two; allowed operations that OpenVINO has",
    ),
    "half-constant": (
        lambda: network(
            lambda self, h, t: self.mid(
                h + (self.lin(self.embedding(t)) + self.lin(torch.ones(1, WIDTH)))[:, :, None, None]
            ),
            lin=nn.Linear(WIDTH, WIDTH),
        ),
        "lin: got no product of the layer's quantized input in the converted graph",
    ),
}
"""Mapping from name to (builder, pattern of the error message)."""
