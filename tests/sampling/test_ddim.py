"""DDIM: the original's tables, any count of steps, diffusers' steps, the data in the end, and the way back."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from inflate.errors import ConfigError
from inflate.models.moments import LatentMoments
from inflate.models.stable_diffusion import noise_for
from inflate.objectives import BETA_END, BETA_START, DDPM
from inflate.sampling.ddim import DDIM, Inversion, Spacing, standard_normal

PLAIN, STRETCHED = DDPM(), DDPM("v_prediction", zero_terminal_snr=True, base_scale=0.7)
COSINE, SHIFTED = DDPM("v_prediction", True, schedule="cosine"), DDPM("v_prediction", schedule="shifted_cosine")
SHAPE = (2, 3, 4, 2, 2)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise() -> Iterator[Tensor]:
    raise AssertionError("no fresh noise is asked for")
    yield


def test_steps_of_the_published_samplers() -> None:
    """Entries at both ends of 50 steps as the original implementation tabulates them, in float32."""
    old, new = DDIM(PLAIN).table(), DDIM(STRETCHED).table()
    assert old.timestep.tolist() == list(range(981, 0, -20))
    assert new.timestep.tolist() == list(range(999, 0, -20))
    recorded = {
        "signal": ([0.00577550008893013, 0.007281727157533169], [0.9803807735443115, 0.9982960224151611]),
        "signal_after": ([0.007281727157533169, 0.00911730993539095], [0.9982960224151611, 0.9991499781608582]),
        "sigma": ([0.45446327328681946, 0.4482824504375458], [0.03947960212826729, 0.020648354664444923]),
    }
    for name, (first, last) in recorded.items():
        entries = getattr(old, name)
        assert [*entries[:2], *entries[-2:]] == pytest.approx([*first, *last], abs=2e-7)
    assert new.signal[:2].tolist() == pytest.approx([0.0, 8.578784036217257e-05], abs=1e-10)
    assert new.signal_after[-1].item() == pytest.approx(0.9991499781608582, abs=1e-7)
    assert [*new.sigma[:2], *new.sigma[-2:]] == pytest.approx(
        [0.9999570846557617, 0.8781245946884155, 0.10053111612796783, 0.028507253155112267], abs=5e-7
    )
    scale = torch.tensor([0.9706767201423645, 0.9857142567634583]).double()  # before the last two steps
    assert new.rescale[-2:].tolist() == pytest.approx([(scale[1] / scale[0]).item(), 1.0], abs=2e-7)
    assert bool((new.rescale[:20] == 1).all())
    assert bool((old.rescale == 1).all())


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("objective", [PLAIN, STRETCHED, COSINE, SHIFTED], ids=["plain", "zero", "cosine", "shifted"])
def test_every_count_of_steps_is_finite_and_descends_through_the_schedule(objective: DDPM, spacing: Spacing) -> None:
    for steps in range(1, 1001):
        for eta in (0.0, 0.37, 1.0):
            table = DDIM(objective, steps, eta, spacing).table()
            assert all(bool(entries.isfinite().all()) for entries in table)
        torch.testing.assert_close(table.direction**2 + table.sigma**2, 1 - table.signal_after, rtol=0, atol=1e-12)
        assert len(table.timestep) == steps
        assert 0 <= table.timestep[-1] <= table.timestep[0] <= 999
        assert bool((table.timestep.diff() < 0).all())


def test_spacing_is_the_objectives_unless_asked_and_may_start_below_the_last_step() -> None:
    assert DDIM(PLAIN, 4).timesteps().tolist() == [751, 501, 251, 1]
    assert DDIM(PLAIN, 4, spacing="trailing").timesteps().tolist() == [999, 749, 499, 249]
    for objective in (STRETCHED, COSINE, SHIFTED):
        assert DDIM(objective, 4).timesteps().tolist() == [999, 749, 499, 249]
    assert DDIM(STRETCHED, 4, spacing="leading").timesteps().tolist() == [751, 501, 251, 1]
    assert DDIM(STRETCHED, 5, start=899).timesteps().tolist() == [899, 719, 539, 359, 179]
    assert DDIM(PLAIN, 5, start=899).timesteps().tolist() == [721, 541, 361, 181, 1]
    assert DDIM(PLAIN, 3, start=2).timesteps().tolist() == [2, 1, 0]
    assert DDIM(PLAIN, 30).timesteps().tolist()[:2] == [967, 934], "evenly spaced though 30 does not divide 1000"


@pytest.mark.parametrize(
    ("objective", "eta"), [(PLAIN, 0.0), (PLAIN, 0.5), (PLAIN, 1.0), (STRETCHED, 0.0), (STRETCHED, 0.5)]
)
def test_steps_are_those_of_diffusers(objective: DDPM, eta: float) -> None:
    spacing: dict[str, Any] = {"timestep_spacing": "trailing"} if objective.zero_terminal_snr else {"steps_offset": 1}
    theirs = DDIMScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, prediction_type=objective.prediction,
        rescale_betas_zero_snr=objective.zero_terminal_snr, **spacing,
    )  # fmt: skip
    theirs.set_timesteps(10)
    ours = DDIM(DDPM(objective.prediction, objective.zero_terminal_snr), 10, eta)
    assert torch.equal(ours.timesteps(), theirs.timesteps)
    for row in ours.rows():
        latents, prediction, noise = normal(0), normal(1), normal(2)
        wanted = theirs.step(prediction, row.timestep, latents, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours.step(row, latents, prediction, iter([noise])), wanted, atol=2e-5, rtol=2e-5)


def test_published_steps_of_i2vgen_xl_are_those_of_diffusers_told_our_schedule() -> None:
    """They begin at 981 of noise that is pure, and end at the first timestep's share of signal."""
    theirs, ours = noise_for(COSINE), DDIM(COSINE, 50, 0.0, "leading")
    theirs.set_timesteps(50)
    assert ours.timesteps().tolist() == theirs.timesteps.tolist() == list(range(981, 0, -20))
    assert float(ours.table().signal_after[-1]) == float(COSINE.signal[0])
    for row in ours.rows():
        latents, prediction = normal(0), normal(1)
        wanted = theirs.step(prediction, row.timestep, latents).prev_sample
        torch.testing.assert_close(ours.step(row, latents, prediction, no_noise()), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("prediction", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_exact_predictions_lead_to_the_data(
    prediction: Literal["epsilon", "v_prediction"], zero: bool, eta: float
) -> None:
    """Where all data is one point, the last latents are it, rescaled, but for the schedule's first noise level."""
    objective, clean, told = DDPM(prediction, zero, base_scale=0.7), normal(0), list[int]()

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        told.append(int(timestep[0]))
        sigma = objective.noisy(torch.zeros_like(noisy), timestep, torch.ones_like(noisy))
        noise = (noisy - objective.noisy(clean, timestep, torch.zeros_like(noisy))) / sigma
        return objective.target(clean, timestep, noise)

    sampler = DDIM(objective, 7, eta)
    noise = standard_normal([1, 2], SHAPE[1:], clean) if eta else no_noise()
    steps = sampler.timesteps()
    last = sampler.draw(predict, objective.noisy(clean, steps[:1].expand(2), normal(1)), noise)
    assert told == steps.tolist()
    wanted = 0.99915**0.5 * objective.rescale(steps[-1]) * clean
    assert float((last - wanted).std()) == pytest.approx((1 - 0.99915) ** 0.5, rel=0.3)


def test_noise_of_a_clip_is_its_own_seeds() -> None:
    like = torch.empty(0, dtype=torch.float64)
    both, alone = standard_normal([5, 6], (3, 2), like), standard_normal([6], (3, 2), like)
    first = next(both)
    assert first.dtype == torch.float64
    assert torch.equal(first[1:], next(alone))
    assert torch.equal(next(both)[1:], next(alone))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(first[0], torch.randn(3, 2, generator=generator).double())


def test_progress_wraps_the_steps() -> None:
    seen: list[int] = []

    def watch(steps: Any) -> Any:
        seen.append(len(steps))
        return steps

    DDIM(STRETCHED, 3, eta=0.0).draw(lambda noisy, timestep: noisy, normal(0), no_noise(), watch)
    assert seen == [3]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"steps": 11, "start": 9}, "1 to 10"),
        ({"eta": 1.1}, "eta is 1.1"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"start": 1000}, "start is 1000"),
    ],
)
def test_what_cannot_be_sampled_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DDIM(STRETCHED, **wrong)


@pytest.mark.parametrize("objective", [PLAIN, STRETCHED], ids=["plain", "zero"])
def test_a_start_below_the_last_timestep_has_the_moments_of_noised_clips(objective: DDPM) -> None:
    generator = torch.Generator().manual_seed(0)
    deviation, centre = torch.tensor([0.5, 2.0])[:, None, None], torch.tensor([1.0, -3.0])[:, None, None]
    clips = torch.randn(8, 4, 2, 32, 32, generator=generator) * deviation + centre
    first, second = torch.randn(2, *clips.shape, generator=generator)
    sampler = DDIM(objective, steps=10, start=600)
    expected = LatentMoments.of(objective.noisy(clips, sampler.timesteps()[:1].expand(8), first))
    found = LatentMoments.of(sampler.begin(second, LatentMoments.of(clips)))
    assert found.mean == pytest.approx(expected.mean, abs=0.02)
    assert found.variance == pytest.approx(expected.variance, rel=0.03)


def test_the_published_inversion_takes_one_step_more_and_ends_at_the_last_level() -> None:
    table = Inversion().table()
    assert table.timestep.tolist() == list(range(0, 700, 23))
    assert len(table.timestep) == 31
    plain = DDPM(schedule="cosine").signal
    torch.testing.assert_close(table.signal_after, torch.cat([plain[23:700:23], plain[699:700]]))
    assert float(table.signal_after[-1].sqrt()) == pytest.approx(0.4507, abs=5e-5)
    assert Inversion(steps=3).timesteps().tolist() == [0, 233, 466, 699]
    assert Inversion(levels=1, steps=1).timesteps().tolist() == [0]


@pytest.mark.parametrize("objective", [DDPM(schedule="cosine"), STRETCHED, COSINE, SHIFTED], ids=str)
def test_every_inversion_is_finite(objective: DDPM) -> None:
    for levels, steps in [
        (1, 1),
        (2, 2),
        (600, 7),
        (700, 30),
        *((1000, steps) for steps in (1, 2, 30, 333, 999, 1000)),
    ]:
        sampler = Inversion(objective, levels, steps)
        assert all(bool(entries.isfinite().all()) for entries in sampler.table())
        last = sampler.draw(lambda noisy, timestep: torch.tanh(noisy), normal(0))
        assert bool(last.isfinite().all())


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_a_network_that_says_one_noise_is_followed_there_and_back_exactly(steps: int) -> None:
    objective, clean, noise = DDPM(schedule="cosine"), normal(0), normal(1)
    there = Inversion(objective, 700, steps).draw(lambda noisy, timestep: noise, clean)
    back = DDIM(objective, 9, 0.0, "trailing", start=699).draw(lambda noisy, timestep: noise, there, no_noise())
    torch.testing.assert_close(back, clean, atol=1e-10, rtol=1e-10)


def test_there_and_back_by_the_network_of_gaussian_clips_comes_closer_the_smaller_the_steps() -> None:
    """Whose prediction is linear in its input: the error is of the first order, as each step's is of the second."""
    objective, clean = Inversion().objective, normal(0)

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        signal = objective.signal[timestep[0]]
        return (signal * (1 - signal)).sqrt() * (1 - 0.25) / (0.25 * signal + 1 - signal) * noisy

    errors = []
    for steps in (25, 50, 100):
        there = Inversion(steps=steps).draw(predict, clean)
        back = DDIM(objective, steps, 0.0, "trailing", start=699).draw(predict, there, no_noise())
        errors.append(float((back - clean).norm() / clean.norm()))
    assert errors[0] < 0.15
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.15)


@pytest.mark.parametrize(
    ("wrong", "told"), [({"levels": 0}, "levels is 0"), ({"levels": 1001}, "1 to 1000"), ({"steps": 0}, "steps is 0"),
                        ({"levels": 9, "steps": 10}, "there are 1 to 9")],
)  # fmt: skip
def test_what_cannot_be_inverted_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Inversion(**wrong)
