"""DPM-Solver++ 2M (2211.01095) with fresh noise by choice, as I2VGen-XL's refinement takes it.

Latents are those of clips with noise of some level added, x = clean + sigma noise, and the network is given
x / sqrt(1 + sigma^2). Each step is exact for a clean clip that is a straight line in log sigma through what the network
said of it twice, at its midpoint. Every count of steps is finite at every `eta`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from inflate.errors import ConfigError
from inflate.objectives import DDPM, TRAIN_TIMESTEPS, Predict
from inflate.sampling.steps import Progress


class Table(NamedTuple):
    """What each step does, every entry of shape (S,), in the order of the steps."""

    timestep: Tensor
    """what the network is told: whole numbers, descending"""
    scale: Tensor
    """factor of the latents that the network is given"""
    latents: Tensor
    """factor of the latents before the step"""
    clean: Tensor
    """factor of the clean latents that the network says"""
    previous: Tensor
    """factor of those that it said before"""
    noise: Tensor
    """factor of fresh noise"""


@dataclass(frozen=True)
class DPMSolver:
    """How clips with some noise become clean, by a network of some objective. ConfigError where that cannot be."""

    objective: DDPM
    """what the network predicts, and on which schedule"""
    levels: int = 600
    """timesteps that it is refined over, from the last of them down"""
    steps: int = 30
    """timesteps that the network is called at"""
    eta: float = 1.0
    """share of fresh noise: 0 = none, 1 = as much as the training's own chain"""

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= TRAIN_TIMESTEPS:
            raise ConfigError(f"levels is {self.levels}: there are 1 to {TRAIN_TIMESTEPS} timesteps")
        if not 1 <= self.steps <= self.levels:
            raise ConfigError(
                f"steps is {self.steps}: there are 1 to {self.levels}, the levels of noise: take fewer, or more noise"
            )
        if not 0.0 <= self.eta <= 1.0:
            raise ConfigError(f"eta is {self.eta}: it must be 0 (no fresh noise) to 1")
        if self.objective.base_scale != 1.0:
            raise ConfigError(f"base_scale is {self.objective.base_scale}: DDIM alone knows rescaled latents, take it")

    def timesteps(self) -> Tensor:
        """Where the steps begin, descending and evenly spaced (S,), in fractions of timesteps, float64.

        Of one more, trailing from the last level, the least noisy is left out: the last step goes from the one before
        it to clean latents.
        """
        return self.levels - 1 - torch.arange(self.steps).double() * self.levels / (self.steps + 1)

    def sigmas(self) -> Tensor:
        """The noise levels there, by interpolation in log sigma, and 0 at the end: (S + 1,), float64."""
        logarithms, place = self.objective.sigmas.log(), self.timesteps()
        ends = logarithms[place.floor().long()], logarithms[place.ceil().long()]
        return pad(torch.lerp(*ends, place.frac()).exp(), (0, 1))

    def table(self) -> Table:
        """What the steps do, in float64."""
        sigmas = self.sigmas()
        lengths = (sigmas[:-2] / sigmas[1:-1]).log()  # (S - 1,): without the last step, which has none
        clean = -torch.expm1(-(1.0 + self.eta) * lengths)
        bend = 0.5 * clean * lengths / lengths.roll(1)
        bend[:1] = 0.0  # the network has said nothing before
        fresh = sigmas[1:-1] * (-torch.expm1(-2.0 * self.eta * lengths)).sqrt()
        return Table(
            self.timesteps().round().long(), (1.0 + sigmas[:-1] ** 2).rsqrt(), pad(1.0 - clean, (0, 1)),
            pad(clean + bend, (0, 1), value=1.0), pad(-bend, (0, 1)), pad(fresh, (0, 1)),
        )  # fmt: skip

    def rows(self) -> list[Table]:
        """The table step by step, every entry a scalar."""
        return [Table(*row) for row in zip(*self.table(), strict=True)]

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, F, C, h, w) with noise of the last level, as the training's: alpha clean + sigma noise."""
        return self.objective.noisy(clean, torch.full((len(clean),), self.levels - 1), noise)

    def begin(self, noised: Tensor) -> Tensor:
        """The latents of the first step, from those that `noised` or an inversion gives.

        As published they are multiplied by the noise level and not divided by alpha, so that the network is given
        sigma times them, 0.97 of 600 levels.
        """
        return float(self.sigmas()[0]) * noised

    def draw(
        self, predict: Predict, noised: Tensor, noise: Iterator[Tensor], progress: Progress | None = None
    ) -> Tensor:
        """Clean latents from those of the last level (B, F, C, h, w), `noised` ones or an inversion's.

        `noise` gives each step's fresh noise, of that shape, and is not asked in the last step nor where `eta` is 0.
        `progress` wraps the list of steps, as tqdm does.
        """
        latents = self.begin(noised)
        previous = torch.zeros_like(latents)
        for step in (progress or list)(self.rows()):
            clean = self.clean(predict, step, latents)
            latents, previous = self.step(step, latents, clean, previous, noise), clean
        return latents

    def clean(self, predict: Predict, step: Table, latents: Tensor) -> Tensor:
        """The clean latents that the network says at a step, a row of the table."""
        timestep = step.timestep.to(latents.device).expand(len(latents))
        given = float(step.scale) * latents
        return self.objective.separate(given, timestep, predict(given, timestep))[0]

    def step(self, step: Table, latents: Tensor, clean: Tensor, previous: Tensor, noise: Iterator[Tensor]) -> Tensor:
        """The latents after a step, a row of the table, from those before it and the network's clean ones."""
        after = float(step.latents) * latents + float(step.clean) * clean + float(step.previous) * previous
        return after + float(step.noise) * next(noise) if step.noise else after


def levels_of(strength: float, levels: int) -> int:
    """The noise levels, of so many, that a strength above 0 and up to 1 is; ConfigError."""
    if not 0.0 < strength <= 1.0:
        raise ConfigError(f"strength is {strength}: it must be above 0 (the clip as it is) and at most 1 (all levels)")
    return max(1, round(strength * levels))
