import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import randomise, tiny_unet, tiny_vae
from inflate.errors import ConfigError
from inflate.families.svd import SVD, Condition, euler_scheduler, evaluating
from inflate.layers.recompute import feed_forwards
from inflate.models.moments import LatentMoments
from inflate.models.precision import cast
from inflate.models.unet import TemporalSpec
from inflate.objectives import EDM
from inflate.sampling.steps import guided, is_large
from inflate.sampling.svd import Sampling, condition_of, euler, initial_noise, sample, sample_latents
from inflate.surgery import inflate_unet, inflate_vae

WIDTH = 32


class MeanEncoder(nn.Module):
    """Stands in for CLIP: a projection of the mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, WIDTH)
        self.config = SimpleNamespace(projection_dim=WIDTH, image_size=8)

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    def forward(self, pixels: Tensor) -> Any:
        return SimpleNamespace(image_embeds=self.projection(pixels.mean(dim=(2, 3))))


@pytest.fixture(scope="module")
def family() -> SVD:
    parent = tiny_unet(linear=True, cross_attention_dim=WIDTH)
    unet, _ = inflate_unet(parent, TemporalSpec(added_id_dim=16), in_channels=8)
    vae, _ = inflate_vae(tiny_vae())
    randomise(unet)
    torch.manual_seed(0)
    return SVD(unet, vae, MeanEncoder(), frames=3, decode_chunk=3)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def settings(**changes: Any) -> Sampling:
    return Sampling(**{"steps": 2, **changes})


def test_sample_is_a_clip_and_repeats_with_its_seed(family: SVD, image: Tensor) -> None:
    one, two, other = (sample(family, image, settings(seed=seed)) for seed in (1, 1, 2))
    assert one.shape == (2, 3, 3, 16, 16)
    assert not one.requires_grad
    assert torch.equal(one, two)
    assert not torch.allclose(one, other)


def test_length_of_the_clip_can_be_chosen(family: SVD, image: Tensor) -> None:
    assert sample(family, image[:1], settings(frames=2)).shape == (1, 2, 3, 16, 16)


def test_progress_wraps_the_steps(family: SVD, image: Tensor) -> None:
    seen: list[int] = []

    def progress(steps: Any) -> Any:
        seen.append(len(steps))
        return steps

    sample(family, image[:1], settings(steps=3), progress)
    assert seen == [3]


def test_guidance_rises_over_the_frames() -> None:
    """A network that answers 0 without and 1 with its condition returns the guidance scale of each frame."""
    scheduler = euler_scheduler(EDM())
    scheduler.set_timesteps(1)
    calls: list[Tensor] = []

    def predict(scaled: Tensor, c_noise: Tensor) -> Tensor:
        calls.append(c_noise)
        return torch.cat([torch.zeros_like(scaled[:1]), torch.ones_like(scaled[:1])])

    noise, guidance = torch.zeros(1, 3, 4, 2, 2), torch.tensor([1.0, 2.0, 3.0])
    latents = euler(guided([predict], [guidance[:, None, None, None]]), noise, scheduler)
    torch.testing.assert_close(latents[0, :, 0, 0, 0], -guidance, rtol=1e-4, atol=0)
    assert calls[0].shape == (2,)


def test_without_guidance_the_network_runs_on_the_condition_alone(family: SVD, image: Tensor) -> None:
    batches: list[int] = []
    handle = family.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    sample(family, image, settings(guidance_max=1.0))
    sample(family, image, settings(guidance_max=2.0))
    handle.remove()
    assert batches == [2, 2, 4, 4]


def test_passes_in_turn_draw_the_clip_of_passes_together(family: SVD, image: Tensor) -> None:
    family, batches = copy.deepcopy(family), list[int]()
    for network in family.parts.values():
        network.double()
    family.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    drawn = [sample(family, image.double(), settings(little_memory=little)) for little in (True, False, None)]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-6, rtol=0)  # float32 in the end
    assert torch.equal(drawn[2], drawn[1])
    assert batches == [2] * 4 + [4] * 4
    assert not any(each.parts for each in feed_forwards(family.unet))
    condition = condition_of(family, image.double(), settings(), torch.Generator().manual_seed(0))
    noise = initial_noise(family, image.double(), settings(), torch.Generator().manual_seed(0))
    latents = [sample_latents(family, condition, noise, settings(little_memory=one)) for one in (True, False)]
    torch.testing.assert_close(*latents, atol=1e-10, rtol=1e-10)


def test_passes_are_taken_in_turn_where_the_clips_are_large() -> None:
    large, small = torch.empty(1, 25, 4, 72, 128, device="meta"), torch.empty(1, 8, 4, 64, 64, device="meta")
    assert is_large(large, 8, None)
    assert not is_large(small, 8, None)
    assert [is_large(small, 8, asked) for asked in (True, False)] == [True, False]


def test_a_network_in_half_precision_draws_about_the_same(family: SVD, image: Tensor) -> None:
    half, latents = copy.deepcopy(family), []
    cast(half.parts.values(), "bfloat16")
    for one in (family, half):
        condition = condition_of(one, image, settings(), torch.Generator().manual_seed(0))
        noise = initial_noise(one, image, settings(), torch.Generator().manual_seed(0))
        latents.append(sample_latents(one, condition, noise, settings()))
    assert latents[1].dtype == torch.float32
    assert 0 < float((latents[1] - latents[0]).std() / latents[0].std()) < 0.05
    assert sample(half, image, settings()).isfinite().all()


def test_exact_denoiser_is_followed_to_the_data() -> None:
    """Where all data is one point the sampler ends at it."""
    clean = torch.randn(1, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scheduler = euler_scheduler(EDM())
    scheduler.set_timesteps(8)
    levels = iter(scheduler.sigmas)

    def predict(scaled: Tensor, c_noise: Tensor) -> Tensor:
        c_skip, c_out, c_in, _ = EDM().scalings(next(levels)[None])
        return (clean - c_skip * scaled / c_in) / c_out

    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(euler(predict, noise, scheduler), clean, atol=1e-3, rtol=0)


def test_evaluation_mode_is_taken_back() -> None:
    training, still = nn.Dropout(), nn.Dropout().eval()
    with evaluating(training, still):
        assert not training.training
    assert training.training
    assert not still.training


def test_networks_sample_in_evaluation_mode(family: SVD, image: Tensor) -> None:
    family.unet.train()
    modes: list[bool] = []
    handle = family.unet.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    sample(family, image[:1], settings())
    handle.remove()
    assert modes == [False, False]
    assert family.unet.training


def test_settings_reach_the_condition(family: SVD, image: Tensor) -> None:
    chosen = settings(fps=12, motion_bucket=30, noise_aug=0.0)
    condition = condition_of(family, image, chosen, torch.Generator().manual_seed(0))
    torch.testing.assert_close(condition.added_ids, torch.tensor([[11.0, 30.0, 0.0]] * 2))
    assert initial_noise(family, image, chosen, torch.Generator().manual_seed(0)).shape == (2, 3, 4, 8, 8)


def test_noise_range_reaches_the_scheduler(family: SVD) -> None:
    condition = Condition(torch.zeros(1, 1, WIDTH), torch.zeros(1, 4, 8, 8), torch.tensor([[6.0, 127.0, 0.02]]))
    noise = torch.ones(1, 3, 4, 8, 8)
    low = sample_latents(family, condition, noise, settings(sigma_max=1.0))
    high = sample_latents(family, condition, noise, settings(sigma_max=100.0))
    assert not torch.allclose(low, high, atol=1e-2)


@pytest.mark.parametrize("sigma_max", [None, 2.0])
def test_a_lower_start_is_what_noise_leaves_of_the_clips_where_they_are_known(
    family: SVD, sigma_max: float | None
) -> None:
    known = replace(family, moments=LatentMoments((1.0, -2.0, 0.0, 0.5), (4.0, 1.0, 0.25, 1.0)))
    condition = Condition(torch.zeros(1, 1, WIDTH), torch.zeros(1, 4, 8, 8), torch.tensor([[6.0, 127.0, 0.02]]))
    noise = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs: list[Tensor] = []
    handle = family.unet.register_forward_pre_hook(lambda _, given: inputs.append(given[0][:, :, :4]))
    drawn = [
        sample_latents(one, condition, noise, settings(guidance_max=1.0, sigma_max=sigma_max))
        for one in (known, family)
    ]
    handle.remove()
    if sigma_max is None:
        assert torch.equal(*drawn)
    else:
        first = inputs[0] * (sigma_max**2 + 1) ** 0.5  # what the network is given is scaled
        torch.testing.assert_close(first, known.moments.start(noise, sigma_max))
        torch.testing.assert_close(inputs[2], noise)
        assert not torch.allclose(*drawn, atol=1e-2)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"frames": 0}])
def test_empty_samples_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Sampling(**wrong)


def test_image_that_does_not_fit_the_vae_is_refused(family: SVD) -> None:
    with pytest.raises(ConfigError, match="multiples of 2"):
        sample(family, torch.zeros(1, 3, 15, 16), settings())
