"""A check of the serving scripts in pqcad_qat/serving/README.md: it runs them as printed, and compares their images
with those that `served_folder` made.

It needs numpy, openvino, tokenizers and the package without its other dependencies; `tox -e check,serving` runs it in
such an environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

PAGE = Path(__file__).resolve().parents[2] / "pqcad_qat" / "serving" / "README.md"
FOLDER = "runs/w4a8/openvino"
SCRIPTS = {"plain": "int8", "serve": "packed", "prompt": "text/openvino"}
"""Mapping from a script of the page to the folder that it serves."""

ABSENT = (
    "torch",
    "diffusers",
    "transformers",
    "nncf",
    "brevitas",
    "accelerate",
    "pydantic",
    "yaml",
    "safetensors",
    "PIL",
    "sklearn",
    "rich",
    "fire",
)


def page_script(name: str) -> str:
    """Code that follows a marker of the page."""
    return PAGE.read_text(encoding="utf-8").split(f"<!-- {name} -->")[1].split("```python\n")[1].split("```")[0]


def images_of(script: str, folder: Path) -> np.ndarray:
    """Value of `images`, uint8 (B, C, H, W), after running a script on another folder."""
    assert FOLDER in script
    found: dict[str, object] = {}
    exec(script.replace(FOLDER, folder.as_posix()), found)
    images = found["images"]
    assert isinstance(images, np.ndarray)
    return images


def main(served: Path, *names: str) -> None:
    """Run the named scripts.

    Raises:
        AssertionError: the images differ from the expected ones, or a module was imported that serving must not need.
    """
    for name in names:
        expected = np.load(served / f"{SCRIPTS[name].split('/')[0]}.npy")
        images = images_of(page_script(name), served / SCRIPTS[name])
        off = np.abs(images.astype(int) - expected[: len(images)].astype(int))
        assert images.dtype == np.uint8, images.dtype
        assert len(images) >= 2, images.shape
        # one level of tolerance: the order in which a step's terms are added differs
        assert off.max() <= 1, f"{name}: off by {off.max()} of 255"
        assert name != "plain" or not any(module.startswith("pqcad_qat") for module in sys.modules)
        print(f"{name}: {len(images)} images, largest difference {off.max()} of 255")
    present = [module for module in ABSENT if sys.modules.get(module) is not None]
    assert not present, f"needed after all: {present}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
