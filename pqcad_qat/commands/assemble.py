"""The command `assemble`: a folder in diffusers' layout of a single file, LoRA files and textual inversions.

Not here: how it is made (models/assembly.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pqcad_qat.machine.progress import working
from pqcad_qat.models.assembly import Assembled
from pqcad_qat.models.assembly import assemble as make
from pqcad_qat.models.lora import Lora


def assemble(
    source: str, out: Path, *, config: str | None, loras: Sequence[Lora], words: Sequence[Path], console: Console
) -> Assembled:
    """Write the folder and say what it holds.

    Raises:
        PqcadError: as of `models.assembly.assemble`.
    """
    with working(console, f"assembling {out}"):
        return make(source, out, config=config, loras=loras, words=words)
