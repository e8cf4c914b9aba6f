"""Everything that diffusers' pipelines and their users ask of a denoiser besides calling it.

That is a device, a dtype and a config, and many requests that a compiled graph must refuse. diffusers and torch are
used only where they are already imported or installed.

Not here: the call (diffusers_calls.py) and the computation (runtime.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import numpy as np

from pqcad_qat.errors import ModelError

DEFAULT_NONE = (
    "time_cond_proj_dim",
    "encoder_hid_dim_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "class_embed_type",
)
"""Keys that pipelines read from every UNet's config. Most configs have None there, so a config without the key answers
None too.
"""


class ModelMixin:
    """Base class of a loadable pipeline part.

    diffusers looks for a base class of this name in the module that model_index.json names.
    """


class NoLayersError(ModelError, AttributeError):
    """A deployed model is asked for something that only a network of layers has.

    It is an AttributeError too, so that `hasattr` takes it for a missing attribute.
    """


class UNetConfig(dict[str, Any]):
    """A denoiser's config.json whose keys can also be read as attributes, as diffusers' pipelines read them."""

    def __getattr__(self, key: str) -> Any:
        if key in self or key in DEFAULT_NONE:
            return self.get(key)
        raise AttributeError(f"the UNet's config has no {key!r}")


class StandIn(ModelMixin):
    """A compiled denoiser that pipelines and users can treat like one of diffusers' models.

    If diffusers is imported before an object is made, the object is an instance of diffusers' ModelMixin too. Checks of
    its type then succeed: ``Pipeline.from_pretrained(source, unet=model)`` accepts it, and a pipeline's `to` reaches
    it. It has no layers, weights or gradients.

    Attributes:
        folder: folder that it was loaded from.
        config: the denoiser's config.json, by key or attribute.
        training: always False, because it only predicts.
    """

    folder: Path
    config: UNetConfig
    training = False

    def __new__(cls, *_arguments: Any, **_named: Any) -> Self:
        mixin = _mixin_of_diffusers()
        return super().__new__(
            cls if mixin is None or issubclass(cls, mixin) else _known_to_diffusers(cast(Any, cls), mixin)
        )

    def __init__(self) -> None:
        super().__init__()
        self.training = False  # torch's Module sets it to True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def __getattr__(self, name: str) -> Any:
        """Raise NoLayersError for every other attribute."""
        raise NoLayersError(
            f"{self.__dict__.get('folder', 'a deployed model')}: got a request for {name!r}; allowed what one compiled "
            "graph has: there are no layers that weights, processors or adapters could be read from or put into; what "
            "changes the model (LoRA, IP-Adapter, FreeU) is done to the model that it was made from, before it is "
            "quantized"
        )

    @property
    def dtype(self) -> Any:
        """float32, as a torch dtype where torch is installed, else as a numpy dtype."""
        if find_spec("torch") is None:
            return np.dtype(np.float32)
        import torch

        return torch.float32

    @property
    def device(self) -> Any:
        """Device on which inputs are expected: host memory."""
        if find_spec("torch") is None:
            return "cpu"
        import torch

        return torch.device("cpu")

    @property
    def add_embedding(self) -> Any:
        """SDXL's embedding of sizes and pooled text, as far as pipelines look at it: its input width."""
        if (width := self.config.get("projection_class_embeddings_input_dim")) is None:
            return self.__getattr__("add_embedding")
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @property
    def compiled_for(self) -> str:
        """OpenVINO's name of the device that computes."""
        raise NotImplementedError

    def to(self, *places: Any, device: Any = None, dtype: Any = None, **_how: Any) -> Self:
        """Return itself if the move changes nothing: samples stay in host memory and in float32.

        Raises:
            ModelError: another device or dtype is asked for, which the compiled graph cannot take.
        """
        for place in (*places, device, dtype):
            if (
                place is not None
                and not isinstance(place, bool)
                and str(place).removeprefix("torch.") not in ("cpu", "float32")
            ):
                raise ModelError(
                    f"{self.folder}: to: got {place}; allowed cpu and float32: it runs on {self.compiled_for} from cpu "
                    "memory, with samples in float32; another device that OpenVINO has is chosen at "
                    "from_pretrained(FOLDER, device=...)"
                )
        return self

    def cpu(self) -> Self:
        """Return itself."""
        return self

    def float(self) -> Self:
        """Return itself."""
        return self

    def half(self) -> Self:
        """Raise ModelError, as `to` does."""
        return self.to("float16")

    def bfloat16(self) -> Self:
        """Raise ModelError, as `to` does."""
        return self.to("bfloat16")

    def double(self) -> Self:
        """Raise ModelError, as `to` does."""
        return self.to("float64")

    def cuda(self, device: Any = None) -> Self:
        """Raise ModelError, as `to` does."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def eval(self) -> Self:
        """Return itself: it is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Return itself if `mode` is False.

        Raises:
            ModelError: training is asked for.
        """
        return self.requires_grad_(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return itself if `requires_grad` is False.

        Raises:
            ModelError: gradients are asked for.
        """
        if requires_grad:
            raise ModelError(
                f"{self.folder}: requires_grad: got True; allowed False: a deployed model has no gradients; "
                "train the quantized student instead"
            )
        return self

    def cache_context(self, _name: str) -> AbstractContextManager[None]:
        """The context that pipelines open around a pass of guidance; nothing is cached here."""
        return nullcontext()

    def parameters(self, _recurse: bool = True) -> Iterator[Any]:
        """An empty iterator: there are no parameters."""
        return iter(())

    def state_dict(self, *_places: Any, **_how: Any) -> Mapping[str, Any]:
        """Raise ModelError: the weights are constants of a graph."""
        raise ModelError(
            f"{self.folder}: got a request for a state dict; allowed save_pretrained(FOLDER), which writes the folder: "
            "the weights are constants of a graph"
        )

    def load_state_dict(self, *_places: Any, **_how: Any) -> None:
        """Raise ModelError, as `state_dict` does."""
        self.state_dict()


def _mixin_of_diffusers() -> type | None:
    """diffusers' base class of models, if diffusers is imported and works; otherwise None."""
    library, torch = (sys.modules.get(name) for name in ("diffusers", "torch"))
    if library is None or torch is None:
        return None
    try:
        mixin = library.ModelMixin
    except (AttributeError, ImportError, RuntimeError):  # the import is still running, or it fails
        return None
    return mixin if isinstance(mixin, type) and issubclass(mixin, torch.nn.Module) else None


@cache
def _known_to_diffusers(ours: type, theirs: type) -> type:
    """A class that inherits from both, under the name of ours."""
    return type(
        ours.__name__,
        (ours, theirs),
        {"__module__": ours.__module__, "__doc__": ours.__doc__, "__qualname__": ours.__qualname__},
    )
