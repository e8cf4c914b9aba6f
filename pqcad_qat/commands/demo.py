"""The command `demo`: a page on this machine that makes pictures with a deployed folder, for showing a colleague.

For a run's folder, full precision's picture from the same noise stands beside it. Not here: how pictures are made
(serving/text_to_image.py, stages/samplers.py). Needs gradio; full precision needs PyTorch, and nothing else does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError, UsageError
from pqcad_qat.sampling.precision_by_time import StepsInFloat
from pqcad_qat.serving.deployed_folder import unverified_manifest
from pqcad_qat.serving.runtime import OVUNet2DModel
from pqcad_qat.serving.text_to_image import TextToImage

if TYPE_CHECKING:
    from pqcad_qat.stages.samplers import Sampler

Picture = npt.NDArray[np.uint8]
"""A picture (H, W, 3), or several in a grid."""

MOST_STEPS = 100
"""Largest number of sampling steps that the page asks for."""

LEAST = 512
"""Width in pixels up to which pictures are enlarged."""

DEPLOYED, FULL = "deployed, INT8", "full precision"
"""What is written over the pictures."""

IMAGES, COLUMNS = 16, 4
"""Number of images from a model without prompts, and of columns of their grid."""


@dataclass(frozen=True)
class Maker:
    """What makes pictures.

    Attributes:
        make: function (prompt, seed, steps) -> picture.
        steps: number of sampling steps that it was made for.
        name: what it is.
    """

    make: Callable[[str, int, int], Picture]
    steps: int
    name: str


@dataclass(frozen=True)
class Shown:
    """What the page shows.

    Attributes:
        folder: the folder.
        deployed: the deployed model.
        full: full precision, with as many steps as its policy gives it; None where there is none.
        why_not: why there is none.
        takes_prompts: whether pictures come from a prompt.
    """

    folder: Path
    deployed: Maker
    full: Maker | None
    why_not: str
    takes_prompts: bool


def demo(folder: Path, *, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Open a folder and show the page until the program is ended.

    Raises:
        UsageError: gradio is not installed, or the port is taken.
        ModelError: the folder is no deployed folder, or is damaged.
    """
    if find_spec("gradio") is None:
        raise UsageError("demo: got no gradio to show the page; allowed once it is installed: pip install '.[demo]'")
    shown = open_shown(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: it would report to its maker
    page = build_page(shown)
    if shown.full is None:
        tell(f"note: {shown.why_not}")
    tell(f"http://{host}:{port} (Ctrl-C ends it)")
    try:
        page.launch(server_name=host, server_port=port, share=False, quiet=True, show_error=True)
    except OSError as error:
        raise UsageError(f"--port: got {port}, which cannot be opened: {error}; allowed a free one") from error


def open_shown(folder: Path) -> Shown:
    """Open a run or a deployed folder.

    Raises:
        ModelError: the folder is neither, or is damaged.
    """
    inside = folder / "openvino"
    deployed = inside if inside.is_dir() else folder
    manifest = unverified_manifest(deployed)
    return _of_prompts(folder, deployed) if "text_encoder" in manifest.get("parts", {}) else _of_noise(folder)


def _of_prompts(folder: Path, deployed: Path) -> Shown:
    pipeline = TextToImage.from_pretrained(deployed)

    def full_precision(source: str, steps: int) -> Maker:
        beside = cast(Any, FullPrecision(pipeline.denoiser, source))
        return _prompted(replace(pipeline, denoiser=beside), steps, FULL)

    full, why_not = _beside(folder, full_precision)
    return Shown(folder, _prompted(pipeline, pipeline.steps, DEPLOYED), full, why_not, takes_prompts=True)


def _prompted(pipeline: TextToImage, steps: int, name: str) -> Maker:
    def make(prompt: str, seed: int, taken: int) -> Picture:
        return _enlarged(pipeline(prompt, steps=taken, seed=seed)[0].transpose(1, 2, 0))

    return Maker(make, steps, name)


def _of_noise(folder: Path) -> Shown:
    from pqcad_qat.commands.open_folder import opened_folder  # needs PyTorch

    ours = opened_folder(str(folder), None, None, None)

    def full_precision(source: str, steps: int) -> Maker:
        return _sampled(source, opened_folder(source, steps, None, None), FULL)

    full, why_not = _beside(folder, full_precision)
    return Shown(folder, _sampled(str(folder), ours, DEPLOYED), full, why_not, takes_prompts=False)


def _sampled(source: str, opened: Sampler, name: str) -> Maker:
    from pqcad_qat.commands.open_folder import opened_folder
    from pqcad_qat.stages.samplers import sample_images

    samplers = {opened.steps: opened}

    def make(_: str, seed: int, taken: int) -> Picture:
        if taken not in samplers:
            samplers[taken] = opened_folder(source, taken, None, None)
        return _grid(sample_images(samplers[taken], IMAGES, seed, IMAGES).numpy())

    return Maker(make, opened.steps, name)


def _grid(pictures: npt.NDArray[np.uint8]) -> Picture:
    """Pictures (N, C, H, W) side by side, (H', W', 3)."""
    count, channels, height, width = pictures.shape
    rows = count // COLUMNS
    joined = pictures.reshape(rows, COLUMNS, channels, height, width).transpose(0, 3, 1, 4, 2)
    return _enlarged(np.repeat(joined.reshape(rows * height, COLUMNS * width, channels), 3 // channels, -1))


def _enlarged(picture: Picture) -> Picture:
    """The picture, each pixel repeated where it has few."""
    factor = max(1, LEAST // picture.shape[1])
    return np.ascontiguousarray(picture.repeat(factor, 0).repeat(factor, 1))


class FullPrecision:
    """The full-precision denoiser in the place of a deployed one, which answers everything but predictions."""

    def __init__(self, deployed: OVUNet2DModel, source: str) -> None:
        from pqcad_qat.models.model_loading import load_model
        from pqcad_qat.sampling.trajectory import noise_schedule
        from pqcad_qat.stages.samplers import pytorch_variant

        model = load_model(source)
        schedule = noise_schedule(deployed.scheduler_config)
        variant = pytorch_variant("full", model.denoiser, schedule, 1, sample_shape=model.sample_shape)
        self._deployed, self._predict = deployed, variant.predict
        self.in_float = StepsInFloat()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._deployed, name)

    def predict(self, sample: Any, timestep: float, condition: Any = None, *, in_float: Any = None) -> Any:
        """Predict as `OVUNet2DModel.predict`, all of it in full precision."""
        return self._predict(sample, timestep, condition or {})


def _beside(folder: Path, make: Callable[[str, int], Maker]) -> tuple[Maker | None, str]:
    """What `make` makes of the source and the steps of a run's full-precision model; or None, and why there is none."""
    if not (folder / "policy.yaml").is_file():
        return None, "Full precision is not shown: this is no run's folder, so its model is not known."
    if find_spec("torch") is None:
        return None, "Full precision is not shown: PyTorch is not installed."
    from pqcad_qat.policy.loading import load_policy

    policy = load_policy(folder / "policy.yaml")
    try:
        return make(policy.model.source, policy.sampler.steps), ""
    except ModelError as error:
        return None, f"Full precision is not shown: {error}."


def build_page(shown: Shown) -> Any:
    """Return the page, a gradio Blocks."""
    import gradio

    def make(prompt: str, seed: float, steps: float) -> tuple[Picture, Picture | None, str]:
        if not 0 <= int(seed) < 2**32:
            raise gradio.Error(f"seed: got {seed:g}; allowed 0 to {2**32 - 1}")
        made, told = list[Picture](), list[str]()
        asked = [(shown.deployed, int(steps))] + ([(shown.full, shown.full.steps)] if shown.full else [])
        for maker, taken in asked:
            start = time.perf_counter()
            try:
                made.append(maker.make(prompt, int(seed), taken))
            except ModelError as error:
                raise gradio.Error(str(error)) from error
            told.append(f"{maker.name}: {1e3 * (time.perf_counter() - start):.0f} ms, {taken} steps")
        return made[0], made[1] if shown.full else None, "; ".join(told)

    place = shown.folder.resolve()
    name = place.parent.name if place.name == "openvino" else place.name
    with gradio.Blocks(title=f"{name}: demo", analytics_enabled=False) as page:
        gradio.Markdown(f"# {name}\n\n{shown.why_not or 'Both pictures begin from the same noise.'}")
        with gradio.Row():
            prompt = gradio.Textbox("a lighthouse at dusk", label="Prompt", visible=shown.takes_prompts, scale=3)
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            steps = gradio.Slider(1, MOST_STEPS, shown.deployed.steps, step=1, label="Sampling steps")
        button = gradio.Button("Make", variant="primary")
        told = gradio.Markdown()
        with gradio.Row():
            look = {"format": "png", "height": LEAST + 40, "buttons": ["download", "fullscreen"]}
            ours = gradio.Image(label=shown.deployed.name, **look)
            theirs = gradio.Image(label=FULL, visible=shown.full is not None, **look)
        button.click(make, [prompt, seed, steps], [ours, theirs, told])
        prompt.submit(make, [prompt, seed, steps], [ours, theirs, told])
    return page
