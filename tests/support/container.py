"""A check of the Dockerfile in pqcad_qat/serving/README.md: its steps, in an empty environment in place of an image.

Each instruction is read as Docker reads it, for the forms that the page has: FROM makes an environment of this Python,
COPY takes files from a build context, RUN and CMD run where that environment comes first. USER is not taken.
`tox -e check,serving` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from serving import FOLDER, PAGE, page_script

REPOSITORY = PAGE.parents[2]
SAVED = "images.npy"
"""File into which the page's script is made to write its images."""


def instructions() -> list[tuple[str, str]]:
    """The file's instructions: their names, and what follows them."""
    text = PAGE.read_text(encoding="utf-8").split("<!-- container -->\n```dockerfile\n")[1].split("```")[0]
    found = [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines())]
    assert {word for word, _ in found} <= {"FROM", "WORKDIR", "ENV", "RUN", "COPY", "USER", "CMD"}
    assert found[0][0] == "FROM"
    assert found[-1][0] == "CMD"
    return found


def context(folder: Path, served: Path) -> None:
    """Lay out what a build begins from: the repository's files, a deployed folder, and a program."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("pqcad_qat", "policies"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copytree(served / "int8", folder / FOLDER)
    saving = f"{page_script('serve')}np.save({SAVED!r}, images)\n"
    (folder / "serve.py").write_text(saving, encoding="utf-8")


def copied(rest: str, build: Path, app: Path) -> None:
    """Take a COPY: a folder's contents go into its target, files into a target that ends with a stroke or a point."""
    *sources, target = rest.split()
    for source in sources:
        if (build / source).is_dir():
            shutil.copytree(build / source, app / target, dirs_exist_ok=True)
        else:
            assert target.endswith(("/", "."))
            (app / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(build / source, app / target)


def main(served: Path) -> None:
    """Build and run.

    Raises:
        AssertionError: the images differ from those of the full environment, or more is installed than the page says.
    """
    with tempfile.TemporaryDirectory() as temporary:
        build, app, image = (Path(temporary) / name for name in ("build", "app", "image"))
        build.mkdir()
        context(build, served)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        scripts = image / ("Scripts" if os.name == "nt" else "bin")
        environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
        for word, rest in instructions():
            if word == "FROM":
                venv.create(image, with_pip=True)
            elif word == "WORKDIR":
                app.mkdir()
            elif word == "ENV":
                environment |= dict([rest.split("=", 1)])
            elif word == "COPY":
                copied(rest, build, app)
            elif word == "RUN":
                subprocess.run(rest, shell=True, cwd=app, env=environment, check=True)
            elif word == "CMD":
                shutil.rmtree(build)
                command = [str(scripts / json.loads(rest)[0]), *json.loads(rest)[1:]]
                subprocess.run(command, cwd=app, env=environment, check=True)
        images, expected = np.load(app / SAVED), np.load(served / "int8.npy")
        listed = subprocess.check_output([scripts / "pip", "list", "--format=json"], env=environment, text=True)
    off = int(np.abs(images.astype(int) - expected[: len(images)].astype(int)).max())
    installed = sorted({entry["name"].lower() for entry in json.loads(listed)} - {"pip", "setuptools"})
    print(f"container: {len(images)} images, largest difference {off} of 255; installed: {', '.join(installed)}")
    assert off <= 1
    assert not {"torch", "diffusers", "brevitas", "nncf"} & set(installed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
