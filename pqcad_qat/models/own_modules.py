"""A module of the user's own as all else takes it: unwrapped, its reparametrized weights plain Parameters, on the CPU,
in float32.

Not here: where it comes from (own_model.py), and whether it predicts as a denoiser has to (probing.py).
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
"""Modules around a module that compute what it does, and where they hold it."""


def plain_module(module: nn.Module, source: str) -> nn.Module:
    """The module in evaluation mode, in float32 on the CPU, as Python runs it line by line; its function is the same.

    What compiles it, or shares its batches among devices, is taken off. A weight that is computed of others at every
    call, by a
    parametrization, spectral or weight normalization or pruning, becomes the Parameter that it amounts to: so it is
    deployed, and so its layer can be quantized.

    Raises:
        ModelError: compiled code without its Python, weights that are not there, or reparametrizations that fail.
    """
    torch.compiler.set_stance("force_eager")  # of compiled functions that it calls the Python is run
    torch.backends.mha.set_fastpath_enabled(False)  # in evaluation it would pass by the layers of a transformer
    module = _unwrapped(module)
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{source}: {name or 'the module'} is {_class(part)}, compiled; allowed a torch.nn.Module in Python"
            )
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if absent := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        raise ModelError(
            f"{source}: {absent[0]} has no values yet; allowed a module that was called once, or whose "
            "weights are loaded"
        )
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ModelError(
            f"{source}: {absent[0]} is on the meta device, without values; allowed a module with its weights"
        )
    module.cpu().float().eval()
    try:
        _fold(module)
    except Exception as error:  # whatever a parametrization of the user's raises
        raise ModelError(f"{source}: a reparametrized weight cannot be computed: {one_line(error)}") from error
    _ordinary(module)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.requires_grad_(True)  # frozen as a whole, as for inference: it is trained now
    return module


def hold_statistics(network: nn.Module) -> None:
    """Keep running means and variances as they are while the network trains: what it is to match was predicted with
    them.
    """
    for module in network.modules():
        if isinstance(module, _NormBase):
            module.eval()


def one_line(error: BaseException) -> str:
    """What an exception of other people's code says in one line, and which line of theirs raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    packages = {Path(torch.__file__).parent, Path(__file__).parents[1]}
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(p in Path(frame.filename).parents for p in packages)
    ]
    return f"{said} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else said


def _unwrapped(module: nn.Module) -> nn.Module:
    """Without wrappers, at the top and wherever they hang; `module.compile()` undone."""
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
    held = next((place for kind, place in WRAPPERS if isinstance(module, kind)), None)
    return None if held is None else module._modules[held]


def _fold(module: nn.Module) -> None:
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
    originals = list(part.parametrizations[name].parameters(recurse=False))  # type: ignore[index,union-attr]
    parametrize.remove_parametrizations(part, name)
    value = part._buffers.pop(name, None) if originals else None
    if value is not None:  # what torch makes of several Parameters without gradients
        trained = any(original.requires_grad for original in originals)
        part.register_parameter(name, nn.Parameter(value, requires_grad=trained))


def _reparametrizing(part: nn.Module) -> Iterator[tuple[object, str]]:
    """The hooks that compute a tensor of the module before every call, and its name."""
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm | WeightNorm):
            yield hook, hook.name
        elif isinstance(hook, prune.BasePruningMethod):
            yield hook, str(hook._tensor_name)


def _ordinary(module: nn.Module) -> None:
    """Tensors that were made in inference mode as ordinary ones, which gradients may flow through; what is shared stays
    shared.
    """
    ordinary: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is kept so that its id stays its own
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
