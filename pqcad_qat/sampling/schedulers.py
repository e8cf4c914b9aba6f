"""Which scheduler classes of diffusers are taken, and their configs read key by key: what a key left out means, and
what it may be.

Not here: the noise schedules themselves (ddim.py, flow.py).

Our sampler is DDIM on the noise schedule of a class of DDPM's kin, and Euler's on that of flow matching. So a class can
be taken where its schedule is that of betas, whatever solver it is; and a class that is in neither table is refused by
name, since its model would be sampled wrongly without a word.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, get_args

from pqcad_qat.errors import ModelError
from pqcad_qat.machine.json_files import shown

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
DDIM_SCHEDULER = "DDIMScheduler"

STEPS = "num_inference_steps"
"""Key of ours in a deployed scheduler config: the sampling steps that its model was distilled for."""

MOST_TIMESTEPS = 100_000
"""Training steps of the longest schedule that is taken; an exported graph holds a table of them."""

DDIM_KEYS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
"""Every key of a DDIMScheduler, with what it means where it is left out."""

DDIM_CURVES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""beta_schedule that DDIMScheduler knows by name."""

DRAWN_BETWEEN = ("linear", "scaled_linear", "sigmoid")
"""beta_schedule that beta_start and beta_end are the ends of."""

SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True)
class Kin:
    """How a class of DDPM's kin is taken.

    Attributes:
        defaults: of keys that a config leaves out, where they are not DDIM's. Solvers never clip, so theirs say so.
        curves: what its beta_schedule may be.
        zero_snr: alpha_bar that rescale_betas_zero_snr leaves at the last time; None where the class does not know that
            key.
        switches: keys of its own that lay times which DDIM cannot lay, or that make another schedule of its betas.
        ends: whether its final_sigmas_type says where sampling ends: at the image, or at the noise of the first
            training step.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    curves: tuple[str, ...] = DDIM_CURVES
    zero_snr: float | None = None
    switches: tuple[str, ...] = ()
    ends: bool = False


_DDIM = Kin(zero_snr=0.0)
_DDPM = Kin(curves=(*DDIM_CURVES, "sigmoid", "laplace"), zero_snr=0.0)
_SOLVER: Mapping[str, Any] = {"clip_sample": False, "timestep_spacing": "linspace"}
_K_DIFFUSION: Mapping[str, Any] = {**_SOLVER, "beta_start": 0.00085, "beta_end": 0.012}
_FLOWING = (*SIGMAS, "use_flow_sigmas")
_NEARLY_ZERO = 2.0**-24

KIN: Mapping[str, Kin] = {
    DDIM_SCHEDULER: _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": Kin({"clip_sample": False, "set_alpha_to_one": False}),
    "LMSDiscreteScheduler": Kin(_SOLVER, switches=SIGMAS),
    "EulerDiscreteScheduler": Kin(_SOLVER, zero_snr=_NEARLY_ZERO, switches=SIGMAS, ends=True),
    "EulerAncestralDiscreteScheduler": Kin(_SOLVER, zero_snr=_NEARLY_ZERO),
    "HeunDiscreteScheduler": Kin(_K_DIFFUSION, (*DDIM_CURVES, "exp"), switches=SIGMAS),
    "KDPM2DiscreteScheduler": Kin(_K_DIFFUSION, switches=SIGMAS),
    "KDPM2AncestralDiscreteScheduler": Kin(_K_DIFFUSION, switches=SIGMAS),
    "DPMSolverMultistepScheduler": Kin(
        _SOLVER, zero_snr=_NEARLY_ZERO, switches=(*_FLOWING, "use_lu_lambdas"), ends=True
    ),
    "DPMSolverSinglestepScheduler": Kin(_SOLVER, switches=_FLOWING, ends=True),
    "UniPCMultistepScheduler": Kin(_SOLVER, zero_snr=_NEARLY_ZERO, switches=_FLOWING, ends=True),
    "DEISMultistepScheduler": Kin(_SOLVER, switches=_FLOWING),
    "SASolverScheduler": Kin(_SOLVER, switches=_FLOWING),
}
"""By the name of diffusers' class."""


@dataclass(frozen=True)
class Keys:
    """A scheduler config whose keys are read with their types and bounds; every fault names its file and key.

    Attributes:
        config: with every key that is read.
        where: its file.
    """

    config: Mapping[str, Any]
    where: str

    def fault(self, key: str, allowed: str) -> ModelError:
        value = self.config.get(key)
        got = "nothing" if key not in self.config else str(value).lower() if isinstance(value, bool) else shown(value)
        return ModelError(f"{self.where}: {key}: got {got}; allowed {allowed}")

    def whole(self, key: str, low: int, high: int) -> int:
        """A whole number, which JSON may hold as 1000.0."""
        value = self.config.get(key)
        if not _is_number(value) or not low <= value <= high or value != int(value):
            raise self.fault(key, f"a whole number from {low} to {high}")
        return int(value)

    def number(self, key: str, above: float = -math.inf, below: float = math.inf) -> float:
        """A finite number between two bounds, both excluded."""
        value = self.config.get(key)
        if not _is_number(value) or not above < value < below:
            bounds = [
                f"{word} {bound:g}" for word, bound in (("over", above), ("under", below)) if math.isfinite(bound)
            ]
            raise self.fault(key, " ".join(["a number", " and ".join(bounds)]).strip())
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def choice(self, key: str, allowed: Collection[str]) -> str:
        value = self.config.get(key)
        if not isinstance(value, str) or value not in allowed:
            raise self.fault(key, ", ".join(allowed))
        return value

    def off(self, keys: Collection[str]) -> None:
        """Raises where one of the keys asks for what is not here."""
        for key in keys:
            if self.config.get(key):
                raise self.fault(key, "null or false")


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number of a size that a float has."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300


def scheduler_class(config: Mapping[str, Any], where: str) -> str:
    """The class that a scheduler config names.

    Raises:
        ModelError: none, or one that is not taken.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or (name not in KIN and name != FLOW_SCHEDULER):
        raise Keys(config, where).fault(
            "_class_name", f"{', '.join(KIN)}, whose noise is that of betas, or {FLOW_SCHEDULER}"
        )
    return name


def ddim_keys(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of a class of DDPM's kin as one of DDIM's with every key, each of them checked.

    A key that the config leaves out means what it means in its own class. Its beta_schedule may still be one that DDIM
    has no name for.

    Raises:
        ModelError: a class, a key or a value that cannot be honoured.
    """
    kin = KIN[scheduler_class({"_class_name": DDIM_SCHEDULER, **config}, where)]
    ends = {"set_alpha_to_one": False} if kin.ends and config.get("final_sigmas_type") == "sigma_min" else {}
    keys = Keys({**DDIM_KEYS, **kin.defaults, **ends, **config}, where)
    keys.off((*kin.switches, "thresholding"))
    if config.get("timestep_type", "discrete") != "discrete":
        raise keys.fault("timestep_type", "discrete")
    timesteps = keys.whole("num_train_timesteps", 1, MOST_TIMESTEPS)
    trained, curve = _trained_betas(keys, timesteps), keys.choice("beta_schedule", kin.curves)
    ends_of = {"above": 0.0, "below": 1.0} if trained is None and curve in DRAWN_BETWEEN else {}
    rescaled = kin.zero_snr is not None and keys.flag("rescale_betas_zero_snr")
    if rescaled and timesteps == 1:
        raise keys.fault("rescale_betas_zero_snr", "false, as there is one training step")
    return {
        **DDIM_KEYS,
        "num_train_timesteps": timesteps,
        "beta_start": keys.number("beta_start", **ends_of),
        "beta_end": keys.number("beta_end", **ends_of),
        "beta_schedule": curve,
        "trained_betas": trained,
        "clip_sample": keys.flag("clip_sample"),
        "clip_sample_range": keys.number("clip_sample_range", above=0),
        "set_alpha_to_one": keys.flag("set_alpha_to_one"),
        "steps_offset": keys.whole("steps_offset", 0, timesteps - 1),
        "prediction_type": keys.choice("prediction_type", get_args(PredictionType)),
        "timestep_spacing": keys.choice("timestep_spacing", get_args(TimestepSpacing)),
        "rescale_betas_zero_snr": rescaled,
    }


def _trained_betas(keys: Keys, timesteps: int) -> list[float] | None:
    value = keys.config["trained_betas"]
    value = value.tolist() if hasattr(value, "tolist") else value  # an array, in a config that a program made
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or len(value) != timesteps
        or not all(_is_number(beta) and 0 < beta <= 1 for beta in value)
    ):
        raise keys.fault(
            "trained_betas", f"null, or {timesteps} numbers over 0 and at most 1, as num_train_timesteps says"
        )
    return [float(beta) for beta in value]
