"""Weights in safetensors: which files hold them, whole or in shards, whether they are a module's, and their values into
it.

Not here: what a pipeline's folder holds beside them (model_folder.py). Nothing is unpickled.
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

FILE_VARIANTS = ("fp32", "fp16", "bf16")
"""In the names of files of another precision, which are taken where no others are there: the first of these."""

OTHER_FORMATS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5", ".gguf")

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the numbers that full precision may be stored in."""

POINTER = b"version https://git-lfs"
"""What a file begins with whose content git has not fetched."""

NAMED = 5
"""Tensors that a message names, of those at fault."""


@dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Attributes:
        file: that holds it.
        name: by which the file knows it.
        shape: its sizes.
        dtype: as safetensors spells it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def has_weights(folder: Path, stem: str) -> bool:
    """Whether a folder holds weights of that name in safetensors, whole or in shards, of any precision."""
    return _whole_or_index(folder, stem) is not None


def weight_files(folder: Path, stem: str, note: str = "") -> tuple[Path, ...]:
    """The safetensors files that hold the weights of that name: one, or all shards that its index lists.

    Args:
        folder: of a part of a pipeline.
        stem: of the files' names.
        note: what a message adds where there are none.

    Raises:
        ModelError: there are none, a shard is missing, or the index is damaged.
    """
    found = _whole_or_index(folder, stem)
    if found is None:
        raise ModelError(_without_weights(folder, stem, note))
    if found.suffix == SAFETENSORS:
        return (found,)
    weight_map = read_json(found).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(f"{found}: weight_map: got {shown(weight_map)}; allowed the name of a file for each tensor")
    shards = sorted(set(weight_map.values()))
    if strange := [name for name in shards if Path(name).name != name or not name.endswith(SAFETENSORS)]:
        raise ModelError(
            f"{found}: weight_map: got {shown(strange[0])}; allowed names of {SAFETENSORS} files beside it"
        )
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder / missing[0]}: no such file; {found.name} lists {len(shards)} shards, and "
            f"{len(missing)} are missing"
        )
    return tuple(folder / name for name in shards)


def variant_of(file: Path) -> str | None:
    """The precision that the name of a file of weights says, as diffusers and transformers call it; None where it says
    none.
    """
    return next((variant for variant in FILE_VARIANTS if f".{variant}" in file.name), None)


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """What the headers of safetensors files say, by the names that a module knows: without what wrapped it when it was
    saved.

    Raises:
        ModelError: a file that cannot be read, or two with one tensor.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for stored in _header(file):
            if stored.name in found:
                raise _damaged(
                    file,
                    f"holds {shown(stored.name)}, as {found[stored.name].file.name} does; allowed one file a tensor",
                )
            found[stored.name] = stored
    bare = dict(zip(_unwrapped(list(found)), found.values(), strict=True))
    return bare if len(bare) == len(found) else found


def fitting(stored: Mapping[str, Stored], module: nn.Module) -> dict[str, Stored]:
    """The stored tensors by the names of the module's own, whose shapes they have.

    Raises:
        ModelError: tensors that are missing, of no use, of another shape, or no floating-point numbers; the first few
            of each are named.
    """
    known: dict[str, Any] = dict(stored)
    if (renamed := getattr(module, "_fix_state_dict_keys_on_load", None)) is not None:
        renamed(known)  # as diffusers does: attention had other names
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
    if said := [f"{len(names)} {what}: {listed(names)}" for what, names in faults.items() if names]:
        file = next((part.file for part in stored.values()), Path("weights"))
        raise _damaged(
            file, f"not the weights of the {type(module).__name__} that config.json describes: {'; '.join(said)}"
        )
    return known


def load_weights(module: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Make stored tensors the module's own, in the precision in which they are stored, where the files hold them:
    nothing is copied.

    Raises:
        ModelError: a file that changed, or a value that is not finite in float32; its tensor is named.
    """
    module.load_state_dict(dict(_finite_tensors(stored)), strict=True, assign=True)


def check_finite(stored: Mapping[str, Stored]) -> None:
    """As `load_weights`, one tensor at a time, for nothing but its errors."""
    for _ in _finite_tensors(stored):
        pass


def _finite_tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    for name, value in read_tensors(stored):
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise _damaged(stored[name].file, f"{name}: holds values that are not finite")
        yield name, value


def read_tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The values of stored tensors, file by file."""
    for file in dict.fromkeys(part.file for part in stored.values()):
        names = [name for name, part in stored.items() if part.file == file]
        try:
            with safe_open(file, framework="pt") as content:
                for name in names:
                    yield name, content.get_tensor(stored[name].name)
        except ModelError:
            raise
        except Exception as error:  # safetensors and torch raise anything from OSError to their own on a damaged file
            raise _damaged(file, f"not readable as safetensors: {error}") from error


def _damaged(file: Path, what: str) -> ModelError:
    return ModelError(f"{file.parent}: cannot load this model: {file.name}: {what[:2000]}")


def _header(file: Path) -> Iterator[Stored]:
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  # it is no dict
                part = content.get_slice(name)
                yield Stored(file, name, tuple(part.get_shape()), str(part.get_dtype()))
    except Exception as error:  # as above
        raise _damaged(file, _pointed(file) or f"not readable as safetensors: {error}") from error


def _pointed(file: Path) -> str:
    """What to do where git has fetched a pointer alone."""
    try:
        with file.open("rb") as content:
            begins = content.read(len(POINTER))
    except OSError:
        return ""
    return "holds git-lfs's pointer in the weights' place: `git lfs pull` fetches them" if begins == POINTER else ""


def _unwrapped(names: Sequence[str]) -> list[str]:
    """Names of tensors without what torch.compile and data-parallel wrappers put into all of them."""
    bare = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare


def _whole_or_index(folder: Path, stem: str) -> Path | None:
    kinds = ["", *(f".{variant}" for variant in FILE_VARIANTS)]
    names = [name for kind in kinds for name in (f"{stem}{kind}{SAFETENSORS}", f"{stem}{SAFETENSORS}.index{kind}.json")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _without_weights(folder: Path, stem: str, note: str) -> str:
    """Why there are none, as far as the other files tell."""
    beside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    fault = f"{folder / f'{stem}{SAFETENSORS}'}: no such file; weights are read from safetensors only{note}"
    if other := [name for name in beside if name.endswith(OTHER_FORMATS)]:
        return (
            f"{fault}; got {other[0]}: reading it may run what is in it; diffusers' save_pretrained writes safetensors"
        )
    if named := [name for name in beside if name.startswith(stem) and name.endswith(SAFETENSORS)]:
        return (
            f"{fault}; got {named[0]}; allowed that name, or one with "
            f"{', '.join(f'.{variant}' for variant in FILE_VARIANTS)} before its end"
        )
    return fault


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*(name[:200] for name in names[:NAMED]), *more])
