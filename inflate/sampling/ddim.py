"""DDIM (2010.02502): steps over a few timesteps of a DDPM objective's schedule, with fresh noise by choice, and back.

Nothing here is a difference of nearly equal numbers, so that every count of steps is finite at every `eta`; the usual
formula takes the root of a negative rounding error where the first step leaves pure noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from inflate.errors import ConfigError
from inflate.models.moments import LatentMoments
from inflate.objectives import DDPM, TRAIN_TIMESTEPS, Predict
from inflate.sampling.steps import Progress

Spacing = Literal["leading", "trailing"]


class Table(NamedTuple):
    """What each step does, every entry of shape (S,), in the order of the steps."""

    timestep: Tensor
    """descending; ascending of an inversion"""
    signal: Tensor
    """share of signal in the variance before the step"""
    signal_after: Tensor
    """share of signal in the variance after it"""
    direction: Tensor
    """factor of the predicted noise"""
    sigma: Tensor
    """factor of fresh noise"""
    rescale: Tensor
    """factor of the predicted clean latents: `DDPM.rescale` after the step over that before it"""


@dataclass(frozen=True)
class DDIM:
    """How noise becomes clean latents, by a network of some objective. ConfigError where that cannot be."""

    objective: DDPM
    """what the network predicts, and on which schedule"""
    steps: int = 50
    """timesteps that the network is called at"""
    eta: float = 1.0
    """share of fresh noise: 0 = none, 1 = as much as the training's own chain"""
    spacing: Spacing | None = None
    """leading = from timestep 1 upwards, as of old; trailing = from the last timestep downwards; none: trailing where
    the last is pure noise"""
    start: int | None = None
    """timestep that the steps come down from, over which they are spaced: the first of trailing ones; none: the last of
    training"""

    def __post_init__(self) -> None:
        last = TRAIN_TIMESTEPS - 1
        if self.start is not None and not 0 <= self.start <= last:
            raise ConfigError(f"start is {self.start}: it must be a timestep, 0 to {last}")
        if not 1 <= self.steps <= self._span:
            raise ConfigError(f"steps is {self.steps}: there are 1 to {self._span}, the timesteps up to the start")
        if not 0.0 <= self.eta <= 1.0:
            raise ConfigError(f"eta is {self.eta}: it must be 0 (no fresh noise) to 1")

    @property
    def _span(self) -> int:
        return TRAIN_TIMESTEPS if self.start is None else self.start + 1

    def timesteps(self) -> Tensor:
        """The timesteps, descending, evenly spaced and as many as there are steps: (S,).

        Those of the original implementations where these take as many steps as they are asked for, within the schedule:
        of leading ones, where the count divides the schedule; of trailing ones, mostly (61 gives them 62).
        """
        count = torch.arange(self.steps, 0, -1)
        trailing = self.objective.ends_in_noise if self.spacing is None else self.spacing == "trailing"
        if trailing:
            return (self._span * count.double() / self.steps).round().long() - 1
        offset = 1 if self.steps < self._span else 0
        return self._span * (count - 1) // self.steps + offset

    def table(self) -> Table:
        """What the steps do, in float64."""
        return table(self.objective, self.timesteps(), self.eta)

    def rows(self) -> list[Table]:
        """The table step by step, every entry a scalar."""
        return _rows(self.table())

    def begin(self, noise: Tensor, moments: LatentMoments) -> Tensor:
        """Latents (B, F, C, h, w) as they are likely at the first timestep, from standard normal ones of that shape."""
        first = self.timesteps()[0]
        signal = self.objective.signal[first]
        scale = self.objective.rescale(first.double())
        return moments.start(noise, float((1.0 - signal).sqrt()), float(signal.sqrt() * scale))

    def draw(
        self, predict: Predict, latents: Tensor, noise: Iterator[Tensor], progress: Progress | None = None
    ) -> Tensor:
        """Clean latents from `latents` (B, F, C, h, w) at the first timestep, standard normal ones as a rule.

        `noise` gives each step's fresh noise, of that shape, and is not asked where `eta` is 0. `progress` wraps the
        list of steps, as tqdm does.
        """
        for step in (progress or list)(self.rows()):
            latents = self.step(step, latents, predict(latents, _told(step, latents)), noise)
        return latents

    def step(self, step: Table, latents: Tensor, prediction: Tensor, noise: Iterator[Tensor]) -> Tensor:
        """The latents after a step, a row of the table, from those before it and the network's prediction."""
        after = _moved(self.objective, step, latents, prediction)
        return after + float(step.sigma) * next(noise) if self.eta else after


@dataclass(frozen=True)
class Inversion:
    """How clean latents become noise, by DDIM's steps backwards: what VGen's refinement begins from.

    It takes them on the plain cosine, by the negative prompt and without guidance. ConfigError where that cannot be.
    """

    objective: DDPM = DDPM("v_prediction", schedule="cosine")
    """what the network predicts, and on which schedule"""
    levels: int = 700
    """timesteps that noise is added over: the latents end at the last of them"""
    steps: int = 30
    """share of the levels that each step goes over, rounded down to timesteps. That may leave room for one step more:
    30 of 700 levels are 31, of 23 timesteps each, the last of which is cut short"""

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= TRAIN_TIMESTEPS:
            raise ConfigError(f"levels is {self.levels}: there are 1 to {TRAIN_TIMESTEPS} timesteps")
        if not 1 <= self.steps <= self.levels:
            raise ConfigError(f"steps is {self.steps}: there are 1 to {self.levels}, the levels to add noise over")

    @property
    def _stride(self) -> int:
        return self.levels // self.steps

    def timesteps(self) -> Tensor:
        """The timesteps that the network is called at, ascending from 0, at which clean latents are taken to be."""
        return torch.arange(0, self.levels, self._stride)

    def table(self) -> Table:
        """What the steps do, in float64."""
        timesteps = self.timesteps()
        ends = (timesteps + self._stride).clamp(max=self.levels - 1)
        before, after = self.objective.signal[timesteps], self.objective.signal[ends]
        scale = self.objective.rescale(ends.double()) / self.objective.rescale(timesteps.double())
        return Table(timesteps, before, after, (1.0 - after).sqrt(), torch.zeros_like(after), scale)

    def rows(self) -> list[Table]:
        """The table step by step, every entry a scalar."""
        return _rows(self.table())

    def draw(self, predict: Predict, latents: Tensor, progress: Progress | None = None) -> Tensor:
        """The latents (B, F, C, h, w) at the last of the levels that clean ones come from; `progress` as for DDIM."""
        for step in (progress or list)(self.rows()):
            latents = self.step(step, latents, predict(latents, _told(step, latents)))
        return latents

    def step(self, step: Table, latents: Tensor, prediction: Tensor) -> Tensor:
        """The latents after a step, a row of the table, from those before it and the network's prediction."""
        return _moved(self.objective, step, latents, prediction)


def table(objective: DDPM, timesteps: Tensor, eta: float) -> Table:
    """What steps over the timesteps (S,), descending, do, in float64; the last ends at timestep 0's share of signal."""
    signal = objective.signal
    before, after = signal[timesteps], torch.cat([signal[timesteps[1:]], signal[:1]])
    less = (1.0 - after) / (1.0 - before)
    sigma = eta * (less * (1.0 - before / after)).sqrt()
    direction = ((1.0 - after) * (1.0 - eta**2 + eta**2 * less * before / after)).sqrt()
    scale = objective.rescale(timesteps.double())
    return Table(timesteps, before, after, direction, sigma, torch.cat([scale[1:], scale[-1:]]) / scale)


def _rows(steps: Table) -> list[Table]:
    return [Table(*row) for row in zip(*steps, strict=True)]


def _told(step: Table, latents: Tensor) -> Tensor:
    return step.timestep.to(latents.device).expand(len(latents))


def _moved(objective: DDPM, step: Table, latents: Tensor, prediction: Tensor) -> Tensor:
    """The latents after a step without its fresh noise."""
    clean, direction = objective.separate(latents, _told(step, latents), prediction)
    return float(step.signal_after.sqrt() * step.rescale) * clean + float(step.direction) * direction


def standard_normal(seeds: Sequence[int], shape: Sequence[int], like: Tensor) -> Iterator[Tensor]:
    """Draws of standard normal clips (B, *shape) for ever, each clip's of its own seed, whatever those beside it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(*shape, generator=each) for each in generators]).to(like)
