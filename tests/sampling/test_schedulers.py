"""Every scheduler class that is taken against diffusers' own of that name, and those that are not."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from pqcad_qat.errors import ModelError
from pqcad_qat.sampling.ddpm_schedule import DDPMSchedule, ddpm_schedule
from pqcad_qat.sampling.flow import settled
from pqcad_qat.sampling.schedulers import DDIM_KEYS, FLOW_SCHEDULER, KIN, MOST_TIMESTEPS
from pqcad_qat.sampling.trajectory import distilled_steps, noise_schedule, written_out

WHERE = "model/scheduler/scheduler_config.json"

CURVES = [(name, curve) for name, kin in KIN.items() for curve in kin.curves]

OTHERS = [name for name in dir(diffusers) if name.endswith("Scheduler") and name not in KIN and name != FLOW_SCHEDULER]


def own(name: str, **keys: Any) -> Any:
    """The scheduler as diffusers makes it of a config with these keys alone."""
    return getattr(diffusers, name).from_config({"_class_name": name, **keys})


def ours(name: str, **keys: Any) -> DDPMSchedule:
    found = noise_schedule({"_class_name": name, **keys}, WHERE)
    assert isinstance(found, DDPMSchedule)
    return found


def deployed(schedule: DDPMSchedule) -> Any:
    """diffusers' scheduler of the config that is written, once it has been a file."""
    return DDIMScheduler.from_config(json.loads(json.dumps(schedule.config)))


def signature(name: str) -> dict[str, Any]:
    return {
        key: value.default
        for key, value in inspect.signature(getattr(diffusers, name).__init__).parameters.items()
        if key != "self"
    }


def test_every_key_of_ddim_is_written() -> None:
    assert signature("DDIMScheduler") == DDIM_KEYS


@pytest.mark.parametrize("name", KIN)
def test_a_key_that_is_left_out_means_what_it_means_in_its_class(name: str) -> None:
    kin, theirs = KIN[name], signature(name)
    for key in DDIM_KEYS.keys() & theirs.keys():
        assert {**DDIM_KEYS, **kin.defaults}[key] == theirs[key], key
    assert ("rescale_betas_zero_snr" in theirs) == (kin.zero_snr is not None)
    assert ("final_sigmas_type" in theirs) == kin.ends
    # which says something of flow sigmas alone
    laying = {key for key in theirs if key.startswith("use_")} - {"use_dynamic_shifting"}
    assert set(kin.switches) == laying


@pytest.mark.parametrize("name", KIN)
def test_a_class_that_knows_no_clipping_does_not_clip(name: str) -> None:
    clips = signature(name).get("clip_sample", False)
    assert (ours(name).clip_sample_range is not None) == clips
    assert deployed(ours(name)).config.clip_sample == clips


@pytest.mark.parametrize(("name", "curve"), CURVES)
def test_the_noise_is_that_of_the_class_and_of_the_ddim_that_is_deployed(name: str, curve: str) -> None:
    wanted = own(name, beta_schedule=curve).alphas_cumprod.double().numpy()
    schedule = ours(name, beta_schedule=curve)
    # diffusers accumulates 1000 float32 products
    np.testing.assert_allclose(schedule.alpha_bar, wanted, rtol=3e-4, atol=1e-7)
    np.testing.assert_allclose(deployed(schedule).alphas_cumprod.double().numpy(), wanted, rtol=3e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, kin in KIN.items() if kin.zero_snr is not None])
def test_zero_terminal_snr_is_that_of_the_class_too(name: str) -> None:
    keys = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    wanted, schedule = own(name, **keys).alphas_cumprod.double().numpy(), ours(name, **keys)
    for found in (schedule.alpha_bar, deployed(schedule).alphas_cumprod.double().numpy()):
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-7)
        np.testing.assert_allclose(found[-1], wanted[-1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", KIN)
@pytest.mark.parametrize(
    "keys", [{}, {"steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False, "clip_sample": True}]
)
def test_the_steps_are_those_of_the_ddim_that_is_deployed(name: str, keys: dict[str, Any]) -> None:
    schedule = ours(name, **keys)
    scheduler = deployed(schedule)
    scheduler.set_timesteps(12)
    x = theirs = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    walk = schedule.walk(12)
    assert [t for t, _ in walk] == scheduler.timesteps.tolist()
    for t, s in walk:
        x = schedule.step(torch.tanh(x), x, t, s)
        theirs = scheduler.step(torch.tanh(theirs), int(t), theirs).prev_sample
    torch.testing.assert_close(x, theirs, rtol=2e-3, atol=2e-3)


def test_what_is_written_is_read_as_it_was_and_keys_of_ours_stay() -> None:
    config = {"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp", "num_inference_steps": 3}
    schedule = noise_schedule(config)
    written = json.loads(json.dumps(written_out(config, schedule)))
    again = noise_schedule(written)
    assert isinstance(schedule, DDPMSchedule)
    assert isinstance(again, DDPMSchedule)
    assert (written["_class_name"], written["num_inference_steps"]) == ("DDIMScheduler", 3)
    assert again.config == schedule.config
    np.testing.assert_allclose(again.alpha_bar, schedule.alpha_bar, rtol=1e-12)


def test_a_solver_that_ends_at_the_first_steps_noise_says_so_and_one_that_does_not_know_the_key_does_not() -> None:
    assert ours("EulerDiscreteScheduler", final_sigmas_type="sigma_min").final_alpha_bar < 1
    assert ours("EulerDiscreteScheduler", final_sigmas_type="zero").final_alpha_bar == 1
    assert ours("DDIMScheduler", final_sigmas_type="sigma_min").final_alpha_bar == 1


@pytest.mark.parametrize("name", [*OTHERS, "DDIM", "", None, ["DDIMScheduler"], 3, {}])
def test_any_other_class_is_refused_by_name(name: Any) -> None:
    with pytest.raises(
        ModelError, match=r"scheduler_config\.json: _class_name: got .*; allowed DDIMScheduler, .*FlowMatchEuler"
    ) as caught:
        noise_schedule({"_class_name": name}, WHERE)
    assert str(name)[:50] in str(caught.value) or name is None
    with pytest.raises(ModelError, match="_class_name: got nothing; allowed"):
        noise_schedule({}, WHERE)


SWITCHES = [(name, {switch: True}) for name, kin in KIN.items() for switch in kin.switches]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *SWITCHES,
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
        ("DDPMScheduler", {"thresholding": True}),
        ("PNDMScheduler", {"beta_schedule": "sigmoid"}),
        ("DDIMScheduler", {"timestep_spacing": None}),
        ("DDIMScheduler", {"clip_sample": "no"}),
        ("DDIMScheduler", {"set_alpha_to_one": 1}),
        *(
            ("DDIMScheduler", {"num_train_timesteps": value})
            for value in (math.nan, math.inf, True, -1, 0, 1000.5, "1000", None, 10**400)
        ),
        ("DDIMScheduler", {"num_train_timesteps": MOST_TIMESTEPS + 1}),
        *(("DDIMScheduler", {"steps_offset": value}) for value in (10**9, -1, 1000, 0.5, None)),
        *(("DDIMScheduler", {"beta_start": value}) for value in (-1.0, 0, 1, math.nan, "0.1", None, True)),
        *(("DDIMScheduler", {"beta_end": value, "beta_schedule": "scaled_linear"}) for value in (-2.0, 1.0, 10**400)),
        *(("DDIMScheduler", {"clip_sample_range": value}) for value in (0, -1.0, math.inf, None)),
        *(
            ("DDIMScheduler", {"trained_betas": value})
            for value in ([0.1], "abc", {}, [0.1] * 999 + [-0.1], [0.1] * 999 + ["a"], 0.1)
        ),
        ("DDPMScheduler", {"rescale_betas_zero_snr": True, "num_train_timesteps": 1}),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_with_its_file_and_key(name: str, keys: dict[str, Any]) -> None:
    key = next(iter(keys))
    with pytest.raises(ModelError, match=rf"{WHERE}: {key}: got .*; allowed ") as caught:
        noise_schedule({"_class_name": name, **keys}, WHERE)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "keys",
    [
        {"num_train_timesteps": 100_000},  # e^-1000
        {"trained_betas": [0.9] * 100, "num_train_timesteps": 100},
        {"beta_start": 1e-12, "beta_end": 1e-12},
        {"trained_betas": [0.5, 1.0, 0.5], "num_train_timesteps": 3},
    ],
)
def test_betas_that_leave_float32_no_noise_or_no_signal_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=rf"{WHERE}: .*beta.*: .*; allowed "):
        ours("DDIMScheduler", **keys)


def test_whole_numbers_that_json_holds_as_floats_are_taken_and_so_are_those_left_out() -> None:
    assert (
        ours("DDIMScheduler", num_train_timesteps=1000.0, steps_offset=1.0).config
        == ours("DDIMScheduler", steps_offset=1).config
    )


def test_keys_of_other_classes_are_passed_by_as_diffusers_does() -> None:
    leftover = {"use_karras_sigmas": True, "skip_prk_steps": True, "sigma_data": "x", "rescale_betas_zero_snr": True}
    assert ours("PNDMScheduler", **leftover).config == ours("PNDMScheduler").config


@pytest.mark.parametrize("steps", [0, -1, 1.5, "2", 1001, True])
def test_steps_that_a_deployed_sampler_cannot_make_are_refused(steps: object) -> None:
    with pytest.raises(
        ModelError, match=rf"{WHERE}: num_inference_steps: got .*; allowed a whole number from 1 to 1000"
    ):
        distilled_steps({"_class_name": "DDIMScheduler", "num_inference_steps": steps}, WHERE)


def test_epsilon_where_there_is_no_signal_is_refused_and_v_and_other_spacings_are_not() -> None:
    keys = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(
        ModelError,
        match=r"^sampler\.steps: got 8; they begin at time step 999, where rescale_betas_zero_snr leaves no signal",
    ):
        ours("DDIMScheduler", **keys).walk(8, "sampler.steps")
    for more in ({"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {"timestep_spacing": "leading"}):
        assert len(ours("DDIMScheduler", **{**keys, **more}).walk(8)) == 8


@pytest.mark.parametrize(
    ("prediction_type", "informative"), [("epsilon", False), ("v_prediction", True), ("sample", True)]
)
def test_epsilon_alone_says_nothing_where_there_is_hardly_any_signal(prediction_type: str, informative: bool) -> None:
    schedule = ddpm_schedule({"beta_schedule": "linear", "prediction_type": prediction_type})
    assert schedule.alpha_bar_at(999) < 1e-4
    assert schedule.informative(999) == informative
    assert schedule.informative(500)


def test_a_step_between_times_of_one_signal_moves_nothing() -> None:
    schedule = ddpm_schedule({"set_alpha_to_one": False})
    assert schedule.moves(100, 0)
    assert not schedule.moves(0, -1)


@pytest.mark.parametrize(
    "keys",
    [{"shift": value} for value in (0, -1.0, math.nan, "3", None, 1e9)]
    + [{"num_train_timesteps": value} for value in (0, math.nan, True, 10**9)],
)
def test_a_flow_schedulers_values_are_checked_alike(keys: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=rf"{WHERE}: {next(iter(keys))}: got .*; allowed "):
        noise_schedule({"_class_name": FLOW_SCHEDULER, **keys}, WHERE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_shift", "x"),
        ("max_shift", math.inf),
        ("max_image_seq_len", 256),
        ("base_image_seq_len", None),
        ("time_shift_type", "odd"),
    ],
)
def test_a_dynamic_shift_that_is_none_is_refused(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"{WHERE}: {key}: got "):
        settled({"use_dynamic_shifting": True, key: value}, 1024, WHERE)
