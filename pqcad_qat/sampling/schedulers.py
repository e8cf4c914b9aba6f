"""The supported scheduler classes of diffusers, and their configs read key by key, with defaults and allowed values.

Not here: the noise schedules themselves (ddpm_schedule.py, flow.py).

The sampler of this package is DDIM for DDPM's kin, and Euler for flow matching. Any class whose schedule is made of
betas can therefore be read, whatever solver it implements. A class in neither table is refused by name, since its model
would otherwise be sampled wrongly without an error.
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
"""The scheduler class of flow matching, and that of DDPM's kin in which this package samples and deploys."""

STEPS = "num_inference_steps"
"""Key that this package adds to a deployed scheduler config: the sampling steps that the model was distilled for."""

MOST_TIMESTEPS = 100_000
"""Largest number of training timesteps of a schedule; an exported graph holds a table over them."""

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
"""Keys of a DDIMScheduler, with their defaults."""

SQUARED_COSINE = "squaredcos_cap_v2"
"""Value of beta_schedule that stands for a squared cosine."""

DDIM_CURVES = ("linear", "scaled_linear", SQUARED_COSINE)
"""Values of beta_schedule that DDIMScheduler knows by name."""

DRAWN_BETWEEN = ("linear", "scaled_linear", "sigmoid")
"""Values of beta_schedule whose end points are beta_start and beta_end."""

SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Keys that select other spacings of sigma."""


@dataclass(frozen=True)
class Kin:
    """Rules for reading a scheduler class of DDPM's kin.

    Attributes:
        defaults: defaults of keys, where they differ from DDIM's. Solvers never clip, so their entries turn clipping
            off.
        curves: allowed values of its beta_schedule.
        zero_snr: alpha_bar that rescale_betas_zero_snr leaves at the last timestep; None where the class lacks that
            key.
        switches: keys that place timesteps as DDIM cannot, or that derive another schedule from the betas. They must be
            off.
        ends: whether its final_sigmas_type decides where sampling ends: at the image, or at the noise of the first
            training timestep.
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
"""Rules by the name of diffusers' class."""


@dataclass(frozen=True)
class Keys:
    """A scheduler config that is read key by key with types and bounds; every message names the file and the key.

    Attributes:
        config: config with every key that is read.
        where: file of the config.
    """

    config: Mapping[str, Any]
    where: str

    def fault(self, key: str, allowed: str) -> ModelError:
        """Return the error for the value of a key."""
        value = self.config.get(key)
        got = "nothing" if key not in self.config else str(value).lower() if isinstance(value, bool) else shown(value)
        return ModelError(f"{self.where}: {key}: got {got}; allowed {allowed}")

    def whole(self, key: str, low: int, high: int) -> int:
        """Return a whole number between two bounds, both included; JSON may hold it as 1000.0."""
        value = self.config.get(key)
        if not _is_finite(value) or not low <= value <= high or value != int(value):
            raise self.fault(key, f"a whole number from {low} to {high}")
        return int(value)

    def finite(self, key: str, above: float = -math.inf, below: float = math.inf) -> float:
        """Return a finite number between two bounds, both excluded."""
        value = self.config.get(key)
        if not _is_finite(value) or not above < value < below:
            bounds = [
                f"{word} {bound:g}" for word, bound in (("over", above), ("under", below)) if math.isfinite(bound)
            ]
            raise self.fault(key, " ".join(["a number", " and ".join(bounds)]).strip())
        return float(value)

    def flag(self, key: str) -> bool:
        """Return the value of a key that must be true or false."""
        value = self.config.get(key)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def choice(self, key: str, allowed: Collection[str]) -> str:
        """Return the value of a key that must be one of the allowed texts."""
        value = self.config.get(key)
        if not isinstance(value, str) or value not in allowed:
            raise self.fault(key, ", ".join(allowed))
        return value

    def off(self, keys: Collection[str]) -> None:
        """Raise ModelError where one of the keys turns on an unsupported feature."""
        for key in keys:
            if self.config.get(key):
                raise self.fault(key, "null or false")


def _is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number within the range of a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300


def scheduler_class(config: Mapping[str, Any], where: str) -> str:
    """Return the class that a scheduler config names.

    Raises:
        ModelError: it names no class, or an unsupported one.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or (name not in KIN and name != FLOW_SCHEDULER):
        raise Keys(config, where).fault(
            "_class_name", f"{', '.join(KIN)}, whose noise is that of betas, or {FLOW_SCHEDULER}"
        )
    return name


def ddim_keys(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the config of a class of DDPM's kin as a DDIM config with every key, each of them checked.

    Missing keys get the defaults of the config's own class. beta_schedule may still be one that DDIM does not know by
    name.

    Raises:
        ModelError: a class, key or value is not supported.
    """
    kin = KIN[scheduler_class({"_class_name": DDIM_SCHEDULER, **config}, where)]
    # A solver that ends at the noise of the first training timestep corresponds to DDIM with set_alpha_to_one false.
    ends = {"set_alpha_to_one": False} if kin.ends and config.get("final_sigmas_type") == "sigma_min" else {}
    keys = Keys({**DDIM_KEYS, **kin.defaults, **ends, **config}, where)
    keys.off((*kin.switches, "thresholding"))
    if config.get("timestep_type", "discrete") != "discrete":
        raise keys.fault("timestep_type", "discrete")
    timesteps = keys.whole("num_train_timesteps", 1, MOST_TIMESTEPS)
    trained, curve = _trained_betas(keys, timesteps), keys.choice("beta_schedule", kin.curves)
    # beta_start and beta_end are bounded only where they are used.
    ends_of = {"above": 0.0, "below": 1.0} if trained is None and curve in DRAWN_BETWEEN else {}
    rescaled = kin.zero_snr is not None and keys.flag("rescale_betas_zero_snr")
    if rescaled and timesteps == 1:
        raise keys.fault("rescale_betas_zero_snr", "false, as there is one training step")
    return {
        **DDIM_KEYS,
        "num_train_timesteps": timesteps,
        "beta_start": keys.finite("beta_start", **ends_of),
        "beta_end": keys.finite("beta_end", **ends_of),
        "beta_schedule": curve,
        "trained_betas": trained,
        "clip_sample": keys.flag("clip_sample"),
        "clip_sample_range": keys.finite("clip_sample_range", above=0),
        "set_alpha_to_one": keys.flag("set_alpha_to_one"),
        "steps_offset": keys.whole("steps_offset", 0, timesteps - 1),
        "prediction_type": keys.choice("prediction_type", get_args(PredictionType)),
        "timestep_spacing": keys.choice("timestep_spacing", get_args(TimestepSpacing)),
        "rescale_betas_zero_snr": rescaled,
    }


def defaults_taken(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys that decide what a model was trained on and how it is sampled, and that its config leaves out,
    with the defaults that stand for them; none for flow matching.

    Raises:
        ModelError: as for `ddim_keys`.
    """
    if scheduler_class({"_class_name": DDIM_SCHEDULER, **config}, where) == FLOW_SCHEDULER:
        return {}
    whole = ddim_keys(config, where)
    decisive = ["num_train_timesteps", "prediction_type", "timestep_spacing", "clip_sample"]
    if whole["trained_betas"] is None:
        drawn = whole["beta_schedule"] in DRAWN_BETWEEN
        decisive += ["beta_schedule", *(("beta_start", "beta_end") if drawn else ())]
    return {key: whole[key] for key in decisive if key not in config}


def _trained_betas(keys: Keys, timesteps: int) -> list[float] | None:
    value = keys.config["trained_betas"]
    value = value.tolist() if hasattr(value, "tolist") else value  # configs made by a program may hold an array
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or len(value) != timesteps
        or not all(_is_finite(beta) and 0 < beta <= 1 for beta in value)
    ):
        raise keys.fault(
            "trained_betas", f"null, or {timesteps} numbers over 0 and at most 1, as num_train_timesteps says"
        )
    return [float(beta) for beta in value]
