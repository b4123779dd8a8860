import pytest
import torch

from inflate.errors import ConfigError
from inflate.objectives import DDPM, EDM
from inflate.training.leakage import ConditionNoise
from inflate.training.noise import Noise

NUMBERS = torch.arange(4)


def test_levels_rise_with_diffusion_time_and_stay_below_their_bound() -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    for exponent in (0.5, 5.0):
        noise = ConditionNoise(maximum=2.7, exponent=exponent)
        levels = [noise.level(torch.full_like(normal, time), normal) for time in (0.0, 0.6, 0.9, 1.0)]
        means = [float(each.mean()) for each in levels]
        assert means == sorted(means)
        assert all(0 < float(each.min()) and float(each.max()) < 2.7 for each in levels)
    assert float(levels[0].median()) == pytest.approx(2.7 / (1 + torch.e), rel=0.02)
    assert float(levels[-1].median()) == pytest.approx(2.7 / (1 + 1 / torch.e), rel=0.02)


def test_a_smaller_exponent_is_more_noise_in_mid_time() -> None:
    time, normal = torch.tensor([0.5]), torch.zeros(1)
    early, late = (ConditionNoise(1.0, exponent).level(time, normal) for exponent in (0.5, 5.0))
    assert early > late


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)])
def test_each_latent_has_noise_of_its_own_level(shape: tuple[int, ...]) -> None:
    settings, noise = ConditionNoise(maximum=2.0), Noise(1, NUMBERS)
    latent, time = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 4)
    added = settings.add(latent, time, noise, deviation=5.0) - latent
    expected = 5.0 * settings.level(time, noise.normal("condition level"))
    torch.testing.assert_close(added.flatten(1).std(dim=1), expected, rtol=0.2, atol=0)
    alone = settings.add(latent[2:3], time[2:3], Noise(1, NUMBERS[2:3]), deviation=5.0)
    torch.testing.assert_close(alone, (latent + added)[2:3])


def test_without_noise_the_latent_is_itself() -> None:
    latent = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert ConditionNoise().add(latent, torch.ones(4), Noise(1, NUMBERS)) is latent


def test_noise_keeps_the_latents_precision() -> None:
    latent = torch.zeros(4, 3, 2, 2, dtype=torch.bfloat16)
    assert ConditionNoise(1.0).add(latent, torch.ones(4), Noise(1, NUMBERS)).dtype == torch.bfloat16


def test_diffusion_time_is_spread_evenly_over_training() -> None:
    generator = torch.Generator().manual_seed(0)
    edm, ddpm = EDM(P_mean=0.7, P_std=1.6), DDPM()
    normal, uniform = torch.randn(20_000, generator=generator), torch.rand(20_000, generator=generator)
    for time in (edm.time(edm.sigma(normal)), ddpm.time(ddpm.timestep(uniform))):
        assert bool(((time >= 0) & (time <= 1)).all())
        shares = torch.histc(time, bins=4, min=0, max=1) / len(time)
        torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.01, rtol=0)
    assert ddpm.time(torch.tensor([0, 999])).tolist() == [0.0, 1.0]
    assert edm.time(torch.tensor([edm.sigma(torch.zeros(1))])) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("wrong", [{"maximum": -1.0}, {"exponent": 0.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="condition_noise"):
        ConditionNoise(**wrong)
