"""The command `features`: train a feature network on a labelled data set, and store its reference statistics.

Not here: how it is trained (quality/feature_training.py).
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pqcad_qat.data.images import load_images
from pqcad_qat.machine.progress import progress_bar
from pqcad_qat.quality.feature_training import RECIPES, FeatureRecipe, make_features


def features(out: Path, data: str, path: str | None, size: int, *, console: Console) -> Path:
    """Train the feature network of a data set and write it; return its folder.

    Raises:
        PqcadError: the data do not exist or have no labels.
    """
    train = load_images(data, path, size)
    test = load_images(data, path, size, split="test") if data == "fashion-mnist" else None
    with progress_bar(console) as bar:
        task = bar.add_task("features", total=None, note="")

        def tell(step: int, steps: int, loss: float) -> None:
            bar.update(task, total=steps, completed=step, note=f"{loss:.3f}")

        make_features(out, train, test, RECIPES.get(data, FeatureRecipe()), progress=tell)
    return out
