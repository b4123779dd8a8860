from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_dynamicrafter import FRAMES, SIDE, family
from tiny_video_ldm import clip
from torch import Tensor

from inflate.errors import ConfigError
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.models.moments import LatentMoments
from inflate.objectives import DDPM, EDM
from inflate.training.denoising import Given
from inflate.training.held_out import join
from inflate.training.image_text_to_video import ImageTextToVideo, ImageTextToVideoTask, Preview
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DynamiCrafter:
    """DynamiCrafter, shown the latent of its image."""
    return family(tmp_path_factory.mktemp("model"))


def clips_of(*numbers: int) -> dict[str, Any]:
    return join([{**clip(n), "pixels": clip(n)["pixels"].double(), "stride": torch.tensor([1.0])} for n in numbers])


def animating(model: DynamiCrafter, sampling: Preview | None = None, **settings: Any) -> ImageTextToVideoTask:
    small = ImageTextToVideo(
        bands=1, preview_clips=1, condition_frame="first", drop_text=0.0, drop_both=0.0, drop_image=0.0, **settings
    )
    return ImageTextToVideoTask(
        model, "joint", small, sampling or Preview(steps=1), Given([clips_of(100), clips_of(101)], lr=1e-3, seed=3)
    )


def detail_of(task: ImageTextToVideoTask, data: dict[str, Any]) -> Tensor:
    """The detail latents (B, F, C, h, w) that the network is given in a step."""
    given: list[Tensor] = []
    handle = task.family.unet.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0][:, :, 4:]))
    with torch.no_grad():
        task.loss(data, Noise(3, data["number"]), 0)
    handle.remove()
    return given[0]


def test_the_detail_latent_has_one_noise_in_all_frames(model: DynamiCrafter) -> None:
    data, chosen = clips_of(0, 1, 2), ConditionNoise(2.7)
    plain, noised = (detail_of(animating(model, condition_noise=one), data) for one in (ConditionNoise(), chosen))
    assert torch.equal(noised, noised[:, :1].expand(-1, FRAMES, -1, -1, -1))
    noise = Noise(3, data["number"])
    time = model.objective.time(model.objective.timestep(noise.uniform("timestep")))
    level = chosen.level(time, noise.normal("condition level"))[:, None, None, None]
    drawn = noise.normal("condition noise", *plain.shape[1:])[:, 0]
    torch.testing.assert_close(noised[:, 0], plain[:, 0] + level * drawn, check_dtype=False)


def test_ends_have_noise_and_what_lies_between_stays_empty(model: DynamiCrafter) -> None:
    data, both = clips_of(0, 1), {"interpolation": True}
    plain = detail_of(animating(model, **both), data)
    noised = detail_of(animating(model, condition_noise=ConditionNoise(2.7), **both), data)
    assert not noised[:, 1:-1].any()
    for end in (0, -1):
        assert not torch.allclose(noised[:, end], plain[:, end], atol=0.1)


def test_held_out_losses_are_of_the_image_as_sampling_shows_it(model: DynamiCrafter) -> None:
    noisy, plain = (animating(model, condition_noise=ConditionNoise(most)) for most in (2.7, 0.0))
    assert noisy.evaluate() == plain.evaluate()


def test_noise_on_a_latent_that_is_not_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stage=joint is not shown"):
        animating(family(tmp_path, detail=False), condition_noise=ConditionNoise(1.0))


def test_an_export_remembers_what_latents_are_like_and_previews_start_from_it(
    model: DynamiCrafter, tmp_path: Path
) -> None:
    task, timesteps = animating(model, Preview(steps=1, start=700, guidance=1.0)), list[int]()
    handle = model.unet.register_forward_pre_hook(lambda _, inputs: timesteps.append(int(inputs[1].flatten()[0])))
    assert task.animate([0]).shape == (1, FRAMES, 3, SIDE, SIDE)
    handle.remove()
    assert timesteps == [700]
    known = LatentMoments.of(model.encode(clips_of(number)["pixels"]) for number in (100, 101))
    assert model.moments == known
    for network in model.networks:
        network.float()
    task.export(tmp_path / "export")
    assert DynamiCrafter.load(tmp_path / "export").moments == known
