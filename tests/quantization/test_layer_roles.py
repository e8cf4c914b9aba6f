"""Roles of layers: what each network that ships, and odd modules, have for input, output and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conditional_models import MODELS
from own_networks import DEPLOYED, SHAPE, WIDTH, Network, conv, image, network, rows
from small_networks import EVERYTHING, Timeless, rule, skip_network
from small_networks import example as small_example
from tiny_runs import SCHEDULER, tiny_unet
from torch import Tensor, nn

from pqcad_qat.errors import PlanError
from pqcad_qat.models.denoiser import DiffusionModel, PredictArguments
from pqcad_qat.models.module_preparation import plain_module
from pqcad_qat.policy.layer_rules import INPUT, OUTPUT, TIME, numbered
from pqcad_qat.quantization import plan as plan_module
from pqcad_qat.quantization.layer_roles import layer_roles
from pqcad_qat.quantization.plan import evaluating, plan_layers
from pqcad_qat.quantization.quantizable_layers import quantizable_layers
from pqcad_qat.quantization.shortcuts import split_shortcuts

ODD = torch.zeros(1, *SHAPE), torch.zeros(1, dtype=torch.long)


def roles(model: nn.Module, example: PredictArguments = ODD) -> dict[str, list[str]]:
    """Layers of each role of a network, by the last part of the role's name."""
    with evaluating(model):
        by_role = layer_roles(model, quantizable_layers(model), example)
    return {role.removeprefix("role:"): list(names) for role, names in by_role.items()}


def with_ending(model: nn.Module, *ends: str) -> list[str]:
    return [name for name in quantizable_layers(model) if name.endswith(ends)]


class LikeAnime64(nn.Module):
    """A U-Net whose time layers are called time1 and time2, and whose blocks each project the time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = conv(3), conv(WIDTH, 3)
        self.time1, self.time2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.time = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.down, self.up, self.shortcut = conv(), conv(2 * WIDTH), conv(2 * WIDTH, size=1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * torch.linspace(1, 0.001, WIDTH // 2, device=t.device)
        embedding = self.time2(F.silu(self.time1(torch.cat([angles.sin(), angles.cos()], -1))))
        skip = self.conv_in(x)
        h = self.down(F.silu(skip)) + self.time[0](F.silu(embedding))[:, :, None, None]
        pixels = rows(h)
        scores = self.to_q(pixels) @ self.to_k(pixels).transpose(1, 2)
        h = torch.cat([h + image(scores.softmax(-1) @ self.to_v(pixels), h), skip], 1)
        h = self.up(F.silu(h)) + self.time[1](F.silu(embedding))[:, :, None, None] + self.shortcut(h)
        y: Tensor = self.conv_out(F.silu(h))
        return y


FAMILIES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "class_unet": ("conv_in", "conv_out", ("time_embedding.linear_1", "time_embedding.linear_2")),
    "text_unet": (
        "conv_in",
        "conv_out",
        ("time_embedding.linear_1", "time_embedding.linear_2", "time_emb_proj"),
    ),
    "text_and_size_unet": ("conv_in", "conv_out", ("time_embedding.linear_1", "time_embedding.linear_2")),
    "dit": ("pos_embed.proj", "proj_out_2", ("timestep_embedder.linear_1", "timestep_embedder.linear_2")),
    "pixart": (
        "pos_embed.proj",
        "proj_out",
        ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "adaln_single.linear"),
    ),
    "sd3": (
        "pos_embed.proj",
        "proj_out",
        ("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
    ),
    "flux": (
        "x_embedder",
        "proj_out",
        ("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
    ),
}
"""Model -> the layer that reads x_t, the one that makes the prediction, and how those that read the time step end.
A projection of the time and of a class, of pooled text, of sizes or of guidance together is no layer of the time."""


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_roles(name: str, device: str) -> None:
    reader, last, time = FAMILIES[name]
    model = MODELS[name]().to(device)
    example = DiffusionModel(model, SCHEDULER, name, "").example
    expected = {"input": [reader], "output": [last], "time": with_ending(model, *time)}
    assert roles(model, example) == expected
    assert all(expected.values())


@pytest.mark.parametrize("split", [False, True])
def test_an_unconditional_unet_has_the_projections_of_its_time_too(split: bool) -> None:
    model = tiny_unet()
    example = torch.zeros(1, 1, 32, 32), torch.zeros(1, dtype=torch.long)
    if split:
        split_shortcuts(model, example)
    time = with_ending(model, "time_embedding.linear_1", "time_embedding.linear_2", "time_emb_proj")
    assert len(time) > 6
    assert roles(model, example) == {"input": ["conv_in"], "output": ["conv_out"], "time": time}


def test_names_play_no_part() -> None:
    time = ["time1", "time2", "time.0", "time.1"]
    assert roles(LikeAnime64()) == {"input": ["conv_in"], "output": ["conv_out"], "time": time}
    assert roles(Network()) == {"input": ["enter"], "output": ["leave"], "time": ["time"]}


@pytest.mark.parametrize("name", DEPLOYED)
def test_modules_of_many_features_are_followed(name: str) -> None:
    by_role = roles(plain_module(DEPLOYED[name][0](), name).eval())
    assert (by_role["input"], by_role["output"], by_role["time"][0]) == (["enter"], ["leave"], "time")


def tables(self: Any, h: Tensor, t: Tensor) -> Tensor:
    """Middle that looks the time up in a table, and looks up a constant too."""
    constant = self.label(self.table(torch.full_like(t, 3)))
    y: Tensor = self.mid(h + (self.learned(self.table(t % 5)) + constant)[:, :, None, None])
    return y


def in_place(self: Any, h: Tensor, t: Tensor) -> Tensor:
    """Middle that adds to its tensors in place, half of it without gradients."""
    emb = self.learned(self.embedding(t))
    with torch.no_grad():
        h = h.clone()
        h[:, :4].add_(emb[:, :4, None, None])
    h += emb[:, :, None, None].expand_as(h)
    y: Tensor = self.mid(F.silu(h, inplace=True)) + self.learned(self.embedding(t)).view(-1, WIDTH, 1, 1)
    return y


@pytest.mark.parametrize("middle", [tables, in_place])
def test_integers_tables_and_writing_in_place_are_followed(middle: Callable[..., Tensor]) -> None:
    model = network(
        middle, learned=nn.Linear(WIDTH, WIDTH), label=nn.Linear(WIDTH, WIDTH), table=nn.Embedding(5, WIDTH)
    )
    assert roles(model) == {"input": ["enter"], "output": ["leave"], "time": ["time", "learned"]}


class TwoEnds(nn.Module):
    """Reads x_t in two layers, and predicts a sum of two; `both` is one layer that is called on x_t and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.deep, self.last, self.side = (
            conv(3),
            conv(3 + WIDTH),
            conv(),
            conv(WIDTH, 3),
            conv(3, 3),
        )
        self.both = conv(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.two(torch.cat([F.relu(self.one(x)), F.avg_pool2d(x, 3, 1, 1)], 1))
        y: Tensor = self.last(F.relu(self.deep(h))) + 2 * self.side(self.both(self.both(x)))
        return y.clamp(-3, 3)


def test_several_layers_may_have_a_role_and_one_layer_several_calls() -> None:
    assert roles(TwoEnds()) == {"input": ["one", "two", "both"], "output": ["last", "side"], "time": []}


class Other(nn.Conv2d):
    pass


def test_layers_that_are_never_quantized_lie_in_between_as_well() -> None:
    model = Timeless(Other(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 3, 1))
    assert roles(model) == {"input": [], "output": [], "time": []}


class Halves(TwoEnds):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.last(self.two(torch.cat([self.one(x), x], 1)))
        return y


def test_both_halves_of_a_split_convolution_have_its_role() -> None:
    model = split_shortcuts(Halves(), ODD)
    assert roles(model)["input"] == ["one", "two.left", "two.right"]


def failing(self: Any, h: Tensor, t: Tensor) -> Tensor:
    raise ValueError("nothing")


def with_numpy(self: Any, h: Tensor, t: Tensor) -> Tensor:
    y: Tensor = self.mid(torch.from_numpy(h.numpy() + 1))
    return y


@pytest.mark.parametrize(
    ("middle", "told"),
    [
        (
            failing,
            r"got ValueError: nothing \(.*\) while the roles of layers were looked for; allowed patterns without ",
        ),
        (with_numpy, r"got role:, for a network whose prediction does not follow from x_t by .*; allowed patterns"),
    ],
)
def test_a_network_that_cannot_be_followed_is_told_in_one_line_and_left_as_it_was(
    middle: Callable[..., Tensor], told: str
) -> None:
    model = network(middle).train()
    with pytest.raises(PlanError, match=f"^quantization.layers: {told}") as caught:
        roles(model)
    assert "\n" not in str(caught.value)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_inputs_are_left_as_they_were() -> None:
    model = network(lambda self, h, t: self.mid(h) + t.add_(1)[:, None, None, None])
    x, t = torch.zeros(1, *SHAPE), torch.zeros(1, dtype=torch.long)
    assert roles(model, (x, t))["time"] == ["time"]
    assert t.tolist() == [0]


def test_roles_are_looked_for_only_where_a_rule_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(plan_module, "layer_roles", refused)
    model = skip_network()
    assert plan_layers(model, numbered([EVERYTHING]), (8,), small_example())
    with pytest.raises(AssertionError):
        plan_layers(model, numbered([rule(INPUT), EVERYTHING]), (8,), small_example())


def test_rules_take_roles_as_patterns() -> None:
    model = Network()
    rules = numbered([rule(INPUT, OUTPUT, bits=8), rule(TIME, bits=6), rule("*", bits=4)])
    bits = {layer.name: (layer.weights.bits, layer.pattern) for layer in plan_layers(model, rules, (8,), ODD)}
    assert bits == {"time": (6, TIME), "enter": (8, INPUT), "leave": (8, OUTPUT), "mid": (4, "*")}
