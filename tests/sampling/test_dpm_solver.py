"""DPM-Solver++: its table in closed form, any count of steps, diffusers' steps, its order, and where it begins."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from inflate.errors import ConfigError
from inflate.objectives import DDPM
from inflate.sampling.ddim import standard_normal
from inflate.sampling.dpm_solver import DPMSolver, levels_of

SHIFTED, COSINE = DDPM("v_prediction", schedule="shifted_cosine"), DDPM("v_prediction", True, schedule="cosine")
PLAIN = DDPM("epsilon")
SHAPE = (2, 3, 4, 2, 2)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise() -> Iterator[Tensor]:
    raise AssertionError("no fresh noise is asked for")
    yield


def test_steps_of_the_published_refinements() -> None:
    inverted, noised = DPMSolver(SHIFTED, 700, 4), DPMSolver(SHIFTED, 600, 30)
    assert inverted.table().timestep.tolist() == [699, 559, 419, 279]
    torch.testing.assert_close(inverted.sigmas(), torch.cat([SHIFTED.sigmas[[699, 559, 419, 279]], torch.zeros(1)]))
    steps = noised.timesteps()
    assert [float(steps[0]), float(steps[1]), float(steps[-1])] == pytest.approx([599, 599 - 600 / 31, 1200 / 31 - 1])
    assert noised.table().timestep[:2].tolist() == [599, 580]


def test_levels_between_timesteps_are_interpolated_in_the_logarithm() -> None:
    solver = DPMSolver(SHIFTED, 600, 15)  # 37.5 timesteps a step
    below, above = SHIFTED.sigmas[561:563].log()
    assert float(solver.sigmas()[1]) == pytest.approx(math.exp((below + above) / 2))


@pytest.mark.parametrize("objective", [SHIFTED, COSINE, PLAIN], ids=["shifted", "cosine", "plain"])
def test_every_count_of_steps_is_finite_and_keeps_the_clip_and_the_noise_level(objective: DDPM) -> None:
    counts = [(1, 1), (2, 1), (2, 2), *((600, steps) for steps in range(1, 600, 23)), (600, 599), (600, 600), (700, 30)]
    for levels, steps in [*counts, *((1000, steps) for steps in (1, 2, 3, 30, 500, 998, 999, 1000))]:
        for eta in (0.0, 0.37, 1.0):
            solver = DPMSolver(objective, levels, steps, eta)
            table, sigmas = solver.table(), solver.sigmas()
            assert all(bool(entries.isfinite().all()) and len(entries) == steps for entries in table)
            ones = table.latents + table.clean + table.previous
            torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-12)
            spread = table.latents**2 * sigmas[:-1] ** 2 + table.noise**2
            torch.testing.assert_close(spread, sigmas[1:] ** 2, rtol=1e-9, atol=1e-18)
            assert bool((sigmas.diff() < 0).all())
            assert 0 <= int(table.timestep[-1]) <= int(table.timestep[0]) == levels - 1


def test_nothing_is_infinite_where_clips_are_pure_noise() -> None:
    for objective in (SHIFTED, COSINE):
        solver = DPMSolver(objective, 1000, 20)
        noised = solver.noised(normal(0).float(), normal(1).float())
        drawn = solver.draw(
            lambda noisy, timestep: torch.tanh(noisy), noised, standard_normal([1, 2], SHAPE[1:], noised)
        )
        assert drawn.dtype == torch.float32
        assert bool(drawn.isfinite().all())


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_are_those_of_diffusers(steps: int, eta: float) -> None:
    """Whose latents are alpha times ours; at timesteps that are whole numbers."""
    solver = DPMSolver(SHIFTED, 600, steps, eta)
    theirs = DPMSolverMultistepScheduler(
        trained_betas=SHIFTED.betas.tolist(), prediction_type="v_prediction", final_sigmas_type="zero",
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++", lower_order_final=False,
    )  # fmt: skip
    theirs.set_timesteps(timesteps=solver.timesteps().long().tolist())
    latents = solver.begin(normal(0))
    reference, previous = float((1 + solver.sigmas()[0] ** 2).rsqrt()) * latents, torch.zeros_like(latents)
    for number, row in enumerate(solver.rows()):
        prediction, noise = normal(10 + number), normal(20 + number)
        clean = solver.clean(lambda noisy, timestep, said=prediction: said, row, latents)
        latents, previous = solver.step(row, latents, clean, previous, iter([noise])), clean
        step = theirs.step(prediction, theirs.timesteps[number], reference, variance_noise=noise)
        reference = step.prev_sample.double()
        scale = float((1 + solver.sigmas()[number + 1] ** 2).rsqrt())
        torch.testing.assert_close(scale * latents, reference, rtol=1e-4, atol=1e-4)


def test_without_fresh_noise_it_solves_the_equation_to_the_second_order() -> None:
    """Of Gaussian clips the flow is known, here to timestep 299: x shrinks as the root of the whole variance."""
    variance, errors = 0.25, []

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        signal = SHIFTED.signal[timestep[0]]
        return (signal * (1 - signal)).sqrt() * (1 - variance) / (variance * signal + 1 - signal) * noisy

    for steps in (9, 19, 39):  # of which timesteps are whole numbers
        solver = DPMSolver(SHIFTED, 600, steps, eta=0.0)
        half, latents, sigmas = (steps + 1) // 2, solver.begin(normal(0)), solver.sigmas()
        start, previous = latents, torch.zeros_like(latents)
        for row in solver.rows()[:half]:
            clean = solver.clean(predict, row, latents)
            latents, previous = solver.step(row, latents, clean, previous, no_noise()), clean
        exact = ((variance + sigmas[half] ** 2) / (variance + sigmas[0] ** 2)).sqrt() * start
        errors.append(float((latents - exact).norm() / exact.norm()))
    assert errors[0] < 0.05
    assert min(errors[0] / errors[1], errors[1] / errors[2]) > 3.4


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("objective", [SHIFTED, PLAIN], ids=["shifted", "plain"])
def test_exact_predictions_lead_to_the_data(objective: DDPM, eta: float) -> None:
    clean, told = normal(0), list[int]()

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        told.append(int(timestep[0]))
        sigma = objective.noisy(torch.zeros_like(noisy), timestep, torch.ones_like(noisy))
        noise = (noisy - objective.noisy(clean, timestep, torch.zeros_like(noisy))) / sigma
        return objective.target(clean, timestep, noise)

    solver = DPMSolver(objective, 600, 7, eta)
    noise = standard_normal([1, 2], SHAPE[1:], clean) if eta else no_noise()
    last = solver.draw(predict, solver.noised(clean, normal(1)), noise)
    assert told == solver.table().timestep.tolist()
    torch.testing.assert_close(last, clean, atol=1e-9, rtol=1e-9)


def test_the_network_is_given_sigma_times_the_noised_clip_first() -> None:
    seen: list[Tensor] = []

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        seen.append(noisy)
        return torch.zeros_like(noisy)

    solver = DPMSolver(SHIFTED, 600, 1)
    noised = solver.noised(normal(0), normal(1))
    alpha, sigma = SHIFTED.signal[599].sqrt(), (1 - SHIFTED.signal[599]).sqrt()
    torch.testing.assert_close(noised, alpha * normal(0) + sigma * normal(1))
    solver.draw(predict, noised, no_noise())
    torch.testing.assert_close(seen[0], sigma * noised)
    assert float(sigma) == pytest.approx(0.97236, abs=1e-5)


def test_a_clip_depends_on_its_own_seed_alone_and_the_last_step_draws_nothing() -> None:
    solver, asked = DPMSolver(SHIFTED, 600, 4), list[int]()

    def counted(seeds: list[int], like: Tensor) -> Iterator[Tensor]:
        for number, each in enumerate(standard_normal(seeds, SHAPE[1:], like)):
            asked.append(number)
            yield each

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(noisy)

    both = solver.draw(predict, normal(0), counted([5, 6], normal(0)))
    assert asked == [0, 1, 2]
    alone = solver.draw(predict, normal(0)[1:], counted([6], normal(0)))
    torch.testing.assert_close(both[1:], alone, rtol=1e-12, atol=1e-12)


def test_progress_wraps_the_steps() -> None:
    seen: list[int] = []

    def watch(steps: Any) -> Any:
        seen.append(len(steps))
        return steps

    DPMSolver(SHIFTED, 600, 3, 0.0).draw(lambda noisy, timestep: noisy, normal(0), no_noise(), watch)
    assert seen == [3]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"levels": 0}, "levels is 0"),
        ({"levels": 1001}, "1 to 1000"),
        ({"steps": 0}, "steps is 0"),
        ({"levels": 6}, "steps is 30: there are 1 to 6"),
        ({"eta": 1.1}, "eta is 1.1"),
        ({"eta": math.nan}, "eta is nan"),
        ({"objective": DDPM(base_scale=0.7)}, "DDIM alone"),
    ],
)
def test_what_cannot_be_sampled_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DPMSolver(**{"objective": SHIFTED, **wrong})


def test_a_strength_is_a_share_of_the_levels() -> None:
    assert [levels_of(strength, 600) for strength in (1.0, 0.5, 0.001, 1e-9)] == [600, 300, 1, 1]
    for wrong in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(ConfigError, match="above 0"):
            levels_of(wrong, 600)
