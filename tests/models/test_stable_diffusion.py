"""Noise schedules from schedulers' settings and to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from inflate.errors import CheckpointError
from inflate.models.stable_diffusion import SHARED_WITH_EULER, load_noise, noise_for, noise_of, objective_of
from inflate.objectives import BETA_END, BETA_START, DDPM

HERE = Path("scheduler")
OBJECTIVES = [
    DDPM(),
    DDPM("v_prediction", True),
    DDPM("v_prediction", schedule="cosine"),
    DDPM("v_prediction", True, schedule="cosine"),
    DDPM("v_prediction", schedule="shifted_cosine"),
]


def settings_of(scheduler: DDIMScheduler) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_written_schedule_is_the_objectives_in_diffusers_and_is_read_as_it(objective: DDPM, tmp_path: Path) -> None:
    noise_for(objective).save_pretrained(tmp_path)
    theirs, again = DDIMScheduler.from_pretrained(tmp_path), load_noise(tmp_path)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), objective.signal, atol=1e-6, rtol=0)
    assert float(theirs.final_alpha_cumprod) == pytest.approx(float(objective.signal[0]), abs=1e-6)
    assert objective_of(again.config, HERE) == objective
    assert settings_of(again) == settings_of(noise_for(objective))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_eulers_noise_levels_are_the_objectives(objective: DDPM) -> None:
    config = noise_for(objective).config
    theirs = EulerDiscreteScheduler.from_config({key: config[key] for key in SHARED_WITH_EULER})
    torch.testing.assert_close(theirs.alphas_cumprod.double(), objective.signal, atol=1e-6, rtol=0)


def test_the_published_steps_of_fifty_begin_at_981_and_stretched_ones_of_stable_diffusion_at_the_last() -> None:
    first = {}
    for name, objective in (("published", OBJECTIVES[3]), ("stretched", OBJECTIVES[1]), ("plain", OBJECTIVES[0])):
        scheduler = noise_for(objective)
        scheduler.set_timesteps(50)
        first[name] = int(scheduler.timesteps[0])
    assert first == {"published": 981, "stretched": 999, "plain": 981}


def test_how_a_cosine_is_stepped_through_is_as_published_whatever_its_settings_say() -> None:
    """The hub's I2VGen-XL says set_alpha_to_one, with which the last step is another than the original's."""
    told = {**noise_for(OBJECTIVES[3]).config, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    assert settings_of(noise_of(told, HERE)) == settings_of(noise_for(OBJECTIVES[3]))


def test_how_stable_diffusions_schedule_is_stepped_through_is_as_it_says() -> None:
    told = {**noise_for(OBJECTIVES[0]).config, "set_alpha_to_one": True, "timestep_spacing": "linspace"}
    found = noise_of(told, HERE).config
    assert (found.set_alpha_to_one, found.timestep_spacing) == (True, "linspace")


SD = {"num_train_timesteps": 1000, "beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({**SD, "beta_end": 0.02}, "only Stable Diffusion's schedule and squaredcos_cap_v2"),
        ({**SD, "num_train_timesteps": 500}, "both of 1000 timesteps"),
        ({**SD, "trained_betas": [0.01] * 1000}, "only those of the shifted cosine"),
        ({**SD, "trained_betas": [0.01] * 10}, "only those of the shifted cosine"),
        ({**SD, "prediction_type": "sample"}, "predicts sample"),
        ({**SD, "rescale_betas_zero_snr": True}, "needs a model that predicts v"),
        ({**noise_for(OBJECTIVES[4]).config, "rescale_betas_zero_snr": True}, "ends in noise as it is"),
    ],
)
def test_other_schedules_are_refused_by_name(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=f"scheduler.*{told}"):
        noise_of(settings, HERE)
