"""Preparation of a user's module for the rest of the package: no wrappers, plain Parameters as weights, on the CPU, in
float32.

Not here: where the module comes from (own_model.py), or whether it predicts as a denoiser must (probing.py).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pqcad_qat.errors import ModelError

WRAPPERS: tuple[tuple[type[nn.Module], str], ...] = (
    (torch._dynamo.eval_frame.OptimizedModule, "_orig_mod"),
    (DataParallel, "module"),
    (DistributedDataParallel, "module"),
)
"""Wrapper classes that compute what their inner module computes, each with the name under which it holds that module.
"""


def plain_module(module: nn.Module, source: str) -> nn.Module:
    """Return the module in evaluation mode, in float32 on the CPU, run eagerly; its function stays the same.

    Compilation and data-parallel wrappers are removed. Weights that are recomputed at every call (parametrizations,
    spectral or weight normalization, pruning) become plain Parameters with the computed value. That is their form in
    deployment, and it lets their layers be quantized.

    Raises:
        ModelError: the module is compiled code without its Python source, has weights without values, or has
            reparametrizations that fail.
    """
    torch.compiler.set_stance("force_eager")  # Functions that the module itself compiled must run eagerly as well.
    # The fast path would bypass the linear layers of a transformer in evaluation mode.
    torch.backends.mha.set_fastpath_enabled(False)
    module = _unwrapped(module)
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{source}: {name or 'the module'}: got {_class(part)}, which is compiled; allowed a torch.nn.Module "
                "in Python"
            )
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if absent := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        raise ModelError(
            f"{source}: {absent[0]}: got a tensor that has no values yet; allowed a module that was called once, or "
            "whose weights are loaded"
        )
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ModelError(
            f"{source}: {absent[0]}: got a tensor on the meta device, without values; allowed a module with its weights"
        )
    module.cpu().float().eval()
    try:
        _fold(module)
    except Exception as error:  # a user's parametrization may raise anything
        raise ModelError(
            f"{source}: got {one_line(error)} from a reparametrized weight; allowed weights that can be computed"
        ) from error
    _ordinary(module)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.requires_grad_(True)  # A module that is frozen as a whole was frozen for inference, and is trained here.
    return module


def hold_statistics(network: nn.Module) -> None:
    """Keep the running means and variances of normalization layers fixed while the network trains.

    The targets that the network is trained to match were predicted with these statistics.
    """
    for module in network.modules():
        if isinstance(module, _NormBase):
            module.eval()


def one_line(error: BaseException) -> str:
    """Summarize an exception of the user's code in one line, with the line of that code that raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    summary = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    packages = {Path(torch.__file__).parent, Path(__file__).parents[1]}
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(p in Path(frame.filename).parents for p in packages)
    ]
    return f"{summary} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else summary


def _unwrapped(module: nn.Module) -> nn.Module:
    """Remove wrappers at the top and at every level below, and undo `module.compile()`."""
    while (inner := _inside(module)) is not None:
        module = inner
    for parent in list(module.modules()):
        if parent._compiled_call_impl is not None:
            parent._compiled_call_impl = None
        for name, child in list(parent._modules.items()):
            while child is not None and (inner := _inside(child)) is not None:
                parent._modules[name] = child = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper; None for any other module."""
    name = next((inner_name for kind, inner_name in WRAPPERS if isinstance(module, kind)), None)
    return None if name is None else module._modules[name]


def _fold(module: nn.Module) -> None:
    """Replace reparametrized weights by Parameters with their computed values, for both of torch's mechanisms.

    One mechanism is parametrizations, which hold the original tensors in a submodule. The other is hooks that set the
    weight before every call: spectral and weight normalization in their older form, and pruning.
    """
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):  # type: ignore[arg-type]
                _fold_parametrization(part, name)
        for hook, tensor in list(_reparametrizing(part)):
            match hook:
                case SpectralNorm():
                    remove_spectral_norm(part, tensor)
                case WeightNorm():
                    remove_weight_norm(part, tensor)
                case _:
                    prune.remove(part, tensor)  # type: ignore[no-untyped-call]


def _fold_parametrization(part: nn.Module, name: str) -> None:
    """Replace one parametrized weight by a Parameter that requires gradients if any of its original Parameters did."""
    originals = list(part.parametrizations[name].parameters(recurse=False))  # type: ignore[index,union-attr]
    parametrize.remove_parametrizations(part, name)
    value = part._buffers.pop(name, None) if originals else None
    if value is not None:  # torch leaves a buffer where the weight was computed from several Parameters
        trained = any(original.requires_grad for original in originals)
        part.register_parameter(name, nn.Parameter(value, requires_grad=trained))


def _reparametrizing(part: nn.Module) -> Iterator[tuple[object, str]]:
    """Yield the hooks that recompute a tensor of the module before every call, each with the tensor's name."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm | WeightNorm):
            yield hook, hook.name
        elif isinstance(hook, prune.BasePruningMethod):
            yield hook, str(hook._tensor_name)


def _ordinary(module: nn.Module) -> None:
    """Replace tensors made in inference mode by ordinary ones, through which gradients can flow; shared parameters stay
    shared.
    """
    # The old parameter is kept alive so that its id is not reused.
    ordinary: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                ordinary.setdefault(id(parameter), (parameter, nn.Parameter(parameter.detach().clone())))
                part._parameters[name] = ordinary[id(parameter)][1]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()


def _class(module: nn.Module) -> str:
    return type(module).__name__
