"""Tokenizers as OpenVINO graphs, which OpenVINO GenAI reads prompts with.

Not here: the tokenizers' own files (part_export.py). Needs openvino-tokenizers, without which a folder has no such
graphs and everything but GenAI opens it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import openvino as ov

from pqcad_qat.errors import ExportError
from pqcad_qat.models.module_preparation import one_line

GENAI_TOKENIZER = "openvino_tokenizer.xml"
"""Name of the graph's file in a tokenizer's folder."""

MISSING = (
    "openvino-tokenizers is not installed, so OpenVINO GenAI cannot open the deployed folder; everything else can. "
    "pip install 'pqcad-qat[text]' brings it; `export` writes the folder again, and nothing is trained for it"
)
"""Warning where the graphs cannot be made."""


def has_openvino_tokenizers() -> bool:
    """Whether the library that makes the graphs is installed."""
    return find_spec("openvino_tokenizers") is not None


def write_genai_tokenizer(folder: Path, tokens: int) -> None:
    """Write a tokenizer's graph beside its files: texts -> ids of at most `tokens` tokens, and their mask.

    Nothing is written where openvino-tokenizers is not installed.

    Raises:
        ExportError: the tokenizer cannot be converted.
    """
    if not has_openvino_tokenizers():
        return
    try:
        from openvino_tokenizers import convert_tokenizer
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        graph = convert_tokenizer(tokenizer, truncation=True, max_length=tokens)
        ov.save_model(graph, folder / GENAI_TOKENIZER)
    except Exception as error:  # the libraries raise many kinds
        raise ExportError(
            f"{folder.name}: its conversion for OpenVINO GenAI: got {one_line(error)}; "
            "allowed a tokenizer that openvino-tokenizers can convert, or pipeline.text_encoder: none"
        ) from error
