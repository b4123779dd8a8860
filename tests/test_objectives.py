import math
from typing import Literal

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from inflate.errors import ConfigError
from inflate.objectives import (
    BETA_END,
    BETA_START,
    DDPM,
    EDM,
    Schedule,
    _place_of_float64,
    hinge_discriminator_loss,
    hinge_generator_loss,
    schedule_sigmas,
    schedule_signal,
    sigma_to_timestep,
    vanilla_discriminator_loss,
)


def clip(seed: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 2, 4, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(scaled: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
    return torch.tanh(scaled) + c_noise[:, None, None, None, None]


def scheduler(zero_terminal_snr: bool) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_terminal_snr,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=14.0,
    )


def test_loss_equals_the_weighted_error_of_the_denoised_clip() -> None:
    clean, noise, sigma = clip(0), clip(1), torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    denoised = EDM().denoise(network, clean + sigma[:, None, None, None, None] * noise, sigma)
    weighted = (1 + sigma**2) / sigma**2 * (denoised - clean).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(EDM().loss(network, clean, sigma, noise), weighted, rtol=1e-9, atol=0)


def test_loss_is_computed_in_float32_from_half_precision() -> None:
    clean, noise = clip(0).bfloat16(), clip(1).bfloat16()
    loss = EDM().loss(lambda scaled, _: scaled.bfloat16(), clean, torch.ones(3, dtype=torch.bfloat16), noise)
    assert loss.dtype == torch.float32
    assert loss.shape == (3,)


def test_target_stays_finite_at_extreme_noise() -> None:
    sigma = torch.tensor([1e-4, 1.0, 1e4])
    target = EDM().target(clip(0).float(), sigma, clip(1).float())
    torch.testing.assert_close(target[0], clip(1).float()[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(target[2], -clip(0).float()[2], atol=1e-3, rtol=0)


def test_network_is_told_a_quarter_of_log_sigma() -> None:
    scalings = EDM().scalings(torch.tensor([math.e]))
    assert scalings.c_noise.item() == pytest.approx(0.25)
    assert scalings.c_in.item() ** 2 + scalings.c_out.item() ** 2 == pytest.approx(1.0)


def test_sigmas_follow_the_log_normal_law() -> None:
    sigma = EDM(P_mean=1.0, P_std=0.5).sigma(torch.tensor([-2.0, 0.0, 2.0]))
    torch.testing.assert_close(sigma, torch.tensor([0.0, 1.0, 2.0]).exp())


def test_no_sigma_is_above_what_the_network_can_be_told() -> None:
    draws = torch.tensor([0.0, 5.0])
    objective = EDM(noise_condition="discrete")
    torch.testing.assert_close(objective.sigma(draws), torch.tensor([math.exp(0.7), objective.sigma_limit]))
    assert objective.noise_input(objective.sigma(draws))[1] == 999
    torch.testing.assert_close(EDM().sigma(draws), (0.7 + 1.6 * draws).exp())


def test_timesteps_are_computed_where_there_is_float64() -> None:
    assert _place_of_float64(torch.device("mps", 0)) == torch.device("cpu")
    assert _place_of_float64(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_schedule_is_that_of_the_original_implementations() -> None:
    """Entries 0, 1, 998 and 999 as they compute them, all in float64."""
    plain, stretched = (schedule_signal(zero)[[0, 1, 998, 999]] for zero in (False, True))
    recorded = [0.99915, 0.9982960278384514, 0.004716698899875748, 0.004660098513077238]
    assert plain.tolist() == pytest.approx(recorded, rel=1e-12)
    recorded = [0.99915, 0.9982334461401823, 1.967888056621292e-07, 0.0]
    assert stretched.tolist() == pytest.approx(recorded, rel=1e-9, abs=0)


PUBLISHED: dict[Schedule, DDPM] = {
    "cosine": DDPM("v_prediction", True, schedule="cosine"),
    "shifted_cosine": DDPM("v_prediction", schedule="shifted_cosine"),
}


def test_the_cosine_is_the_closed_form_until_its_betas_are_limited() -> None:
    time = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    angle = (torch.stack([time, torch.zeros(1000)]) + 0.008) / 1.008 * math.pi / 2
    shares = (angle[0].cos() / angle[1].cos()) ** 2
    plain = DDPM(schedule="cosine")
    torch.testing.assert_close(plain.signal[:999], shares[:999], rtol=1e-9, atol=0)
    assert float(plain.signal[999] / plain.signal[998]) == pytest.approx(0.001)
    recorded = [0.9999587157751777, 0.9999125736533471, 2.277811478992018e-06, 0.0]
    assert PUBLISHED["cosine"].signal[[0, 1, 998, 999]].tolist() == pytest.approx(recorded, rel=1e-9, abs=0)


def test_the_shifted_cosine_goes_through_the_log_snr_of_its_ends_and_middle() -> None:
    """15, 0 and -15, less twice the log of the scales 2, 3 and 4; in the middle, between two timesteps, of both."""
    signal = PUBLISHED["shifted_cosine"].signal
    log_snr = signal.log() - (1 - signal).log()
    first, last = 15 - 2 * math.log(2), -15 - 2 * math.log(4)
    assert log_snr[[0, 999]].tolist() == pytest.approx([first, last], abs=1e-9)
    assert float(log_snr[499:501].mean()) == pytest.approx(-(math.log(2) + math.log(4)), abs=1e-9)
    assert (1 - signal[[300, 599, 699]]).sqrt().tolist() == pytest.approx([0.782569, 0.972363, 0.987880], abs=1e-6)
    assert float((1 - signal[-1]).sqrt().float()) == 1.0


@pytest.mark.parametrize("objective", [DDPM(), DDPM(schedule="cosine"), *PUBLISHED.values()], ids=str)
def test_every_schedule_falls_strictly_and_has_finite_noise_levels(objective: DDPM) -> None:
    assert bool((objective.signal.diff() < 0).all())
    assert bool((objective.sigmas.diff() > 0).all())
    assert float(objective.sigmas[-1]) <= 4096
    torch.testing.assert_close(torch.cumprod(1 - objective.betas, 0), objective.signal, rtol=1e-9, atol=1e-20)
    assert objective.ends_in_noise == (objective.schedule != "scaled_linear")


def test_the_shifted_cosine_is_not_stretched() -> None:
    with pytest.raises(ConfigError, match="it ends in noise as it is"):
        DDPM("v_prediction", True, schedule="shifted_cosine")


@pytest.mark.parametrize("objective", PUBLISHED.values(), ids=str)
def test_the_loss_on_other_schedules_is_the_squared_error_of_v(objective: DDPM) -> None:
    clean, noise, steps = clip(0), clip(1), torch.tensor([0, 599, 999])
    alpha, sigma = (
        root[steps][:, None, None, None, None] for root in (objective.signal**0.5, (1 - objective.signal) ** 0.5)
    )
    error = network(alpha * clean + sigma * noise, steps) - (alpha * noise - sigma * clean)
    loss = objective.loss(network, clean, steps, noise)
    torch.testing.assert_close(loss, error.square().mean((2, 3, 4)), atol=0, rtol=1e-12)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_discrete_schedule_is_that_of_diffusers_but_for_its_rounding(zero_terminal_snr: bool) -> None:
    reference = scheduler(zero_terminal_snr)
    expected = ((1 - reference.alphas_cumprod) / reference.alphas_cumprod) ** 0.5
    torch.testing.assert_close(schedule_sigmas(zero_terminal_snr).float(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_timesteps_of_sigmas_are_those_of_diffusers(zero_terminal_snr: bool) -> None:
    reference = scheduler(zero_terminal_snr)
    reference.set_timesteps(30)
    objective = EDM(noise_condition="discrete", zero_terminal_snr=zero_terminal_snr)
    c_noise = objective.scalings(reference.sigmas[:-1]).c_noise
    torch.testing.assert_close(c_noise, reference.timesteps, rtol=0, atol=5e-4)


def test_timesteps_end_with_the_schedule() -> None:
    levels = schedule_sigmas(False).float()
    outside = torch.stack([levels[0] / 10, levels[0], levels[500], levels[-1], levels[-1] * 10])
    torch.testing.assert_close(sigma_to_timestep(outside), torch.tensor([0.0, 0.0, 500.0, 999.0, 999.0]))
    assert EDM(noise_condition="discrete").sigma_limit == pytest.approx(levels[-1].item())
    assert EDM().sigma_limit == math.inf


def test_v_predicting_image_model_keeps_its_denoiser() -> None:
    """v and its sample as the image model's own schedule defines them, at one of its timesteps."""
    objective = EDM(noise_condition="discrete")
    sigma = schedule_sigmas(False)[[400]].double()
    signal, spread = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    clean, noise = clip(0, 1), clip(1, 1)
    told: list[float] = []

    def image_model(scaled: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        told.append(timestep.item())
        torch.testing.assert_close(scaled, signal * clean + spread * noise)
        return signal * noise - spread * clean

    denoised = objective.denoise(image_model, clean + sigma * noise, sigma)
    torch.testing.assert_close(denoised, clean)
    assert told == [pytest.approx(400, abs=1e-4)]


def test_adversarial_losses() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert hinge_generator_loss(fake).item() == pytest.approx(0.5)
    undecided = vanilla_discriminator_loss(torch.zeros(2), torch.zeros(2))
    assert undecided.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("prediction", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_ddpm_is_diffusers_schedule(prediction: Literal["epsilon", "v_prediction"], zero: bool) -> None:
    theirs = DDPMScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear", prediction_type=prediction,
        rescale_betas_zero_snr=zero,
    )  # fmt: skip
    ours, steps = DDPM(prediction, zero), torch.tensor([0, 517, 999])
    clean, noise = clip(0).float(), clip(1).float()
    torch.testing.assert_close(ours.noisy(clean, steps, noise), theirs.add_noise(clean, noise, steps))
    wanted = noise if prediction == "epsilon" else theirs.get_velocity(clean, noise, steps)
    torch.testing.assert_close(ours.target(clean, steps, noise), wanted)
    torch.testing.assert_close(schedule_signal(zero).float(), theirs.alphas_cumprod, atol=5e-7, rtol=0)


def test_ddpm_loss_is_the_squared_error_of_what_is_predicted() -> None:
    clean, noise, steps = clip(0), clip(1), torch.tensor([10, 500, 999])
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, 1000, dtype=torch.float64) ** 2
    share = torch.cumprod(1 - betas, 0)[steps]
    alpha, sigma = (part.sqrt()[:, None, None, None, None] for part in (share, 1 - share))
    noisy = alpha * clean + sigma * noise
    for prediction, target in (("epsilon", noise), ("v_prediction", alpha * noise - sigma * clean)):
        loss = DDPM(prediction).loss(network, clean, steps, noise)
        torch.testing.assert_close(loss, (network(noisy, steps) - target).square().mean((2, 3, 4)), atol=0, rtol=1e-12)


def test_ddpm_takes_a_timestep_per_frame() -> None:
    clean, noise = clip(0), clip(1)
    steps = torch.tensor([[3, 700], [0, 999], [42, 42]])
    told = DDPM("v_prediction", True)
    noisy = told.noisy(clean, steps, noise)
    for frame in range(2):
        alone = told.noisy(clean[:, frame, None], steps[:, frame], noise[:, frame, None])
        assert torch.equal(noisy[:, frame, None], alone)
    assert torch.equal(noisy[1, 1], noise[1, 1]), "the last timestep is pure noise"


def test_clean_latents_are_rescaled_before_noising_and_in_the_target() -> None:
    clean, noise, steps = clip(0), clip(1), torch.tensor([[0, 133], [399, 400], [999, 20]])
    plain, told = DDPM("v_prediction", True), DDPM("v_prediction", True, base_scale=0.7)
    scale = torch.tensor([[1.0, 0.9], [0.7, 0.7], [0.7, 1 - 0.3 * 20 / 399]], dtype=torch.float64)
    torch.testing.assert_close(told.rescale(steps), scale.float())
    assert bool((plain.rescale(steps) == 1).all())
    smaller = scale[:, :, None, None, None] * clean
    for ours, theirs in ((told.noisy, plain.noisy), (told.target, plain.target)):
        torch.testing.assert_close(ours(clean, steps, noise), theirs(smaller, steps, noise), rtol=1e-12, atol=1e-15)
    loss = told.loss(lambda scaled, timestep: torch.tanh(scaled), clean, steps, noise)
    assert loss.shape == steps.shape
    assert DDPM("epsilon", base_scale=0.7).target(clean, steps, noise) is noise


@pytest.mark.parametrize(
    "told", [DDPM(base_scale=0.7), DDPM("v_prediction", True, base_scale=0.7), *PUBLISHED.values()], ids=str
)
def test_a_right_prediction_separates_clean_latents_from_noise(told: DDPM) -> None:
    clean, noise, steps = clip(0), clip(1), torch.tensor([[0, 133], [399, 400], [999, 20]])
    prediction = told.target(clean, steps, noise)
    found = told.separate(told.noisy(clean, steps, noise), steps, prediction)
    scale = told.rescale(steps.double())[:, :, None, None, None]
    torch.testing.assert_close(found, (scale * clean, noise), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrong", [0.0, -0.3, 1.01, math.nan])
def test_a_rescale_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match="base_scale"):
        DDPM("v_prediction", base_scale=wrong)


def test_ddpm_draws_every_timestep_evenly() -> None:
    draws = DDPM().timestep((torch.arange(4000) + 0.5) / 4000)
    assert torch.equal(draws, torch.arange(1000).repeat_interleave(4))


def test_the_noise_is_not_predicted_from_pure_noise() -> None:
    with pytest.raises(ConfigError, match="predicts v"):
        DDPM("epsilon", zero_terminal_snr=True)
