"""What diffusers' pipelines and their users ask of a denoiser beside its call: a device, a dtype, its config, and much
that it must refuse.

Not here: the call (diffusers_calls.py) and what computes (runtime.py). diffusers and torch are looked at only where the
caller has imported them.
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
"""Keys that pipelines read of every UNet's config, None in most: so also of one that does not have them."""


class ModelMixin:
    """A part of a pipeline that can be loaded: diffusers asks the module that model_index.json names for a base class
    of this name.
    """


class NoLayersError(ModelError, AttributeError):
    """A deployed model is asked for something that only a network of layers has; to `hasattr` it is no attribute."""


class UNetConfig(dict[str, Any]):
    """A UNet's config.json, read as attributes too, the way diffusers' pipelines read it."""

    def __getattr__(self, key: str) -> Any:
        if key in self or key in DEFAULT_NONE:
            return self.get(key)
        raise AttributeError(f"the UNet's config has no {key!r}")


class StandIn(ModelMixin):
    """A compiled denoiser, as pipelines and users treat one of diffusers' own.

    Where diffusers is imported before it is made, it is one of diffusers' models to every check of a type, so that
    ``Pipeline.from_pretrained(source, unet=model)`` takes it, and a pipeline's `to` reaches it. It has no layers,
    weights or gradients.

    Attributes:
        folder: where it was loaded from.
        config: the denoiser's config.json, by key or attribute.
        training: False; it only predicts.
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
        self.training = False  # what a torch module would not begin with

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    def __getattr__(self, name: str) -> Any:
        raise NoLayersError(
            f"{self.__dict__.get('folder', 'a deployed model')}: has no {name!r}: it is one compiled "
            "graph, with no layers that weights, "
            "processors or adapters could be read from or put into; what changes the model (LoRA, "
            "IP-Adapter, FreeU) is done to the model "
            "that it was made from, before it is quantized"
        )

    @property
    def dtype(self) -> Any:
        """float32 as the caller's framework spells it: torch's where torch is installed, numpy's elsewhere."""
        if find_spec("torch") is None:
            return np.dtype(np.float32)
        import torch

        return torch.float32

    @property
    def device(self) -> Any:
        """Where inputs are expected: host memory."""
        if find_spec("torch") is None:
            return "cpu"
        import torch

        return torch.device("cpu")

    @property
    def add_embedding(self) -> Any:
        """Of SDXL, as far as its pipelines look: the width of what the sizes and the pooled text are embedded to."""
        if (width := self.config.get("projection_class_embeddings_input_dim")) is None:
            return self.__getattr__("add_embedding")
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @property
    def compiled_for(self) -> str:
        """OpenVINO's name of the device that computes."""
        raise NotImplementedError

    def to(self, *places: Any, device: Any = None, dtype: Any = None, **_how: Any) -> Self:
        """Itself, where that changes nothing: host memory and float32, in which it takes and gives samples.

        Raises:
            ModelError: another device or dtype, which the compiled graph cannot take.
        """
        for place in (*places, device, dtype):
            if (
                place is not None
                and not isinstance(place, bool)
                and str(place).removeprefix("torch.") not in ("cpu", "float32")
            ):
                raise ModelError(
                    f"{self.folder}: cannot go to {place}: it runs on {self.compiled_for} from cpu "
                    "memory, samples in float32; another "
                    "device that OpenVINO has is chosen at from_pretrained(FOLDER, device=...)"
                )
        return self

    def cpu(self) -> Self:
        """Itself."""
        return self

    def float(self) -> Self:
        """Itself."""
        return self

    def half(self) -> Self:
        """Raises ModelError, as `to`."""
        return self.to("float16")

    def bfloat16(self) -> Self:
        """Raises ModelError, as `to`."""
        return self.to("bfloat16")

    def double(self) -> Self:
        """Raises ModelError, as `to`."""
        return self.to("float64")

    def cuda(self, device: Any = None) -> Self:
        """Raises ModelError, as `to`."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def eval(self) -> Self:
        """Itself: it is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Itself.

        Raises:
            ModelError: training is asked for.
        """
        return self.requires_grad_(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Itself.

        Raises:
            ModelError: gradients are asked for.
        """
        if requires_grad:
            raise ModelError(f"{self.folder}: a deployed model has no gradients; train the quantized student instead")
        return self

    def cache_context(self, _name: str) -> AbstractContextManager[None]:
        """What pipelines put around a pass of guidance; nothing is cached here."""
        return nullcontext()

    def parameters(self, _recurse: bool = True) -> Iterator[Any]:
        """None."""
        return iter(())

    def state_dict(self, *_places: Any, **_how: Any) -> Mapping[str, Any]:
        """Raises ModelError: its weights are constants of a graph."""
        raise ModelError(
            f"{self.folder}: has no state dict: its weights are constants of a graph; save_pretrained(FOLDER) writes it"
        )

    def load_state_dict(self, *_places: Any, **_how: Any) -> None:
        """Raises ModelError, as `state_dict`."""
        self.state_dict()


def _mixin_of_diffusers() -> type | None:
    """diffusers' own base class of models, where diffusers is imported and works."""
    library, torch = (sys.modules.get(name) for name in ("diffusers", "torch"))
    if library is None or torch is None:
        return None
    try:
        found = library.ModelMixin
    except (AttributeError, ImportError, RuntimeError):  # of an import under way, or one that fails
        return None
    return found if isinstance(found, type) and issubclass(found, torch.nn.Module) else None


@cache
def _known_to_diffusers(ours: type, theirs: type) -> type:
    """A class that is both, and goes by the name of ours."""
    return type(
        ours.__name__,
        (ours, theirs),
        {"__module__": ours.__module__, "__doc__": ours.__doc__, "__qualname__": ours.__qualname__},
    )
