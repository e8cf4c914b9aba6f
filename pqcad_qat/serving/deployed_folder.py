"""Files of a deployed folder: how they are listed in its manifest, read, and written as a whole or not at all.

Not here: where a graph comes from (export_model.py), or how it is run (runtime.py). Needs openvino and numpy.
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
from pqcad_qat.models.families.family import DENOISER_FOLDERS, TEXT_ENCODERS
from pqcad_qat.serving.manifest import (
    CONFIG,
    FLOAT_GRAPH,
    FLOAT_WEIGHTS,
    GRAPH,
    OTHER_FOLDERS,
    PACKED_GRAPH,
    SCHEDULER_CONFIG,
    WEIGHTS,
    check_denoiser_config,
    check_listed,
    check_scheduler_config,
    checked_manifest,
)
from pqcad_qat.serving.packing import WeightFormat, compress_text, pack_weights, read_text_and_weights, write_graph

MANIFEST = "manifest.json"
"""Name of the file that describes a deployed folder."""

SERVER_GRAPH = "graph.pbtxt"
"""Name of OpenVINO Model Server's file, in text-to-image folders that it can serve."""

MODEL_INDEX = "model_index.json"
"""Name of diffusers' file that lists the parts of a pipeline."""

OPENVINO_CONFIG = "openvino_config.json"
"""Name of optimum-intel's config file."""

EMBEDDED_GUIDANCE = "embedded_guidance"
"""Key of the scheduler's config: guidance scale that was fed to a denoiser that takes guidance as an input."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""Files in a tokenizer's folder that are needed to read prompts."""


def tokenizer_of(text_encoder: str) -> str:
    """The folder of a text encoder's tokenizer; diffusers' layout and ours agree."""
    return text_encoder.replace("text_encoder", "tokenizer")


_UNPACKING = (
    "pqcad_qat.serving.runtime unpacks it at load to the graph of the int8 form, bit for bit. That form is needed for "
    "plain OpenVINO, which does not read the compressed text, nor run convolutions with packed constants in INT8: "
    'OVUNet2DModel.save_pretrained(FOLDER, weights="int8") writes it.'
)
"""End of the note on packed weights."""

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
"""Note in the manifest for each format of the weights."""


def denoiser_part(manifest: Mapping[str, Any]) -> str:
    """The denoiser's folder inside a deployed folder with this manifest."""
    return str(manifest["graph"]).partition("/")[0]


def denoiser_config(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The diffusers config of a deployed folder's denoiser.

    Raises:
        ModelError: the config cannot be read, or does not match the samples in the manifest.
    """
    path = folder / denoiser_part(manifest) / CONFIG
    config = read_json(path)
    check_denoiser_config(config, manifest, path)
    return config


def scheduler_config(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' config of the scheduler that a deployed folder's denoiser was made for.

    Raises:
        ModelError: the config cannot be read, has a value that is not allowed, or describes no schedule that we know.
    """
    path = folder / SCHEDULER_CONFIG
    config = read_json(path)
    check_scheduler_config(config, manifest, path)
    return config


def unverified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a deployed folder, with its values checked but not its files.

    Raises:
        ModelError: there is no such folder or no manifest, or the manifest is not valid.
    """
    path = folder / MANIFEST
    try:
        exists = path.is_file()
    except (OSError, ValueError):  # the name is too long, or contains a zero byte
        exists = False
    if not exists:
        raise ModelError(
            f"{shown(str(folder))[1:-1]}: got no {MANIFEST}; allowed a deployed folder, such as openvino/ of a run"
        )
    return checked_manifest(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a deployed folder, after checking that every listed file exists and is unchanged.

    Raises:
        ModelError: as `unverified_manifest`; or a needed file is not listed, or a listed file is missing or has another
            digest.
    """
    manifest = unverified_manifest(folder)
    part, path = denoiser_part(manifest), folder / MANIFEST
    check_listed(manifest, path, manifest["graph"], f"{part}/{WEIGHTS}", f"{part}/{CONFIG}", SCHEDULER_CONFIG)
    if manifest.get("float_start") is not None:
        check_listed(manifest, path, f"{part}/{FLOAT_GRAPH}", f"{part}/{FLOAT_WEIGHTS}")
    for beside in manifest.get("parts", {}):
        check_listed(manifest, path, *part_files(beside))
    for name, entry in manifest["files"].items():
        try:
            _check_file(folder, name, entry)
        # for example a link to itself, a name that is too long, or missing permission
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else shown(str(error))
            raise ModelError(
                f"{path}: files: got {shown(name)[1:-1]}, which cannot be read: {why}; allowed readable files"
            ) from error
    return manifest


def part_files(part: str) -> tuple[str, ...]:
    """The files, inside a deployed folder, that a pipeline part needs."""
    reads_text = part in TEXT_ENCODERS
    tokenizer = (f"{tokenizer_of(part)}/{name}" for name in TOKENIZER_FILES) if reads_text else ()
    return (*(f"{part}/{name}" for name in (GRAPH, WEIGHTS, CONFIG)), *tokenizer)


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Raise ModelError if a listed file lies outside the folder, is missing, or has another size or digest."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder / MANIFEST}: files: got {name}, which lies outside the folder; allowed files inside")
    if not path.is_file():
        raise ModelError(f"{folder}: got no file {name}; allowed a folder with every file that its manifest lists")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise ModelError(f"{path}: damaged: got {size} bytes; allowed {entry['bytes']}, as the manifest says")
    if (digest := file_digest(path)) != entry["sha256"]:
        raise ModelError(
            f"{path}: damaged or changed: got sha256 {digest}; allowed {entry['sha256']}, as the manifest says"
        )


def graph_on_disk(folder: Path, core: ov.Core) -> ov.Model:
    """The graph that the manifest names, for the batch and size on disk, which may be any.

    Raises:
        ModelError: the manifest is not valid, or OpenVINO cannot read the files.
    """
    text = folder / unverified_manifest(folder)["graph"]
    return read_text_and_weights(text, text.parent / WEIGHTS, core)


def nothing_further(_folder: Path) -> dict[str, Any]:
    """Write no further parts: the folder holds a denoiser alone."""
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
    """Write a deployed folder; an older one in its place is replaced.

    Args:
        graph: graph with int8 weights; it is packed in place.
        weights: format of the weights on disk.
        texts: content of each JSON file, by path inside the folder.
        manifest: the manifest without what follows from the files: `graph`, `weights`, `files`, `parts`, and
            `stored_bits` of the `layers`.
        folder: where the deployed folder is written.
        part: folder of the graph, one of DENOISER_FOLDERS.
        further: function that writes the other parts below the folder that it gets, and returns the manifest's `parts`.

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


def copy_folder(
    source: Path, folder: Path, weights: WeightFormat | None = None, *, pipeline_parts: bool = True
) -> None:
    """Write a deployed folder again, byte for byte or with its weights in another format, as export_model would have.

    Args:
        source: the deployed folder.
        folder: where the copy is written.
        weights: format of the weights; None keeps that of the source.
        pipeline_parts: whether the copy holds the pipeline parts, too, or the denoiser alone.

    Raises:
        ModelError: the source is damaged, or there is no such format.
        ExportError: the target holds something else.
    """
    manifest = read_manifest(source)
    weights = weights or manifest["weights"]["format"]
    if weights == manifest["weights"]["format"] and pipeline_parts:
        with replaced(folder) as staging:
            _copy(source, (*manifest["files"], MANIFEST), staging)
            read_manifest(staging)
        return
    if weights not in WEIGHTS_NOTE:
        raise ModelError(f"weights: got {weights!r}; allowed {', '.join(WEIGHTS_NOTE)}")
    part = denoiser_part(manifest)
    unchanged = [
        name
        for name in manifest["files"]
        if name not in (manifest["graph"], f"{part}/{WEIGHTS}", SERVER_GRAPH)
        and (pipeline_parts or name.split("/")[0] not in _folders_beside_the_denoiser())
    ]

    def further(staging: Path) -> Mapping[str, Any]:
        _copy(source, unchanged, staging)
        return dict(manifest.get("parts", {})) if pipeline_parts else {}

    write_folder(graph_on_disk(source, ov.Core()), weights, {}, manifest, folder=folder, part=part, further=further)


def _copy(source: Path, names: Iterable[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def denoiser_bytes(folder: Path) -> int:
    """Size of a deployed folder's files in bytes, without the other parts of its pipeline."""
    files = (path for path in folder.rglob("*") if path.is_file())
    beside = _folders_beside_the_denoiser()
    return sum(path.stat().st_size for path in files if path.relative_to(folder).parts[0] not in beside)


def _folders_beside_the_denoiser() -> set[str]:
    """Names of the folders that hold pipeline parts and tokenizers."""
    return {*OTHER_FOLDERS, *map(tokenizer_of, TEXT_ENCODERS)}


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, and move it into place when the context ends without an error.

    Until then an older deployed folder stays as it is.

    Raises:
        ExportError: the place holds something other than a deployed folder.
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
    """Raise ExportError if a deployed folder must not be written here, because the place holds something else."""
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(
            f"{folder}: got something that is no deployed folder; allowed a place that is absent or empty, or a folder "
            f"with a {MANIFEST}, which is replaced"
        )


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 digest of every file, by path inside the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in paths
    }
