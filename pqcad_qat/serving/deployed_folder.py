"""The deployed folder: its files, what its manifest says of them, and how it is read and written, whole or not at all.

Not here: where a graph comes from (export_model.py), or how one is run (runtime.py). Needs openvino and numpy.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openvino as ov

from pqcad_qat.errors import ExportError, ModelError
from pqcad_qat.machine.files import file_digest, write_json
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.models.families.family import DENOISER_FOLDERS
from pqcad_qat.serving.manifest import (
    CONFIG,
    GRAPH,
    PACKED_GRAPH,
    PARTS,
    SCHEDULER_CONFIG,
    WEIGHTS,
    check_denoiser_config,
    check_scheduler_config,
    checked_manifest,
    listed,
)
from pqcad_qat.serving.packing import WeightFormat, compress_text, pack_weights, read_text_and_weights, write_graph

MANIFEST = "manifest.json"
MODEL_INDEX = "model_index.json"
OPENVINO_CONFIG = "openvino_config.json"

EMBEDDED_GUIDANCE = "embedded_guidance"
"""Key of the scheduler config: what a denoiser was told that takes guidance as an input."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""In a tokenizer's folder: what prompts are read with."""


def tokenizer_of(text_encoder: str) -> str:
    """The folder of a text encoder's tokenizer, in diffusers' layout and in ours."""
    return text_encoder.replace("text_encoder", "tokenizer")


_UNPACKING = (
    "pqcad_qat.serving.runtime unpacks it at load to the graph of the int8 form, bit for bit. That "
    "form is needed for plain OpenVINO, "
    "which does not read the compressed text, nor run convolutions with packed constants in INT8: "
    "OVUNet2DModel.save_pretrained(FOLDER, "
    'weights="int8") writes it.'
)
WEIGHTS_NOTE: Mapping[WeightFormat, str] = {
    "int8": (
        "Every quantized weight is an int8 constant: plain OpenVINO (read_model, compile_model) executes the "
        "planned layers in INT8."
    ),
    "packed": (
        "The smallest files: weights are packed to 2, 3 or 4 bits where they fit, and the text is "
        f"compressed. {_UNPACKING}"
    ),
}


def denoiser_part(manifest: Mapping[str, Any]) -> str:
    """The folder of the denoiser, of those below a deployed folder with this manifest."""
    return str(manifest["graph"]).partition("/")[0]


def denoiser_config(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The diffusers config of a deployed folder's denoiser.

    Raises:
        ModelError: it cannot be read, or does not belong to the samples in the manifest.
    """
    path = folder / denoiser_part(manifest) / CONFIG
    config = read_json(path)
    check_denoiser_config(config, manifest, path)
    return config


def scheduler_config(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' config of the scheduler that a deployed folder's denoiser is for.

    Raises:
        ModelError: it cannot be read, has a key that is not allowed, or is no schedule that we know.
    """
    path = folder / SCHEDULER_CONFIG
    config = read_json(path)
    check_scheduler_config(config, manifest, path)
    return config


def stated(folder: Path) -> dict[str, Any]:
    """The manifest of a deployed folder, its values checked, its files not.

    Raises:
        ModelError: no such folder, no manifest, or one that is not allowed.
    """
    path = folder / MANIFEST
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name too long, or one with a zero in it
        there = False
    if not there:
        raise ModelError(f"{shown(str(folder))[1:-1]}: not a deployed folder: it has no {MANIFEST}")
    return checked_manifest(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a deployed folder, after checking that every file it lists is there and unchanged.

    Raises:
        ModelError: as `stated`; or a file that is needed and not listed, a missing one, or a digest that differs.
    """
    manifest = stated(folder)
    part, path = denoiser_part(manifest), folder / MANIFEST
    listed(manifest, path, manifest["graph"], f"{part}/{WEIGHTS}", f"{part}/{CONFIG}", SCHEDULER_CONFIG)
    for beside in manifest.get("parts", {}):
        listed(manifest, path, *part_files(beside))
    for name, entry in manifest["files"].items():
        try:
            _check_file(folder, name, entry)
        # a link that leads to itself, a name too long, a file that may not be read
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else shown(str(error))
            raise ModelError(f"{path}: lists {shown(name)[1:-1]}, which cannot be read: {why}") from error
    return manifest


def part_files(part: str) -> tuple[str, ...]:
    """The files, inside a deployed folder, that a part of its pipeline cannot do without."""
    words = () if part == PARTS["vae"] else (f"{tokenizer_of(part)}/{name}" for name in TOKENIZER_FILES)
    return (*(f"{part}/{name}" for name in (GRAPH, WEIGHTS, CONFIG)), *words)


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder / MANIFEST}: lists {name}, which lies outside the folder")
    if not path.is_file():
        raise ModelError(f"{folder}: the manifest lists {name}, which is missing")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise ModelError(f"{path}: damaged: the manifest says {entry['bytes']} bytes, got {size}")
    if (digest := file_digest(path)) != entry["sha256"]:
        raise ModelError(f"{path}: damaged or changed: the manifest says sha256 {entry['sha256']}, got {digest}")


def read_graph(folder: Path, core: ov.Core) -> ov.Model:
    """The graph that the manifest names, with every packed weight unpacked to int8: the same, bit for bit, whatever its
    format on disk.

    Raises:
        ModelError: the manifest is not allowed, or OpenVINO cannot read the files.
    """
    text = folder / stated(folder)["graph"]
    return read_text_and_weights(text, text.parent / WEIGHTS, core)


def nothing_further(_folder: Path) -> dict[str, Any]:
    """For a folder that holds a denoiser alone."""
    return {}


def write_folder(
    graph: ov.Model,
    weights: WeightFormat,
    texts: Mapping[str, Mapping[str, Any]],
    manifest: Mapping[str, Any],
    *,
    folder: Path,
    part: str = DENOISER_FOLDERS[0],
    further: Callable[[Path], Mapping[str, Any]] = nothing_further,
) -> dict[str, Any]:
    """Write a deployed folder; an older one there is replaced.

    Args:
        graph: with int8 weights; it is packed in place.
        weights: their format on disk.
        texts: path inside the folder -> content of a JSON file.
        manifest: all but what follows from the files: `graph`, `weights`, `files`, `parts`, and `stored_bits` of the
            `layers`.
        folder: where to.
        part: of DENOISER_FOLDERS, that the graph is written in.
        further: writes what else belongs below the folder that it is given, and returns the manifest's `parts`.

    Returns:
        The manifest as written.

    Raises:
        ExportError: the folder holds something else, or a planned layer has no 8-bit weights.
    """
    stored = pack_weights(graph, manifest["layers"], weights)
    with replaced(folder) as staging:
        write_graph(graph, staging / part / GRAPH, manifest["layers"])
        if weights != "int8":
            compress_text(staging / part / GRAPH, staging / part / PACKED_GRAPH)
        for name, content in texts.items():
            write_json(staging / name, content)
        written = {
            **manifest,
            "parts": dict(further(staging)),
            "graph": f"{part}/{GRAPH if weights == 'int8' else PACKED_GRAPH}",
            "weights": {"format": weights, "note": WEIGHTS_NOTE[weights]},
            "layers": {name: {**layer, "stored_bits": stored[name]} for name, layer in manifest["layers"].items()},
            "files": _files(staging),
        }
        write_json(staging / MANIFEST, written)
    return written


def copy_folder(source: Path, folder: Path, weights: WeightFormat | None = None) -> None:
    """Write a deployed folder again: the same files, byte for byte, or in another format of its weights, as
    export_model would have.

    Raises:
        ModelError: a damaged source.
        ExportError: the target holds something else.
    """
    manifest = read_manifest(source)
    if weights in (None, manifest["weights"]["format"]):
        with replaced(folder) as staging:
            _copy(source, (*manifest["files"], MANIFEST), staging)
            read_manifest(staging)
        return
    if weights not in WEIGHTS_NOTE:
        raise ModelError(f"weights must be {', '.join(WEIGHTS_NOTE)}, got {weights!r}")
    part = denoiser_part(manifest)
    alike = [name for name in manifest["files"] if name not in (manifest["graph"], f"{part}/{WEIGHTS}")]

    def further(staging: Path) -> Mapping[str, Any]:
        _copy(source, alike, staging)
        return dict(manifest.get("parts", {}))

    write_folder(read_graph(source, ov.Core()), weights, {}, manifest, folder=folder, part=part, further=further)


def _copy(source: Path, names: Iterable[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def denoiser_bytes(folder: Path) -> int:
    """Bytes of a deployed folder's files, less the other parts of its pipeline."""
    files = (path for path in folder.rglob("*") if path.is_file())
    others = (*PARTS.values(), *(tokenizer_of(part) for part in PARTS if part != "vae"))
    return sum(path.stat().st_size for path in files if path.relative_to(folder).parts[0] not in others)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to be filled, moved to its place when the context ends well; until then an older deployed folder
    there stays whole.

    Raises:
        ExportError: what is there is no deployed folder.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        staging = Path(temporary) / "new"
        staging.mkdir()
        yield staging
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        staging.rename(folder)


def check_replaceable(folder: Path) -> None:
    """Raises ExportError where a deployed folder must not be written, since there is something else."""
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(
            f"{folder}: exists and is not a deployed folder; it must be absent, empty, or hold a {MANIFEST}"
        )


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file, by path inside the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in paths
    }
