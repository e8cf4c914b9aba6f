"""Calls of denoisers as diffusers makes them: arguments by position or name, and what a deployed graph takes of them.

No argument is ignored: what the graph does not take is refused. None and empty values are accepted, because pipelines
pass them for inputs that they do without.

Not here: what is computed (runtime.py). Needs numpy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pqcad_qat.errors import ModelError
from pqcad_qat.models.families.latent_rows import PLACES
from pqcad_qat.models.families.table import family_named

STATES, TIME, ANSWER = ("sample", "hidden_states"), "timestep", "return_dict"
"""Names of arguments: x_t (each class has one of the two names; both are understood), t, and the switch to a tuple."""

_RESIDUALS = (
    "what a ControlNet or T2I-Adapter adds is no input of this graph: such a pipeline takes the model that "
    "it was made from"
)
"""Advice on the residuals of adapters such as ControlNet."""

_MASK = "texts are exported without a mask, all their tokens count: leave it out"
"""Advice on masks of text."""

_ADAPTERS = "there are no layers that adapters could reach: merge them into the model before it is quantized"
"""Advice on adapters such as LoRA and IP-Adapter."""

ADVICE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "down_block_additional_residuals",
            "mid_block_additional_residual",
            "down_intrablock_additional_residuals",
            "block_controlnet_hidden_states",
            "controlnet_block_samples",
            "controlnet_single_block_samples",
            "controlnet_blocks_repeat",
        ),
        _RESIDUALS,
    ),
    **dict.fromkeys(("attention_mask", "encoder_attention_mask"), _MASK),
    **dict.fromkeys(("cross_attention_kwargs", "joint_attention_kwargs"), _ADAPTERS),
    "image_embeds": _ADAPTERS,
    "timestep_cond": "guidance is no input of this graph: leave it out, and give the pipeline a guidance_scale",
    "skip_layers": "the graph has all its layers: leave skip_guidance_layers out",
    "class_labels": "the model has no classes: leave them out",
}
"""Advice to the user, by argument that is refused."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a denoiser.

    Attributes:
        states: x_t, as the caller passes it.
        timestep: t, as the caller passes it.
        conditions: conditions by name, as numpy arrays.
        places: positions of the patches (img_ids), where the caller passes them to a class that takes rows.
        as_dict: False where the caller asks for a tuple.
    """

    states: Any
    timestep: Any
    conditions: Mapping[str, npt.NDArray[Any]]
    places: npt.NDArray[Any] | None
    as_dict: bool


def read_call(
    kind: str, takes: Sequence[str], positional: Sequence[Any], named: Mapping[str, Any], *, where: str
) -> Call:
    """Read a call of a denoiser by the signature of its class.

    Args:
        kind: class of the denoiser. For a class that is not diffusers', the conditions follow x_t and t.
        takes: names of the conditions that the graph takes.
        positional, named: the call's arguments.
        where: start of an error's message.

    Raises:
        ModelError: an argument is given twice, there are too many, x_t or t is missing, or the conditions are not those
            that the graph takes.
    """
    parameters = family_named(kind).parameters or (STATES[0], TIME, *takes, ANSWER)
    if len(positional) > len(parameters):
        raise ModelError(
            f"{where}: got {len(positional)} arguments by place; allowed {len(parameters)}: {', '.join(parameters)}"
        )
    arguments = dict(zip(parameters, positional, strict=False))
    if twice := [name for name in named if name in arguments]:
        raise ModelError(f"{where}: got {', '.join(twice)} by place and by name; allowed once")
    arguments |= named
    states = [arguments.pop(name) for name in STATES if arguments.get(name) is not None]
    timestep, answer = arguments.pop(TIME, None), arguments.pop(ANSWER, True)
    if len(states) != 1 or timestep is None:
        raise ModelError(
            f"{where}: got {len(states)} of {' or '.join(STATES)} and {TIME} {timestep!r}; allowed one, and a time step"
        )
    places = {name: arguments.pop(name) for name in PLACES if name in parameters and name in arguments}
    leaves = list(_leaves(arguments))
    if sorted(name for _, name, _ in leaves) != sorted(takes):
        refused = [word for holder, name, _ in leaves if name not in takes for word in (name, holder)]
        advice = "; ".join(dict.fromkeys(ADVICE[word] for word in refused if word in ADVICE))
        raise ModelError(
            f"{where}: conditions: got {', '.join(name for _, name, _ in leaves) or 'none'}; "
            f"allowed {', '.join(takes) or 'none'}{advice and f': {advice}'}"
        )
    arrays = {name: as_array(value, f"{where}: {name}") for _, name, value in leaves}
    img_ids = places.get(PLACES[0])
    return Call(
        states[0],
        timestep,
        arrays,
        None if img_ids is None else as_array(img_ids, f"{where}: {PLACES[0]}"),
        bool(answer),
    )


def _leaves(arguments: Mapping[str, Any], holder: str | None = None) -> Iterator[tuple[str, str, Any]]:
    """(argument, name, value) of everything that is not empty; dicts among the arguments are opened."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, holder or name)
        elif not _empty(value):
            yield holder or name, name, value


def _empty(value: Any) -> bool:
    """Whether a value stands for an argument that is not used."""
    return (
        value is None
        or value is False
        or (isinstance(value, Collection) and not hasattr(value, "shape") and not len(value))
    )


def as_array(value: Any, where: str) -> npt.NDArray[Any]:
    """A number, numpy array or torch tensor of numbers as a numpy array.

    Raises:
        ModelError: the value is anything else; `where` begins the message.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()  # numpy has no bfloat16
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise ModelError(
            f"{where}: got {type(value).__name__}; allowed numbers, a numpy array or a torch tensor of them"
        )
    return array
