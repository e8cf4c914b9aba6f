"""Weights in safetensors: which files hold them, whole or in shards, whether they fit a module, and loading them into
it.

Not here: the other content of a pipeline's folder (model_folder.py). Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json, shown

SAFETENSORS = ".safetensors"
"""File name ending of safetensors files."""

FILE_VARIANTS = ("fp32", "fp16", "bf16")
"""Precisions in the names of weight files, in order of preference. Such files are read only where the plain name is
missing.
"""

OTHER_FORMATS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5", ".gguf")
"""File name endings of weights in other formats, which are never read; messages name them."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes in which full-precision weights may be stored."""

POINTER = b"version https://git-lfs"
"""First bytes of a git-lfs pointer, a file whose content git has not fetched."""

NAMED = 5
"""Largest number of faulty tensors that a message names."""


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, as described by its file's header.

    Attributes:
        file: the file that holds it.
        name: its name in that file.
        shape: its sizes.
        dtype: its dtype, as safetensors spells it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def has_weights(folder: Path, stem: str) -> bool:
    """Return whether a folder holds safetensors weights with this file name, whole or in shards, of any precision."""
    return _whole_or_index(folder, stem) is not None


def weight_files(folder: Path, stem: str, note: str = "") -> tuple[Path, ...]:
    """Return the safetensors files that hold the weights with this file name: one file, or all shards that its index
    lists.

    Args:
        folder: folder of a pipeline part.
        stem: file name without precision and ending.
        note: end of the message where there are no weights.

    Raises:
        ModelError: there are no weights, a shard is missing, or the index is damaged.
    """
    file = _whole_or_index(folder, stem)
    if file is None:
        raise ModelError(_without_weights(folder, stem, note))
    if file.suffix == SAFETENSORS:
        return (file,)
    weight_map = read_json(file).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(f"{file}: weight_map: got {shown(weight_map)}; allowed the name of a file for each tensor")
    shards = sorted(set(weight_map.values()))
    if strange := [name for name in shards if Path(name).name != name or not name.endswith(SAFETENSORS)]:
        raise ModelError(f"{file}: weight_map: got {shown(strange[0])}; allowed names of {SAFETENSORS} files beside it")
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder / missing[0]}: got no such file; allowed all {len(shards)} shards that {file.name} lists, of "
            f"which {len(missing)} are missing"
        )
    return tuple(folder / name for name in shards)


def variant_of(file: Path) -> str | None:
    """Return the precision in a weight file's name, which diffusers and transformers call its variant; None where it
    has none.
    """
    return next((variant for variant in FILE_VARIANTS if f".{variant}" in file.name), None)


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Read the headers of safetensors files, and return their tensors by the names that a module uses.

    Prefixes that torch.compile and data-parallel wrappers added when the module was saved are removed.

    Raises:
        ModelError: a file cannot be read, or two files hold the same tensor.
    """
    tensors: dict[str, Stored] = {}
    for file in files:
        for stored in _header(file):
            if stored.name in tensors:
                raise _damaged(
                    file,
                    f"got {shown(stored.name)}, which {tensors[stored.name].file.name} holds too; allowed one file "
                    "for each tensor",
                )
            tensors[stored.name] = stored
    bare = dict(zip(_unwrapped(list(tensors)), tensors.values(), strict=True))
    # If two names become equal without the wrappers' prefixes, the names are kept as they are stored.
    return bare if len(bare) == len(tensors) else tensors


def fitting(stored: Mapping[str, Stored], module: nn.Module) -> dict[str, Stored]:
    """Return the stored tensors by the module's own names, after checking that their shapes match.

    Raises:
        ModelError: tensors are missing, unknown, of another shape, or not in floating point; the message names the
            first few of each.
    """
    known: dict[str, Any] = dict(stored)
    if (renamed := getattr(module, "_fix_state_dict_keys_on_load", None)) is not None:
        renamed(known)  # diffusers maps old names of attention layers the same way
    wanted = module.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in known],
        "not of this model": [name for name in known if name not in wanted],
        "of another shape": [
            f"{name} {list(known[name].shape)}, not {list(value.shape)}"
            for name, value in wanted.items()
            if name in known and known[name].shape != tuple(value.shape)
        ],
        "not in floating point": [
            f"{name} {known[name].dtype}"
            for name, value in wanted.items()
            if name in known and value.is_floating_point() and known[name].dtype not in FLOATS
        ],
    }
    if groups := [f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names]:
        file = next((tensor.file for tensor in stored.values()), Path("weights"))
        allowed = f"those of the {type(module).__name__} that config.json describes"
        raise _damaged(file, f"got weights that do not fit; allowed {allowed}: {'; '.join(groups)}")
    return known


def load_weights(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Make stored tensors the module's parameters without a copy, in the precision and at the place in which the files
    hold them.

    Raises:
        ModelError: a file changed, or a value is not finite in float32; the message names its tensor.
    """
    module.load_state_dict(dict(_finite_tensors(stored)), strict=True, assign=True)


def check_finite(stored: Mapping[str, Stored]) -> None:
    """Raise the errors of `load_weights`, reading one tensor at a time and keeping none."""
    for _ in _finite_tensors(stored):
        pass


def _finite_tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of stored tensors, and raise ModelError at the first value that is not finite."""
    for name, value in read_tensors(stored):
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise _damaged(stored[name].file, f"{name}: got values that are not finite; allowed finite numbers")
        yield name, value


def read_tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of stored tensors, file by file."""
    for file in dict.fromkeys(tensor.file for tensor in stored.values()):
        names = [name for name, tensor in stored.items() if tensor.file == file]
        try:
            with safe_open(file, framework="pt") as content:
                for name in names:
                    yield name, content.get_tensor(stored[name].name)
        except ModelError:
            raise
        except Exception as error:  # safetensors and torch raise many kinds of exceptions on a damaged file
            raise _damaged(file, _unreadable(error)) from error


def _damaged(file: Path, fault: str) -> ModelError:
    return ModelError(f"{file}: {fault[:2000]}")


def _unreadable(error: Exception) -> str:
    return f"got a file that is not readable as safetensors ({str(error)[:1000]}); allowed such a file"


def _header(file: Path) -> Iterator[Stored]:
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  # it is not a dictionary
                tensor = content.get_slice(name)
                yield Stored(file, name, tuple(tensor.get_shape()), str(tensor.get_dtype()))
    except Exception as error:  # the library raises many kinds of exceptions on a damaged file
        raise _damaged(file, _pointed(file) or _unreadable(error)) from error


def _pointed(file: Path) -> str:
    """Return the fault of a file of which git has fetched only a pointer; "" for any other file."""
    try:
        with file.open("rb") as content:
            begins = content.read(len(POINTER))
    except OSError:
        return ""
    if begins != POINTER:
        return ""
    return "got git-lfs's pointer in place of the weights; allowed the weights, which `git lfs pull` fetches"


def _unwrapped(names: Sequence[str]) -> list[str]:
    """Remove from tensor names what torch.compile and data-parallel wrappers add to all of them."""
    bare = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare


def _whole_or_index(folder: Path, stem: str) -> Path | None:
    kinds = ["", *(f".{variant}" for variant in FILE_VARIANTS)]
    names = [name for kind in kinds for name in (f"{stem}{kind}{SAFETENSORS}", f"{stem}{SAFETENSORS}.index{kind}.json")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _without_weights(folder: Path, stem: str, note: str) -> str:
    """Return the message that says why there are no weights, as far as the other files of the folder show it."""
    beside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    file = folder / f"{stem}{SAFETENSORS}"
    if unread := [name for name in beside if name.endswith(OTHER_FORMATS)]:
        why = "which may run code when it is read"
        return f"{file}: got {unread[0]} alone, {why}; allowed safetensors, as diffusers' save_pretrained writes{note}"
    if misnamed := [name for name in beside if name.startswith(stem) and name.endswith(SAFETENSORS)]:
        variants = ", ".join(f".{variant}" for variant in FILE_VARIANTS)
        return f"{file}: got {misnamed[0]} alone; allowed this name, or one with {variants} before its end{note}"
    return f"{file}: got no such file; allowed weights in safetensors{note}"


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and the number of further ones."""
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*(name[:200] for name in names[:NAMED]), *more])
