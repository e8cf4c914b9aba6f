"""Pipeline folders in diffusers' layout, whether local, embedded or from the hub: the index, and where denoiser and
scheduler are.

Not here: weights (weight_files.py), the values of a config (config_values.py), or the parts beside the denoiser
(pipeline_parts.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.models.families.family import DENOISER_FOLDERS, TEXT_ENCODERS
from pqcad_qat.models.families.table import FORMER_CLASS, OF_PICTURES
from pqcad_qat.models.weight_files import FILE_VARIANTS, SAFETENSORS, has_weights
from pqcad_qat.policy.evaluation import EMBEDDED

INDEX = "model_index.json"
CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}{SAFETENSORS}"
SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"
"""Names of files in a pipeline's folder: index, config, weights without and with their ending, and the scheduler's
config.
"""

DECODERS = ("vae", "vqvae")
"""Pipeline parts that decode latents into images."""

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""Tokenizers of a pipeline, in the order of its text encoders."""

UNREAD = ("safety_checker", "feature_extractor")
"""Pipeline parts that read images and give the denoiser nothing."""

SINGLE_FILES = (SAFETENSORS, ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""File name endings of checkpoints in a single file, which are no sources (assembly.py makes folders of them)."""

NO_CONFIG = "a denoiser's config in unet/config.json, transformer/config.json or config.json"
LAYOUT = "a folder in diffusers' layout, with unet/config.json and scheduler/"
"""What messages allow in place of a folder without a denoiser's config, and of one without a scheduler's."""

SHARD = "-" + "-of-".join(["[0-9]" * 5] * 2)
"""Glob pattern in the file name of one shard of the weights, such as model-00001-of-00002.safetensors."""

CONFIGS = (
    INDEX,
    CONFIG,
    f"*/{CONFIG}",
    "scheduler/*.json",
    "scheduler_config.json",
    "tokenizer*/tokenizer_config.json",
)
"""Files that a plan downloads from a hub repository."""

WEIGHTS_AND_CONFIGS = (
    INDEX,
    CONFIG,
    "scheduler/*.json",
    "scheduler_config.json",
    *(f"{part}/{CONFIG}" for part in (*DENOISER_FOLDERS, *DECODERS, "text_encoder*")),
    *(
        f"{weights}{kind}"
        for weights in (STEM, *(f"{part}/{STEM}" for part in (*DENOISER_FOLDERS, *DECODERS)), "text_encoder*/model")
        for kind in (SAFETENSORS, f"{SAFETENSORS}.index.json", f"{SHARD}{SAFETENSORS}")
    ),
    *(f"tokenizer*/*.{kind}" for kind in ("json", "txt", "model")),
)
"""Files that a run downloads from a hub repository: a whole pipeline, without other formats and precisions of its
weights (model.fp16.safetensors).
"""


ARCHITECTURE = (*CONFIGS, *(f"tokenizer*/*.{kind}" for kind in ("json", "txt", "model")), "feature_extractor/*.json")
"""Files of a hub repository that go with weights from elsewhere."""


def local(source: str) -> Path | None:
    """Return the local path that a source names; None where no such path exists."""
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    # The name may be invalid as a path, its folder unreadable, or its home folder that of an unknown user.
    except (OSError, RuntimeError, ValueError):
        return None


@contextmanager
def embedded_folder(source: str) -> Iterator[Path]:
    """Give the path of the folder in diffusers' layout that `embedded:NAME` stands for.

    Raises:
        ModelError: no embedded model has this name.
    """
    name = source.removeprefix(EMBEDDED)
    if source not in embedded_models():
        raise ModelError(
            f"model.source: got {shown(source)}; allowed {', '.join(embedded_models())}, a diffusers "
            "folder, or a hub id"
        )
    with as_file(files("pqcad_qat.assets") / name) as folder:
        yield folder


def embedded_models() -> list[str]:
    """Return the sources that `load_model` takes without network access or local files."""
    assets = files("pqcad_qat.assets")
    return sorted(EMBEDDED + entry.name for entry in assets.iterdir() if entry.joinpath(INDEX).is_file())


def downloaded(source: str, patterns: Sequence[str]) -> Path:
    """Download the files of a hub repository that match the patterns, and return its folder. No downloaded code is run.

    Raises:
        ModelError: the hub cannot be reached, or has no repository of this name.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises OSError and HTTP errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
        raise ModelError(
            f"model.source: got {shown(source)}, which is no folder and cannot be loaded from the hub ({reason}); "
            "allowed a folder in diffusers' layout, or a hub id"
        ) from error


def downloaded_pipeline(source: str) -> Path:
    """Download all files of a hub repository that a run reads, and return its folder.

    A second download fetches weights of another precision for the parts that have no others.

    Raises:
        ModelError: as for `downloaded`.
    """
    folder = downloaded(source, WEIGHTS_AND_CONFIGS)
    stems = {"": STEM, **dict.fromkeys((*DENOISER_FOLDERS, *DECODERS), STEM), **dict.fromkeys(TEXT_ENCODERS, "model")}
    # The first download takes configs and weights with plain names. A part with a config but no weights may have
    # files of another precision only.
    lacking = [
        f"{part}/{stem}".lstrip("/")
        for part, stem in stems.items()
        if (folder / part / CONFIG).is_file() and not has_weights(folder / part, stem)
    ]
    kinds = [
        kind
        for variant in FILE_VARIANTS
        for kind in (
            f".{variant}{SAFETENSORS}",
            f"{SAFETENSORS}.index.{variant}.json",
            f".{variant}{SHARD}{SAFETENSORS}",
            f"{SHARD}.{variant}{SAFETENSORS}",
        )
    ]
    return downloaded(source, [f"{stem}{kind}" for stem in lacking for kind in kinds]) if lacking else folder


def denoiser_folder(folder: Path) -> Path:
    """Return the folder of a pipeline's denoiser: unet/, transformer/, or the pipeline's folder itself where all files
    lie at its top.

    Where none of them holds a config, the result is unet/.

    Raises:
        ModelError: both folders exist, and the index does not name exactly one of them.
    """
    present = [part for part in DENOISER_FOLDERS if (folder / part / CONFIG).is_file()]
    if len(present) > 1:
        index = read_index(folder)
        listed = [part for part in present if part_class(index, part) is not None]
        if len(listed) != 1:
            raise ModelError(
                f"{folder / INDEX}: got {' and '.join(present)} in its folder; allowed one of them, which it names"
            )
        present = listed
    if not present and (folder / CONFIG).is_file():
        return folder
    return folder / (present or DENOISER_FOLDERS)[0]


def scheduler_file(folder: Path) -> Path:
    """Return the path of the scheduler's config, or the path where it belongs if there is none."""
    return next(
        (path for path in (folder / SCHEDULER_CONFIG, folder / SCHEDULER_CONFIG.name) if path.is_file()),
        folder / SCHEDULER_CONFIG,
    )


def check_no_single_file(path: Path) -> None:
    """Raise ModelError for a checkpoint in a single file, or for a folder that holds only such files."""
    if path.is_file() and path.suffix in SINGLE_FILES:
        single = [path]
    elif path.is_dir() and not (denoiser_folder(path) / CONFIG).is_file():
        single = sorted(file for file in path.iterdir() if file.suffix in SINGLE_FILES and file.is_file())
    else:
        return
    if single:
        raise ModelError(
            f"{single[0]}: got a checkpoint in a single file; allowed a folder in diffusers' layout, "
            "which `assemble FILE.safetensors --out FOLDER --config FOLDER` makes of one with a whole pipeline"
        )


def read_index(folder: Path) -> dict[str, Any]:
    """Read a folder's model_index.json, which maps each pipeline part to [library, class] or null; {} where there is no
    such file.

    Raises:
        ModelError: the file cannot be read, or an entry has another form.
    """
    path = folder / INDEX
    if not path.exists():
        return {}
    index = read_json(path)
    for part, entry in index.items():
        if part.startswith("_"):
            continue
        known = part in (*DENOISER_FOLDERS, *DECODERS, *TEXT_ENCODERS, *TOKENIZERS, "scheduler")
        if (known or isinstance(entry, list)) and not _names_a_class(entry):
            raise ModelError(
                f"{path}: {shown(part)[1:-1]}: got {shown(entry)}; allowed [library, class], or [null, "
                "null] where there is none"
            )
    return index


def _names_a_class(entry: Any) -> bool:
    pair = isinstance(entry, list) and len(entry) == 2
    return pair and (entry == [None, None] or all(isinstance(name, str) and name for name in entry))


def part_class(index: Mapping[str, Any], part: str) -> str | None:
    """Return the class that an index names for a part; None where it names none."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) else None


def check_index(folder: Path, index: Mapping[str, Any], denoiser: str) -> None:
    """Raise ModelError for a pipeline with unsupported parts or inputs, or with a denoiser of a class other than its
    config's.

    Args:
        folder: the pipeline's folder.
        index: content of its model_index.json.
        denoiser: class of its denoiser according to the denoiser's config.
    """
    path, pipeline = folder / INDEX, shown(index.get("_class_name"))
    named = next((name for part in DENOISER_FOLDERS if (name := part_class(index, part)) is not None), None)
    if named not in (None, denoiser, FORMER_CLASS):
        part = next(part for part in DENOISER_FOLDERS if part_class(index, part) == named)
        raise ModelError(f"{path}: {part}: got {shown(named)}; allowed {denoiser!r}, as its config says")
    taken = (*DENOISER_FOLDERS, *DECODERS, *TEXT_ENCODERS, *TOKENIZERS, *UNREAD, "scheduler")
    for part, entry in index.items():
        if not part.startswith("_") and part not in taken and isinstance(entry, list) and entry[1] is not None:
            rule = "null: what it gives the pipeline or its denoiser is no input here"
            raise ModelError(f"{path}: {shown(part)[1:-1]}: got {shown(entry[1])}; allowed {rule}")
    if OF_PICTURES.search(pipeline):
        raise ModelError(
            f"{path}: _class_name: got {pipeline}; allowed pipelines whose denoiser reads no picture "
            "beside the noisy sample"
        )
    if index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{path}: requires_aesthetics_score: got true; allowed false: SDXL's refiner, which reads "
            "that score, is not taken; its base is"
        )
