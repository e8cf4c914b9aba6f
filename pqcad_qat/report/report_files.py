"""The report that a run writes: report.json (also read back here), report.csv, samples.png and report.html.

Not here: the definition of the data (record.py), the pictures (figures.py), the page's contents (page.py), or any
measurement.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.files import write_file
from pqcad_qat.report.page import render_page
from pqcad_qat.report.record import SCHEMA_VERSION, Curves, Report, VariantRow
from pqcad_qat.report.sample_sheets import sheet

REPORT_FILE = "report.json"
TABLE_FILE = "report.csv"
PAGE_FILE = "report.html"
SAMPLES_FILE = "samples.png"

_REPORT = TypeAdapter(Report)
_CURVES = TypeAdapter(Curves)


def write_report(folder: Path, report: Report, curves: Curves, samples: Mapping[str, np.ndarray]) -> None:
    """Write report.json, report.csv, samples.png and report.html into ``folder``, each completely or not at all.

    ``samples`` maps each variant to images (K, C, H, W) in [-1, 1], C 1 or 3, from the same K seeds for every variant.

    Raises:
        ModelError: the images have another form, or a number that must be known is not finite.
    """
    seen, seen_curves = save_record(folder, report, curves)
    write_file(folder / TABLE_FILE, table(seen).encode())
    if samples:
        write_file(folder / SAMPLES_FILE, sheet(samples))
    write_file(folder / PAGE_FILE, render_page(seen, seen_curves, samples).encode())


def to_json(report: Report, curves: Curves | None = None) -> dict[str, Any]:
    """Content of report.json as plain JSON values; every non-finite number becomes null and is listed in
    ``warnings``.
    """
    document = {"schema_version": report.schema_version} | _dump(_REPORT, report)
    if curves is not None:
        document["curves"] = _dump(_CURVES, curves)
    faults: list[str] = []
    document = {key: _finite(value, key, faults) for key, value in document.items()}
    if faults:
        shown = ", ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else "")
        document["warnings"].append(f"not finite, recorded as unknown (null): {shown}")
    return document


def table(report: Report) -> str:
    """Content of report.csv: a line for each variant under the names of report.json; what is not known is empty."""
    text = StringIO(newline="")
    names = [field.name for field in fields(VariantRow)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in report.variants)
    return text.getvalue()


def from_json(document: Mapping[str, Any], where: str = REPORT_FILE) -> tuple[Report, Curves]:
    """Inverse of to_json.

    Raises:
        ModelError: the document is invalid; the message names the key, the rule and the value.
    """
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ModelError(
            f"{where}: schema_version: got {version!r}; allowed {SCHEMA_VERSION}, which this version of pqcad-qat reads"
        )
    try:
        return _REPORT.validate_python(document), _CURVES.validate_python(document.get("curves", {}))
    except ValidationError as error:
        faults = [
            f"{where}: {'.'.join(map(str, fault['loc']))}: got {_short(fault['input'])}; "
            f"allowed a value that fits: {fault['msg']}"
            for fault in error.errors()
        ]
        raise ModelError("\n".join(faults)) from None


def save_record(folder: Path, report: Report, curves: Curves | None = None) -> tuple[Report, Curves]:
    """Write report.json completely or not at all; return what a reader of the file gets."""
    document = to_json(report, curves)
    seen = from_json(document)
    write_file(folder / REPORT_FILE, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False).encode())
    return seen


def read_report(folder: Path) -> Report:
    """Read the Report of a run's folder.

    Raises:
        ModelError: the report is missing, damaged, or of another schema_version.
    """
    return read_record(folder)[0]


def read_record(folder: Path) -> tuple[Report, Curves]:
    """Read the Report and the training curves of a run's folder; raises the same errors as read_report."""
    path = folder / REPORT_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ModelError(f"{path}: got no such file; allowed the folder of a finished run, which holds it") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: got a file that cannot be read as JSON: {error}; allowed a run's report") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path}: got a JSON {type(document).__name__}; allowed an object, a run's report")
    return from_json(document, str(path))


def _dump(adapter: TypeAdapter[Any], value: object) -> dict[str, Any]:
    dumped: dict[str, Any] = adapter.dump_python(
        value, mode="json", by_alias=True, warnings=False, fallback=lambda scalar: scalar.item()
    )
    return dumped


def _finite(value: Any, path: str, faults: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item, f"{path}.{key}", faults) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{path}.{index}", faults) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        faults.append(f"{path} ({value})")
        return None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
