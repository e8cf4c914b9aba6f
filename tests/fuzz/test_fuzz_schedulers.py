"""Scheduler configs of every kind, damaged ones among them: a schedule that is diffusers' own, or one clear error."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import diffusers
import numpy as np
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from fuzzing import FUZZ, bounded
from hypothesis import assume, given
from hypothesis import strategies as st

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule
from pqcad_qat.sampling.flow import FlowSchedule
from pqcad_qat.sampling.schedulers import FLOW_SCHEDULER, KIN
from pqcad_qat.sampling.trajectory import noise_schedule, trajectory, written_out

RUBBISH = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            1000.0,
            0.5,
            -0.0,
            1e-30,
            1e30,
            10**9,
            10**400,
            math.nan,
            math.inf,
            -math.inf,
        ),
        *("", "1000", "linear", "x" * 5000, [], {}, [1], [None], {"a": 1}, [[0.1]]),
    ]
)

CURVES = sorted({curve for kin in KIN.values() for curve in kin.curves})
SWITCHES = sorted({switch for kin in KIN.values() for switch in kin.switches})


def mostly(*values: Any) -> st.SearchStrategy[Any]:
    return st.one_of(*[st.sampled_from(values)] * 6, RUBBISH)


KEYS: dict[str, st.SearchStrategy[Any]] = {
    "num_train_timesteps": mostly(1000, 1000, 1000, 100, 50, 10, 4, 2, 1, 997, 4000),
    "beta_start": mostly(0.0001, 0.00085, 0.001, 0.1, 1e-9, 0.999),
    "beta_end": mostly(0.02, 0.012, 0.5, 0.0001, 0.999),
    "beta_schedule": mostly(*CURVES),
    "trained_betas": mostly(None, None, None, [0.1] * 10, [0.01] * 1000, [0.5, 1.0], [0.1, -0.1]),
    "clip_sample": mostly(True, False),
    "clip_sample_range": mostly(1.0, 2, 0.1),
    "set_alpha_to_one": mostly(True, False),
    "steps_offset": mostly(0, 1, 5, 49, 999),
    "prediction_type": mostly("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": mostly("leading", "trailing", "linspace"),
    "rescale_betas_zero_snr": mostly(True, False),
    "thresholding": mostly(False, False, False, True),
    "final_sigmas_type": mostly("zero", "sigma_min"),
    "timestep_type": mostly("discrete", "discrete", "continuous"),
    "shift": mostly(1.0, 3, 12.0),
    "num_inference_steps": mostly(1, 4, 1000),
    **{switch: mostly(False, False, False, False, False, None, True) for switch in SWITCHES},
}

CONFIGS = st.tuples(
    st.one_of(
        *[st.sampled_from([*KIN, FLOW_SCHEDULER])] * 8,
        st.sampled_from(["EDMEulerScheduler", "LCMScheduler", "DDIM", "x" * 3000]),
        RUBBISH,
    ),
    st.fixed_dictionaries({}, optional=KEYS),
).map(lambda drawn: {"_class_name": drawn[0], **drawn[1]})


NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "timestep_spacing",
)


@FUZZ
@given(CONFIGS, st.sampled_from([1, 2, 3, 4, 7, 10, 20, 24, 50, 61, 0, 1000]), st.sampled_from([1, 2, 3, 5, 8]))
def test_fuzz_a_scheduler_config_is_diffusers_own_schedule_or_one_error(
    config: dict[str, Any], steps: int, factor: int
) -> None:
    with bounded(), np.errstate(all="raise", under="ignore"):
        fault = ""
        try:
            schedule = noise_schedule(config, "scheduler_config.json")
            walk = schedule.walk(steps, "sampler.steps")
        except ModelError as error:
            fault = str(error)
        if fault:
            assert fault.startswith(("scheduler_config.json: ", "sampler.steps: got "))
            assert len(fault) < 1500
            return
        written = json.loads(json.dumps(written_out({"_class_name": config["_class_name"]}, schedule), allow_nan=False))
        if isinstance(schedule, DDPMSchedule):
            _check_kin(config, schedule, written, steps)
        else:
            _check_flow(schedule, written, steps)
        *_, last = trajectory(lambda x_t, t: np.tanh(x_t), np.full((1, 1, 2, 2), 0.5), schedule, steps)
        assert np.isfinite(last.x_s).all()
        if steps % factor == 0 and steps // factor > 1:
            student = schedule.student(steps, steps // factor)
            assert student.walk(steps // factor)[0][0] == walk[0][0]
            assert {t for t, _ in student.walk(steps // factor)} <= {
                t for t, _ in schedule.passing(steps, (steps // factor,))
            }
            fine = [step for inner in schedule.finer(walk, factor) for step in inner]
            assert [s for _, s in fine][:-1] == [t for t, _ in fine][1:] or factor == 1


def _check_kin(config: dict[str, Any], schedule: DDPMSchedule, written: dict[str, Any], steps: int) -> None:
    """The noise of its class, and the noise and times of the DDIMScheduler that is deployed."""
    theirs: Any = DDIMScheduler.from_config(written)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == [t for t, _ in schedule.walk(steps)]
    np.testing.assert_allclose(schedule.alpha_bar, theirs.alphas_cumprod.double().numpy(), rtol=1e-3, atol=1e-6)
    noise = {key: config[key] for key in NOISE if key in config}
    if "num_train_timesteps" in noise:
        noise["num_train_timesteps"] = int(noise["num_train_timesteps"])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        own: Any = getattr(diffusers, config["_class_name"]).from_config(noise)
    np.testing.assert_allclose(schedule.alpha_bar, own.alphas_cumprod.double().numpy(), rtol=1e-3, atol=1e-6)


def _check_flow(schedule: FlowSchedule, written: dict[str, Any], steps: int) -> None:
    theirs: Any = FlowMatchEulerDiscreteScheduler.from_config(written)
    theirs.set_timesteps(steps)
    assume(schedule.timestep_spacing == "linspace")
    np.testing.assert_allclose(
        [t for t, _ in schedule.walk(steps)], theirs.timesteps.double().numpy(), rtol=1e-5, atol=1e-3
    )
