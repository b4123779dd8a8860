"""The steps that every sampler here takes: a prediction, guided, and the scheduler's answer to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from inflate.objectives import Predict

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps the list of steps, as tqdm does."""
TOGETHER = 16 * 512 * 512
"""Pixels that the network is given together where no other number is asked for."""
PARTS = 8
"""Parts in which the feed-forwards of large clips run."""


def integrate(
    predict: Predict,
    noise: Tensor,
    scheduler: DDIMScheduler | EulerDiscreteScheduler,
    guidance: Tensor | None = None,
    progress: Progress | None = None,
    without: Predict | None = None,
) -> Tensor:
    """Clean latents (B, F, C, h, w) from standard normal ones, along the scheduler's timesteps.

    With `guidance` (F,), `predict` is given the batch twice: first without, then with the condition. Where there is a
    prediction `without` the condition, each is given the batch, in turn, which needs half the memory.
    """
    latents = noise * scheduler.init_noise_sigma
    for timestep in (progress or list)(list(scheduler.timesteps)):
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = _guided(predict, scaled, timestep, guidance, without)  # (B, F, C, h, w)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def is_large(latents: Tensor, factor: int, asked: bool | None) -> bool:
    """Whether to draw in little memory: as `asked`, else where twice the clips' pixels are too many to go together.

    The latents (B, F, C, h, w) have `factor` pixels a side each.
    """
    return 2 * latents[:, :, 0].numel() * factor**2 > TOGETHER if asked is None else asked


def in_precision(predict: Predict, dtype: torch.dtype) -> Predict:
    """A prediction by a network of some precision, for a sampler that keeps its own."""

    def cast(scaled: Tensor, timestep: Tensor) -> Tensor:
        return predict(scaled.to(dtype), timestep).to(scaled.dtype)

    return cast


def _guided(
    predict: Predict, scaled: Tensor, timestep: Tensor, guidance: Tensor | None, without: Predict | None
) -> Tensor:
    if guidance is None:
        return predict(scaled, timestep.expand(len(scaled)))
    if without is None:
        null, given = predict(_twice(scaled), timestep.expand(2 * len(scaled))).chunk(2)
    else:
        null, given = (one(scaled, timestep.expand(len(scaled))) for one in (without, predict))
    return null + guidance[:, None, None, None] * (given - null)


def _twice(scaled: Tensor) -> Tensor:
    return scaled.repeat(2, *(1,) * (scaled.ndim - 1))
