"""Prompts that are longer than a pipeline's tokenizers allow, and the words that no encoder reads.

Not here: encoding prompts (prompts.py). This file needs the library transformers; it reads tokenizers and no weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import shown
from pqcad_qat.models.model_folder import TOKENIZERS, part_class, read_index
from pqcad_qat.models.pipeline_parts import check_tokenizer

MOST_NAMED = 5
"""Largest number of cut prompts that are named one by one."""

LENGTH = "max_sequence_length"
"""Argument of `encode_prompt` that sets the number of T5 tokens, in pipelines that have T5."""


def cut_prompts(lines: Sequence[tuple[int, str]], prompts: Path, folder: Path, tokens: int | None) -> tuple[str, ...]:
    """Return a sentence for each prompt that is cut, with its line, the tokenizer, and the words left out.

    Args:
        lines: pairs (line number, prompt) of the file.
        prompts: path of the file, for the sentences.
        folder: a local pipeline's folder.
        tokens: number of tokens that T5's prompts are cut to; None for the default of the pipeline's `encode_prompt`.

    Raises:
        ModelError: a tokenizer cannot be read.
    """
    index = read_index(folder)
    sentences = []
    for part in TOKENIZERS:
        if (name := part_class(index, part)) is None or not (folder / part).is_dir():
            continue
        tokenizer = _tokenizer(folder / part)
        most = (
            _most_tokens(str(index.get("_class_name")), tokens)
            if name.startswith("T5")
            else int(tokenizer.model_max_length)
        )
        for line, prompt in lines:
            if cut := _cut(tokenizer, prompt, most):
                sentences.append(
                    f"conditions.prompts: {prompts}:{line}: {part} takes {most} tokens; not read: {shown(cut)}"
                )
    more = len(sentences) - MOST_NAMED
    rest = [f"conditions.prompts: {prompts}: {more} more prompts are cut"] if more > 0 else []
    return (*sentences[:MOST_NAMED], *rest)


def _most_tokens(pipeline: str, tokens: int | None) -> int:
    """Return the largest number of tokens that T5 reads."""
    if tokens is not None:
        return tokens
    return int(inspect.signature(getattr(diffusers, pipeline).encode_prompt).parameters[LENGTH].default)


def _cut(tokenizer: Any, prompt: str, most: int) -> str:
    """Return the part of a prompt beyond its first `most` tokens.

    The last token kept is the end token, which diffusers puts there.
    """
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    return str(tokenizer.decode(ids[most - 1 : -1])).strip() if len(ids) > most else ""


def _tokenizer(folder: Path) -> Any:
    check_tokenizer(folder)
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds of exceptions on a damaged folder
        raise ModelError(
            f"{folder}: got a tokenizer that cannot be loaded ({shown(str(error))}); allowed one that transformers can "
            "load"
        ) from error
