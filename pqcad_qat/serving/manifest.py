"""Rules for the manifest.json of a deployed folder, for every value that loading or running reads.

The configs in the folder must match the manifest; their rules are here too.

Not here: the files that it lists (deployed_folder.py), or the graph's ports (graph_inputs.py). Needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import read_json, shown
from pqcad_qat.models.families.family import DENOISER_FOLDERS, TEXT_ENCODERS
from pqcad_qat.models.families.table import families
from pqcad_qat.sampling.precision_by_time import are_stops

SCHEMA_VERSION = 1
"""Version of the manifest's format."""

FLOAT_GRAPH, FLOAT_WEIGHTS = "float_steps.xml", "float_steps.bin"
"""Names of the files of the full-precision graph, in the denoiser's folder; it computes the float steps."""

GRAPH, PACKED_GRAPH, WEIGHTS, CONFIG = (
    "openvino_model.xml",
    "openvino_model.xml.gz",
    "openvino_model.bin",
    "config.json",
)
"""Names of files in the denoiser's folder. Other pipeline parts use them too, except the packed graph."""

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
"""Path of the scheduler's config inside a deployed folder."""

PART_FOLDERS: Mapping[str, str] = {"vae": "vae_decoder", **{name: name for name in TEXT_ENCODERS}}
"""Folder of each pipeline part besides the denoiser, named as optimum-intel names it."""

VAE_ENCODER = "vae_encoder"
"""Folder of the second half of a VAE, whose part is in PART_FOLDERS."""

OTHER_FOLDERS: tuple[str, ...] = (*PART_FOLDERS.values(), VAE_ENCODER)
"""Folders of graphs besides the denoiser."""

FORMATS = ("int8", "packed")
"""Formats of the weights on disk."""

MANIFEST_KEYS = ("graph", "weights", "files", "sample_shape", "batch_size", "train_timesteps", "layers")
"""Keys that every manifest must have."""

LARGEST_SIDE, MOST_VALUES, MOST_TIMES = 2**16, 2**28, 10**6
"""Upper bounds: size of a dimension, values in one tensor of the graph's batch, and training steps of a schedule. They
exceed every model, and stop a damaged manifest before it hangs the process.
"""

Fits = Callable[[Any], bool]
"""Check of one value."""


def checked_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and check that each value is of the kind that its readers expect.

    Raises:
        ModelError: the file cannot be read, or a value is not allowed; the message names the key.
    """
    manifest = read_json(path)
    if not _is_whole(manifest.get("schema_version"), SCHEMA_VERSION, SCHEMA_VERSION):
        raise ModelError(
            f"{path}: schema_version: got {shown(manifest.get('schema_version'))}; allowed {SCHEMA_VERSION}"
        )
    if missing := [key for key in MANIFEST_KEYS if key not in manifest]:
        raise ModelError(f"{path}: got no {', '.join(missing)}; allowed a manifest with {', '.join(MANIFEST_KEYS)}")
    _check_entry(path, "", manifest, {key: rule for key, rule in VALUES.items() if key in manifest})
    if outside := [name for name in manifest["files"] if not _is_inside(name)]:
        raise ModelError(f"{path}: files: got {_name(outside[0])}, which lies outside the folder; allowed files inside")
    for table, rules in TABLES.items():
        for name, entry in manifest.get(table, {}).items():
            _check_entry(path, f"{table}: {_name(name)}: ", entry, rules)
    _check_conditions(path, manifest)
    packed = manifest["weights"]["format"] != "int8"
    _check(
        path,
        manifest,
        "graph",
        lambda graph: graph.endswith(".gz") == packed,
        allowed=f"{PACKED_GRAPH if packed else GRAPH} of these weights",
    )
    return manifest


def _check_conditions(path: Path, manifest: Mapping[str, Any]) -> None:
    """Check that conditions are complete and have different names, and that all tensors are of usable sizes."""
    batch, seen = manifest["batch_size"], set[str]()
    most = f"{MOST_VALUES} values in a batch of {batch}"
    _check(path, manifest, "sample_shape", lambda shape: batch * math.prod(shape) <= MOST_VALUES, allowed=most)
    for place, condition in enumerate(manifest.get("conditions", [])):
        before = f"conditions: {place}: "
        _check_entry(path, before, condition, CONDITION)
        _check(
            path, condition, "shape", lambda shape: batch * math.prod(shape) <= MOST_VALUES, allowed=most, before=before
        )
        if condition["name"] in seen:
            _refuse(path, f"{before}name", condition["name"], "every name once")
        if condition.keys() != CONDITION.keys():
            _refuse(path, before[:-2], list(condition), ", ".join(CONDITION))
        seen.add(condition["name"])


def check_listed(manifest: Mapping[str, Any], path: Path, *names: str) -> None:
    """Raise ModelError if a file that is needed is missing from the manifest's list."""
    for name in names:
        if name not in manifest["files"]:
            raise ModelError(f"{path}: files: got no {name}; allowed a list of every file that is loaded")


def check_denoiser_config(config: Mapping[str, Any], manifest: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError if the denoiser's config does not match the samples in the manifest.

    The config of a user's own module may leave these keys out.
    """
    channels = manifest["sample_shape"][0]
    _check(
        path, config, "_class_name", lambda value: isinstance(value, str), allowed="the name of the denoiser's class"
    )
    allowed = [channels, *(channels * family.channel_factor for family in families().values())]
    _check(
        path,
        config,
        "in_channels",
        lambda value: value is None or value in allowed,
        allowed=f"{channels}, as sample_shape in the manifest",
    )
    sizes = f"null, or one or two whole numbers from 1 to {LARGEST_SIDE}"
    _check(
        path,
        config,
        "sample_size",
        lambda value: value is None or _is_size(value) or _is_shape(value, (2,)),
        allowed=sizes,
    )
    width = "projection_class_embeddings_input_dim"
    _check(
        path, config, width, lambda value: value is None or _is_size(value), allowed="null, or a whole number above 0"
    )


def check_scheduler_config(config: Mapping[str, Any], manifest: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError for an invalid value that the runtime reads from the scheduler's config.

    The schedule itself is checked elsewhere (sampling/trajectory.py).
    """
    most = manifest["train_timesteps"]
    times = f"a whole number from 1 to {MOST_TIMES}"
    _check(
        path,
        config,
        "num_train_timesteps",
        lambda value: value is None or _is_whole(value, 1, MOST_TIMES),
        allowed=times,
    )
    _check(
        path,
        config,
        "num_inference_steps",
        lambda value: value is None or _is_whole(value, 1, most),
        allowed=f"1 to {most} sampling steps",
    )
    _check(
        path, config, "guidance_scale", lambda value: value is None or _is_number(value, 1.0), allowed="a number from 1"
    )
    _check(
        path,
        config,
        "embedded_guidance",
        lambda value: value is None or _is_number(value, 0.0),
        allowed="a number from 0",
    )
    _check(
        path,
        config,
        "unconditional_class",
        lambda value: value is None or _is_whole(value, 0, LARGEST_SIDE),
        allowed="a class's label",
    )
    _check(
        path,
        config,
        "_class_name",
        lambda value: value is None or isinstance(value, str),
        allowed="the name of a scheduler's class",
    )


def _check_entry(path: Path, before: str, entry: Any, rules: Mapping[str, tuple[Fits, str]]) -> None:
    """Check the values of one object by its rules."""
    if not isinstance(entry, dict):
        _refuse(path, before[:-2], entry, "an object of keys and values")
    for key, (fits, allowed) in rules.items():
        _check(path, entry, key, fits, allowed=allowed, before=before)


def _check(path: Path, config: Mapping[str, Any], key: str, fits: Fits, *, allowed: str, before: str = "") -> None:
    """Check one value, named in the message by its key."""
    if not fits(config.get(key)):
        _refuse(path, before + key, config.get(key), allowed)


def _refuse(path: Path, key: str, value: Any, allowed: str) -> NoReturn:
    raise ModelError(f"{path}: {key}: got {shown(value)}; allowed {allowed}")


def _name(text: str) -> str:
    """A name from a damaged file, in printable characters and shortened."""
    return shown(text)[1:-1]


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_size(value: Any) -> bool:
    return _is_whole(value, 1, LARGEST_SIDE)


def _is_number(value: Any, low: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < 1e9


def _is_shape(value: Any, ranks: tuple[int, ...]) -> bool:
    return isinstance(value, list) and len(value) in ranks and all(map(_is_size, value))


def _is_graph(value: Any) -> bool:
    part, _, name = value.partition("/") if isinstance(value, str) else ("", "", "")
    return part in DENOISER_FOLDERS and name in (GRAPH, PACKED_GRAPH)


def _is_inside(name: str) -> bool:
    """Whether a file's name is a plain relative path that stays inside the folder."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in name
        and str(path) == name
    )


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _optional_steps(provenance: Any) -> bool:
    """Whether the counts of sampling steps in the provenance, where there are any, are valid."""
    steps = (
        (provenance.get(key) for key in ("sampling_steps", "full_precision_steps"))
        if isinstance(provenance, dict)
        else (0,)
    )
    return all(count is None or _is_whole(count, 1, MOST_TIMES) for count in steps)


VALUES: Mapping[str, tuple[Fits, str]] = {
    "graph": (_is_graph, f"{' or '.join(DENOISER_FOLDERS)}, then {GRAPH} or {PACKED_GRAPH}"),
    "weights": (
        lambda value: _is_object(value) and value.get("format") in FORMATS,
        f"an object with format: {', '.join(FORMATS)}",
    ),
    "files": (_is_object, "an object of files"),
    "sample_shape": (
        lambda value: _is_shape(value, (3,)),
        f"three whole numbers from 1 to {LARGEST_SIDE}: channels, height, width",
    ),
    "batch_size": (_is_size, f"a whole number from 1 to {LARGEST_SIDE}"),
    "any_size": (lambda value: isinstance(value, bool), "true or false"),
    "train_timesteps": (lambda value: _is_whole(value, 1, MOST_TIMES), f"a whole number from 1 to {MOST_TIMES}"),
    "timestep_dtype": (lambda value: value in ("int64", "float32"), "int64 or float32"),
    "conditions": (lambda value: isinstance(value, list), "a list"),
    "layers": (_is_object, "an object of layers"),
    "parts": (
        lambda value: _is_object(value) and set(value) <= {*OTHER_FOLDERS},
        f"an object of {', '.join(OTHER_FOLDERS)}",
    ),
    "provenance": (
        _optional_steps,
        f"an object whose sampling_steps and full_precision_steps lie in 1 to {MOST_TIMES}",
    ),
    "attention": (_is_object, "an object of modules"),
    "float_start": (
        lambda value: value is None or _is_number(value, 0.0),
        "null, or a time from 0, from which on full precision computes",
    ),
    "float_stops": (
        are_stops,
        "for each step that full precision takes in parts, a list of its times: three whole numbers or more, falling",
    ),
}
"""Check and description of the allowed values, by key of the manifest."""

_TEXT: tuple[Fits, str] = (lambda value: isinstance(value, str), "text")
"""Rule for a text."""

_BITS: tuple[Fits, str] = (lambda value: value is None or _is_number(value, 0), "a number")
"""Rule for an optional width in bits."""

TABLES: Mapping[str, Mapping[str, tuple[Fits, str]]] = {
    "files": {
        "bytes": (lambda value: _is_whole(value, 0, 2**63), "a whole number"),
        "sha256": (_is_digest, "64 hexadecimal digits"),
    },
    "parts": {"class": _TEXT, "format": _TEXT},
    "layers": {
        "kind": _TEXT,
        "input_group": _TEXT,
        "weight_bits": _BITS,
        "stored_bits": _BITS,
        "input_bits": _BITS,
        "needs_vnni": (lambda value: value is None or isinstance(value, bool), "true or false"),
    },
}
"""Rules for the entries of each table, by the table's key."""

CONDITION: Mapping[str, tuple[Fits, str]] = {
    "name": (
        lambda value: (
            isinstance(value, str) and value.isidentifier() and value not in ("sample", "hidden_states", "timestep")
        ),
        "a name",
    ),
    "shape": (lambda value: _is_shape(value, tuple(range(8))), f"a list of whole numbers from 1 to {LARGEST_SIDE}"),
    "dtype": (lambda value: value in ("float32", "int64"), "float32 or int64"),
    "bound": (lambda value: value is None or _is_whole(value, 1, 2**62), "null, or a whole number above 0"),
}
"""Check and description of the allowed values, by key of a condition."""
