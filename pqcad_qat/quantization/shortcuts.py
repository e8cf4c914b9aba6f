"""Splitting of convolutions over a concatenated shortcut, so that each half of the channels has an input quantizer.

The method. A U-Net concatenates two tensors along the channels and convolves the result. The two halves may have very
different ranges, so one quantizer for both wastes its grid on one of them. A convolution is linear in its channels:
conv([a, b]) = left(a) + right(b). The seam, where the halves meet, is found by running the model once and following
every concatenation to the convolutions that read it. The idea is that of Q-Diffusion (Li et al. 2023, arXiv
2302.04304).

The rewrite is of the floating-point model and changes only the order of its sums.

Not here: quantizers (brevitas_quantizers.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pqcad_qat.errors import ModelError
from pqcad_qat.models.denoiser import PredictArguments, predict
from pqcad_qat.models.module_preparation import one_line
from pqcad_qat.quantization.plan import evaluating

# Functions that change no value and no channel, so that a seam can be followed through them. A normalisation is not
# among them: after it both halves have the same scale, and a second 3x3 convolution costs a tenth of a step and gains
# nothing at 8 bits.
IDENTITIES: frozenset[Any] = frozenset(
    {F.dropout, F.dropout2d, torch.clone, Tensor.clone, Tensor.contiguous, Tensor.float, Tensor.to}
)


class SplitConv2d(nn.Module):
    """One convolution as two, over the channels before and after the seam: conv([a, b]) = left(a) + right(b)."""

    is_split_convolution = True  # tells plan.py that a rule for the convolution matches both halves

    def __init__(self, left: nn.Conv2d, right: nn.Conv2d) -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.seam = left.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, O, H', W')."""
        if self.training:  # each slice's gradient is as large as x; a split's gradients are joined in one pass
            left, right = torch.split(x, [self.seam, x.shape[1] - self.seam], dim=1)
        else:  # slices, which export/graph_rewrites.py recognises
            left, right = x[:, : self.seam], x[:, self.seam :]
        y: Tensor = self.left(left) + self.right(right)
        return y

    def extra_repr(self) -> str:
        return f"seam={self.seam}"


def split_shortcuts(model: nn.Module, example: PredictArguments) -> nn.Module:
    """Replace in place every Conv2d that directly reads a concatenation of two tensors along the channels.

    ``example`` is the input of one forward pass, in which the concatenations are found.
    """
    return split_at(model, shortcut_seams(model, example))


def shortcut_seams(model: nn.Module, example: PredictArguments) -> dict[str, int]:
    """As find_shortcuts, but by module path, so that it also holds for another model of the same modules."""
    seams = find_shortcuts(model, example)
    return {
        name: seams[module]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module in seams
    }


def split_at(model: nn.Module, seams: Mapping[str, int]) -> nn.Module:
    """Replace in place the convolutions at these paths; `seams` gives the channels before each one's seam."""
    layers = {model.get_submodule(name): seam for name, seam in seams.items()}
    replace_modules(model, {layer: _split(cast(nn.Conv2d, layer), seam) for layer, seam in layers.items()})
    return model


def rewritable(model: nn.Module, source: str = "") -> nn.Module:
    """A copy of the modules around the same Parameters and buffers, whose layers may be replaced.

    It needs almost no memory. `source` is the model's name in messages.

    Raises:
        ModelError: the model holds something that Python cannot copy.
    """
    shared = [*model.parameters(), *model.buffers()]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except Exception as error:  # a module of the user's own may hold anything
        raise ModelError(
            f"{source or type(model).__name__}: got a module that cannot be copied: {one_line(error)}; allowed one "
            "that Python's copy.deepcopy can copy"
        ) from error


def merge_shortcuts(model: nn.Module) -> nn.Module:
    """The inverse of split_shortcuts, in place: every SplitConv2d of floating-point halves becomes one Conv2d again."""
    split = [module for module in model.modules() if isinstance(module, SplitConv2d)]
    replace_modules(model, {module: _merge(module.left, module.right) for module in split})
    return model


def find_shortcuts(model: nn.Module, example: PredictArguments) -> dict[nn.Conv2d, int]:
    """The convolutions that read a concatenation of two tensors, and the channels before each one's seam."""
    watch = _SeamWatch(model)
    with evaluating(model), watch:
        predict(model, *example)
    return watch.layer_seams


def replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Put the new modules wherever the model holds the old ones, even where a module is held in several places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a child's second name
            if child in replacements:
                setattr(parent, name, replacements[child])


class _SeamWatch(TorchFunctionMode):
    """Follows seams from torch.cat to the convolutions that read them, while the model runs.

    A tensor with a seam is known by its id. A convolution whose inputs do not all have the same seam is not split.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = {id(m.weight): m for m in model.modules() if type(m) is nn.Conv2d and m.groups == 1}
        self.seams: dict[int, tuple[Tensor, int]] = {}  # the tensor is kept, so that no other one gets its id
        self.other_inputs: set[nn.Conv2d] = set()
        self.layer_seams: dict[nn.Conv2d, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate):
            self._concatenation(result, *args, **kwargs)
        elif func is F.conv2d:
            self._convolution(args[0], args[1])
        elif func in IDENTITIES and args and id(args[0]) in self.seams and result.shape == args[0].shape:
            self.seams[id(result)] = (result, self.seams[id(args[0])][1])
        return result

    def _concatenation(self, result: Tensor, tensors: Any, dim: int = 0, **kwargs: Any) -> None:
        """Note the seam of a concatenation of two tensors along the channels."""
        if result.dim() == 4 and dim in (1, -3) and len(tensors) == 2:
            self.seams[id(result)] = (result, tensors[0].shape[1])

    def _convolution(self, x: Tensor, weight: Tensor) -> None:
        """Note the seam that a convolution reads, or that it cannot be split."""
        layer = self.layers.get(id(weight))
        if layer is None or layer in self.other_inputs:
            return
        seam = self.seams[id(x)][1] if id(x) in self.seams else None
        if seam is None or self.layer_seams.get(layer, seam) != seam:  # it also reads an input without this seam
            self.layer_seams.pop(layer, None)
            self.other_inputs.add(layer)
        else:
            self.layer_seams[layer] = seam


def _split(layer: nn.Conv2d, seam: int) -> SplitConv2d:
    """The convolution as two; the left one has the bias."""
    left, right = _like(layer, seam, layer.bias is not None), _like(layer, layer.in_channels - seam, False)
    left.weight = nn.Parameter(layer.weight.detach()[:, :seam].clone(), requires_grad=layer.weight.requires_grad)
    right.weight = nn.Parameter(layer.weight.detach()[:, seam:].clone(), requires_grad=layer.weight.requires_grad)
    left.bias = layer.bias
    return SplitConv2d(left, right).train(layer.training)


def _merge(left: nn.Conv2d, right: nn.Conv2d) -> nn.Conv2d:
    """The two convolutions as one."""
    merged = _like(left, left.in_channels + right.in_channels, left.bias is not None)
    weight = torch.cat([left.weight.detach(), right.weight.detach()], dim=1)
    merged.weight = nn.Parameter(weight, requires_grad=left.weight.requires_grad)
    merged.bias = left.bias
    return merged.train(left.training)


def _like(layer: nn.Conv2d, in_channels: int, bias: bool) -> nn.Conv2d:
    """An empty convolution of the same geometry but other input channels; its Parameters are set afterwards."""
    return nn.Conv2d(
        in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        bias=bias,
        padding_mode=layer.padding_mode,
        device="meta",
    )
